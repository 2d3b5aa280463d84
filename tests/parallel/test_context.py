"""Context parallel against one process that computes the whole sequence in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shoal.config.options import Model
from shoal.data.loader import Batch
from shoal.mesh.mesh import Axis, Mesh
from shoal.models.attention import document_mask
from shoal.models.build import build_model
from shoal.models.family import LanguageModel
from shoal.parallel.context import apply_context, cut_batch, local_places
from tests.models.shapes import SHAPES
from tests.world import World, laid_out

BATCH, SEQ, HEAD_DIM = 2, 48, 16
METHODS = ["allgather", "ulysses", "ring"]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def documents() -> Tensor:
    """Return ids of three documents in one row, not aligned with the ranks' parts; the other row reuses its first id."""
    row = torch.tensor([0] * 7 + [1] * 22 + [2] * 19)
    return torch.stack((row, torch.tensor([4] * 31 + [9] * 10 + [4] * 7)))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Compute attention by its definition: scores [B, H, T, T] of every pair, keys repeated for groups -> [B, T, H, d]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def far(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest number in `wanted`."""
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def bare_model(axis: Axis, method: str) -> Any:
    """Build a model of one block, for its attention and its mask function."""
    model = build_model(SHAPES["llama"], compute_dtype=torch.float32)
    apply_context(model, axis, method)
    return model


def attends(mesh: Mesh, method: str, heads: tuple[int, int], masked: bool, dtype: torch.dtype) -> None:
    axis = laid_out(mesh, dp_replicate=1, cp=mesh.world_size).axis("cp")
    places = local_places(SEQ, axis, method)
    assert len(places) * axis.size == SEQ
    whole = [
        draw(seed, BATCH, SEQ, count, HEAD_DIM).to(dtype) for seed, count in enumerate((heads[0], heads[1], heads[1]))
    ]
    weight = draw(7, BATCH, SEQ, heads[0], HEAD_DIM).to(dtype)
    wanted_inputs = [x.double().requires_grad_() for x in whole]
    seen = document_mask(documents()) if masked else torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
    q, k, v = wanted_inputs
    wanted = softmax_attention(q, k, v, seen)
    (wanted * weight).sum().backward()

    model = bare_model(axis, method)
    mask = model.make_mask(documents()[:, places]) if masked else None
    inputs = [x[:, places].clone().requires_grad_() for x in whole]
    out = model.blocks["0"].attention.attend(*inputs, mask)
    assert out.dtype == dtype
    assert out.shape == (BATCH, len(places), heads[0] * HEAD_DIM)
    (out * weight[:, places].flatten(2)).sum().backward()
    bound = 2e-6 if dtype == torch.float32 else 1e-2
    assert far(out, wanted[:, places].flatten(2)) < bound
    for mine, reference in zip(inputs, wanted_inputs, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        assert mine.grad.dtype == dtype
        assert far(mine.grad, reference.grad[:, places]) < bound


def drawn_model(shape: Model) -> LanguageModel:
    model = build_model(shape, compute_dtype=torch.float32).to_empty(device="cpu")
    for index, parameter in enumerate(model.parameters()):
        # wider than initial weights, so that attention is far from uniform
        parameter.data = draw(100 + index, *parameter.shape) * 0.3
    return model


def trains(mesh: Mesh, name: str, method: str, masked: bool, how: str) -> None:
    """Check hidden states at this rank's positions, and gradients summed over the axis, against the model on one process."""
    axis = laid_out(mesh, dp_replicate=1, cp=mesh.world_size).axis("cp")
    tokens = torch.randint(97, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    ids = documents() if masked else None
    batch = Batch(tokens, tokens, torch.arange(SEQ).expand(BATCH, SEQ).contiguous(), ids, (0, 1), BATCH * SEQ)
    weight = draw(1, BATCH, SEQ, SHAPES[name].dim)
    single, model = drawn_model(SHAPES[name]), drawn_model(SHAPES[name])
    wanted = single(batch.tokens, batch.positions, batch.document_ids)
    (wanted * weight).sum().backward()

    apply_context(model, axis, method)
    for key, block in model.blocks.items():
        if how == "recompute":
            model.blocks[key].forward = recomputed(block.forward)
        elif how == "compile":
            block.compile(dynamic=False)
    mine = cut_batch(batch, axis, method)
    assert mine.valid_tokens == batch.valid_tokens
    places = local_places(SEQ, axis, method)
    hidden = model(mine.tokens, mine.positions, mine.document_ids)
    (hidden * weight[:, places]).sum().backward()
    assert far(hidden, wanted[:, places]) < 1e-5
    got, expected = grads(model), grads(single)
    assert got.keys() == expected.keys()
    for key, grad in got.items():
        # A key's bias shifts all scores of a query equally: its gradient is only rounding, of terms as large as its weight's
        # that cancel. Up to 1.1e-5 was seen; a wrong gradient would be near 1.
        beside, bound = expected[key.replace("k.bias", "k.weight")], 1e-4 if key.endswith("k.bias") else 1e-5
        worst = (axis.sum(grad) - expected[key]).abs().max()
        assert worst < bound * beside.abs().max(), key


def grads(model: LanguageModel) -> dict[str, Tensor]:
    """Return the gradients by name. An untied head has none, because only hidden states were computed."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)


def refuses_documents(mesh: Mesh) -> None:
    axis = laid_out(mesh, dp_replicate=1, cp=mesh.world_size).axis("cp")
    with pytest.raises(ValueError, match="allgather or ulysses"):
        bare_model(axis, "ring").make_mask(documents()[:, :24])


@pytest.mark.parametrize(
    ("size", "method", "heads"),
    [
        (2, "allgather", (4, 4)), (2, "allgather", (6, 2)), (3, "allgather", (4, 2)), (4, "allgather", (3, 1)),
        (2, "ulysses", (4, 4)), (2, "ulysses", (6, 2)), (3, "ulysses", (6, 3)), (4, "ulysses", (8, 4)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(
    world: Callable[[int], World], size: int, method: str, heads: tuple[int, int], masked: bool, dtype: torch.dtype
) -> None:
    world(size).run(attends, method, heads, masked, dtype)


@pytest.mark.parametrize(("size", "heads"), [(2, (4, 4)), (2, (6, 2)), (3, (4, 2)), (4, (3, 1))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ring_attention(world: Callable[[int], World], size: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    world(size).run(attends, "ring", heads, False, dtype)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_model(world: Callable[[int], World], name: str, method: str) -> None:
    world(2).run(trains, name, method, False, "plain")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["allgather", "ulysses"])
def test_model_with_documents(world: Callable[[int], World], name: str, method: str) -> None:
    world(4).run(trains, name, method, True, "plain")


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_in_backward(world: Callable[[int], World], method: str) -> None:
    world(2).run(trains, "llama", method, method != "ring", "recompute")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_compiled_blocks(world: Callable[[int], World], method: str) -> None:
    world(2).run(trains, "llama", method, method != "ring", "compile")


def test_ring_refuses_documents(world: Callable[[int], World]) -> None:
    world(2).run(refuses_documents)


def test_an_unknown_method() -> None:
    with pytest.raises(ValueError, match="spiral"):
        bare_model(Axis(2), "spiral")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_places_are_each_held_once_and_balanced(method: str, size: int) -> None:
    held = [local_places(SEQ, Axis(size, rank), method) for rank in range(size)]
    assert sorted(torch.cat(held).tolist()) == list(range(SEQ))
    assert all(torch.equal(places, places.sort().values) for places in held)
    if method != "ulysses":
        assert len({int((places + 1).sum()) for places in held}) == 1  # keys seen under a causal mask
    if size > 1:
        with pytest.raises(ValueError, match=r"into [2346] equal parts"):
            local_places(SEQ + 1, Axis(size), method)


def test_heads_that_do_not_divide() -> None:
    attend = bare_model(Axis(2), "ulysses").blocks["0"].attention.attend
    with pytest.raises(ValueError, match="3 query heads and 3 key heads"):
        attend(*(draw(0, 1, 8, 3, HEAD_DIM) for _ in range(3)))


def test_alone_nothing_changes() -> None:
    model = bare_model(Axis(), "allgather")
    tokens, labels, positions = (torch.zeros(1, 5, dtype=torch.int64) for _ in range(3))
    batch = Batch(tokens, labels, positions, None, (0,), 5)
    assert model.make_mask is document_mask
    assert cut_batch(batch, Axis(), "allgather") is batch
