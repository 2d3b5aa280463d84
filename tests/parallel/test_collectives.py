"""Differentiable collectives against one process that holds everything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shoal.mesh.mesh import Mesh
from shoal.parallel.collectives import all_gather, all_to_all, reduce_scatter
from tests.world import World, laid_out


def whole(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gathers(mesh: Mesh, dim: int) -> None:
    axis = laid_out(mesh, dp_replicate=1, tp=mesh.world_size).axis("tp")
    x = whole(0, 2, 12, 5)
    mine = x.chunk(axis.size, dim)[axis.rank].clone().requires_grad_()
    out = all_gather(mine, dim, axis)
    assert torch.equal(out, x)
    weight = torch.stack([whole(rank + 1, *x.shape) for rank in range(axis.size)])
    (out * weight[axis.rank]).sum().backward()
    assert mine.grad is not None
    assert torch.allclose(mine.grad, weight.sum(0).chunk(axis.size, dim)[axis.rank], atol=1e-6)


def sums(mesh: Mesh, dtype: torch.dtype) -> None:
    axis = laid_out(mesh, dp_replicate=1, tp=mesh.world_size).axis("tp")
    parts = torch.stack([whole(rank, 2, 12, 5, dtype=dtype) for rank in range(axis.size)])
    mine, bias = parts[axis.rank].clone().requires_grad_(), whole(9, 5).requires_grad_()
    out = reduce_scatter(mine, 1, axis, bias)
    wanted = (parts.double().sum(0) + bias.detach()).to(dtype).chunk(axis.size, 1)[axis.rank]
    assert out.dtype == dtype
    assert torch.allclose(out.float(), wanted.float(), atol=1e-6, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6)
    weight = whole(20, 2, 12, 5, dtype=dtype)
    (out * weight.chunk(axis.size, 1)[axis.rank]).sum().backward()
    assert mine.grad is not None
    assert bias.grad is not None
    assert torch.equal(mine.grad, weight)
    assert torch.allclose(bias.grad, weight.chunk(axis.size, 1)[axis.rank].float().sum((0, 1)), atol=1e-5)


def exchanges(mesh: Mesh) -> None:
    axis = laid_out(mesh, dp_replicate=1, cp=mesh.world_size).axis("cp")
    x = whole(0, 2, 12, 12, 3)  # positions and heads
    mine = x.chunk(axis.size, 1)[axis.rank].clone().requires_grad_()
    out = all_to_all(mine, 2, 1, axis)
    assert torch.equal(out, x.chunk(axis.size, 2)[axis.rank])
    back = all_to_all(out, 1, 2, axis)
    assert torch.equal(back, mine)
    (out * x.chunk(axis.size, 2)[axis.rank]).sum().backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad, mine)


@pytest.mark.parametrize("dim", [0, 1])
def test_gather(world: Callable[[int], World], dim: int) -> None:
    world(2).run(gathers, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [2, 3])
def test_sum_scatter(world: Callable[[int], World], size: int, dtype: torch.dtype) -> None:
    world(size).run(sums, dtype)


@pytest.mark.parametrize("size", [2, 3])
def test_exchange(world: Callable[[int], World], size: int) -> None:
    world(size).run(exchanges)
