"""The chunked loss against torch's cross-entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.models.loss import linear_cross_entropy_sum

VOCAB, DIM, BATCH, SEQ = 53, 16, 3, 7


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, SEQ, DIM, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, DIM, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels[0, :3] = -100
    labels[2, -1] = -100
    return hidden, weight, labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d hidden, d weight), in float64."""
    hidden64 = hidden.detach().double().requires_grad_()
    weight64 = weight.detach().double().requires_grad_()
    logits = hidden64 @ weight64.t()
    loss = scale * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, (hidden64, weight64))


# Chunks of all 21 tokens, 7 (they divide it), 4 (the last is shorter), and one, in bytes of float32 logits.
@pytest.mark.parametrize("chunk_tokens", [100, 7, 4, 1])
@pytest.mark.parametrize("scale", [1.0, 1 / 17])
def test_equals_float64(chunk_tokens: int, scale: float) -> None:
    hidden, weight, labels = inputs()
    expected = reference(hidden, weight, labels, scale)
    loss = linear_cross_entropy_sum(hidden, weight, labels, torch.tensor(scale), chunk_bytes=chunk_tokens * VOCAB * 4)
    actual = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    for ours, exact in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_without_gradient_is_the_same_loss() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy_sum(hidden, weight, labels, 0.5)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy_sum(hidden, weight, labels, 0.5), loss.detach())


def test_all_ignored() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy_sum(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.count_nonzero() == 0
    assert weight.grad.count_nonzero() == 0


def test_upstream_gradient_multiplies() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy_sum(hidden, weight, labels)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, (hidden, weight))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


def test_frozen_weight() -> None:
    hidden, weight, labels = inputs()
    loss = linear_cross_entropy_sum(hidden, weight.detach(), labels)
    [gradient] = torch.autograd.grad(loss, (hidden,))
    torch.testing.assert_close(gradient.double(), reference(hidden, weight, labels, 1.0)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [100, 4])
def test_bfloat16_is_near_and_weight_gradient_float32(chunk_tokens: int) -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    loss_exact, d_hidden, d_weight = reference(hidden, weight.detach().bfloat16(), labels, 1.0)
    loss = linear_cross_entropy_sum(hidden, weight, labels, chunk_bytes=chunk_tokens * VOCAB * 2)
    ours = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == ours[1].dtype == torch.float32
    torch.testing.assert_close(loss.double(), loss_exact, rtol=5e-3, atol=0)
    for actual, exact in zip(ours, (d_hidden, d_weight), strict=True):
        assert (actual.double() - exact).norm() / exact.norm() < 1e-2
