"""The gradient norm against float64, and clipping against torch."""

from __future__ import annotations

import pytest
import torch

from shoal.mesh.region import Region, Shard
from shoal.training.clip import clip, gradient_norm
from tests.parallel.layouts import ALONE


def _shards(*shapes: tuple[int, ...]) -> list[Shard]:
    torch.manual_seed(0)
    shards = []
    for index, shape in enumerate(shapes):
        parameter = torch.nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape) * torch.rand(shape)
        shards.append(Shard(f"p{index}", Region.whole(shape), parameter, parameter, True, False))
    return shards


def _norm(shards: list[Shard], bitwise: bool) -> torch.Tensor:
    return gradient_norm(shards, {s.name: s.region.shape for s in shards}, ALONE, bitwise=bitwise)


@pytest.mark.parametrize("bitwise", [False, True])
def test_the_norm_is_right_for_a_large_tensor_too(bitwise: bool) -> None:
    """A sequential sum of these squares in float32, as in torch's norm on a CPU, has an error of 1e-3."""
    shards = _shards((20_000, 768), (37, 101), (5,))
    wanted = torch.cat([s.tensor.grad.flatten().double() for s in shards]).norm()  # type: ignore[union-attr]
    torch.testing.assert_close(_norm(shards, bitwise).double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs(max_norm: float) -> None:
    shards = _shards((37, 101), (5,))
    theirs = [torch.nn.Parameter(s.tensor.detach().clone()) for s in shards]
    for parameter, s in zip(theirs, shards, strict=True):
        parameter.grad = s.tensor.grad.clone()  # type: ignore[union-attr]
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    clip(shards, _norm(shards, False), max_norm)
    for parameter, s in zip(theirs, shards, strict=True):
        torch.testing.assert_close(s.tensor.grad, parameter.grad)


def test_no_clipping_leaves_gradients_alone() -> None:
    [shard] = _shards((37, 101))
    before = shard.tensor.grad.clone()  # type: ignore[union-attr]
    clip([shard], torch.tensor(1e6), 0.0)
    assert torch.equal(shard.tensor.grad, before)  # type: ignore[arg-type]
