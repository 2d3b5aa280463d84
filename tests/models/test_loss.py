"""The chunked loss equals `F.cross_entropy` in float64 on whole logits: value, hidden's gradient, weight's gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.models.loss import IGNORED, linear_cross_entropy_sum

TOKENS, DIM, VOCAB = 30, 8, 37
ROW_BYTES = 4 * VOCAB  # bytes of one token's logits


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden [2, 15, 8], weight [37, 8], labels [2, 15]. Every fourth label is ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((2, TOKENS // 2, DIM), generator=generator).to(dtype).requires_grad_()
    weight = torch.randn((VOCAB, DIM), generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (2, TOKENS // 2), generator=generator)
    labels.view(-1)[::4] = IGNORED
    return hidden, weight, labels


def expected(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Return (loss, gradient of hidden, gradient of weight), all in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = scale * F.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten(), reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("rows", [1, 7, 10, 29, 30, 10_000], ids=lambda rows: f"{rows}-a-chunk")
@pytest.mark.parametrize("scale", [1.0, 1 / 23, torch.tensor(1 / 23)], ids=["one", "number", "tensor"])
def test_equals_cross_entropy(rows: int, scale: float | Tensor) -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy_sum(hidden, weight, labels, scale, chunk_bytes=rows * ROW_BYTES)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    found = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    for ours, theirs in zip(found, expected(hidden, weight, labels, float(scale)), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6)


def test_without_gradients_it_is_the_same_number() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        evaluated = linear_cross_entropy_sum(hidden, weight, labels, 0.5, chunk_bytes=7 * ROW_BYTES)
    assert torch.equal(
        evaluated, linear_cross_entropy_sum(hidden, weight, labels, 0.5, chunk_bytes=7 * ROW_BYTES).detach()
    )


def test_all_ignored_is_zero() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy_sum(hidden, weight, torch.full_like(labels, IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_a_factor_on_the_loss_is_a_factor_on_its_gradients() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy_sum(hidden, weight, labels)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    tripled = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(once, tripled, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_may_be_frozen(frozen: str) -> None:
    hidden, weight, labels = inputs()
    _, d_hidden, d_weight = expected(hidden, weight, labels, 1.0)
    kept, gradient = (weight, d_weight) if frozen == "hidden" else (hidden, d_hidden)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    (found,) = torch.autograd.grad(linear_cross_entropy_sum(hidden, weight, labels), kept)
    torch.testing.assert_close(found.double(), gradient, rtol=2e-6, atol=1e-6)


def test_rows_of_zeros_are_seen_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pad the weight on a CPU as on GPUs, from 37 rows to 64: results have the same shapes and values."""
    hidden, weight, labels = inputs(torch.bfloat16)

    monkeypatch.setattr("shoal.models.loss.MULTIPLE_OF_ROWS", {"cpu": 64})
    loss = linear_cross_entropy_sum(hidden, weight, labels, 1 / 23, chunk_bytes=7 * ROW_BYTES)
    found = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    for ours, theirs in zip(found, expected(hidden, weight, labels, 1 / 23), strict=True):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()
    with torch.no_grad():
        evaluated = linear_cross_entropy_sum(hidden, weight, labels, 1 / 23)
    assert evaluated.item() == pytest.approx(loss.item(), rel=1e-3)


def test_bfloat16_is_close_and_the_weights_gradient_is_float32() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    loss = linear_cross_entropy_sum(hidden, weight, labels, 1 / 23, chunk_bytes=7 * ROW_BYTES)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    assert (loss.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    for ours, theirs in zip((loss, d_hidden, d_weight), expected(hidden, weight, labels, 1 / 23), strict=True):
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()
