"""
Cross-entropy of a linear layer, without holding all its logits.

A small model spends most of its memory and much of its time on the vocabulary. Logits are computed for one chunk of
tokens at a time, in the compute dtype, and each chunk's gradients immediately after, as in Liger Kernel (Hsu et al. 2024,
arXiv:2410.10989, section 3.2). Backward only multiplies them by the incoming gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.models.layers import linear

IGNORED = -100  # label of a token without loss

# Each chunk of tokens costs a pass over the weight's gradient, so chunks are large (GPT-2's head with 1,024 tokens on a
# CPU: 902 ms in one chunk, 1,115 ms in three, 1,871 ms in twelve).
CHUNK_BYTES = 256 * 2**20
# The softmax processes a chunk in slices. On a CPU they fit its cache, which saves 5% of the loss's time.
SLICE_BYTES_CPU = 2 * 2**20
# A GPU's matrix units need rows of a multiple of 16 bytes, which many vocabulary sizes do not give (GPT-2's:
# 50,257). The cast copy of the weight is padded with rows of zeros, which only the products use.
MULTIPLE_OF_ROWS = {"cuda": 64}


def linear_cross_entropy_sum(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    scale: Tensor | float = 1.0,
    each_BT: Tensor | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """
    Return scale * sum over labels that are not -100 of -log softmax(weight hidden)[label]; a float32 scalar.

    `scale` is usually 1 / the global number of valid tokens, so that the results of all micro-batches and ranks add up to
    the mean loss, and their gradients to its gradient. It may be a tensor, which the host does not read.
    each_BT: a float32 buffer that gets each token's term of the sum, without a gradient.

    Products use the dtype of `hidden_BTD`, to which the weight is cast; softmax, sum and the accumulation of the weight's
    gradient are float32. `chunk_bytes` bounds the logits that exist at a time. Deterministic for given shapes.
    """
    hidden_ND, labels_N = hidden_BTD.flatten(0, -2), labels_BT.flatten()
    each_N = None if each_BT is None else each_BT.view(-1)
    if torch.is_grad_enabled() and (hidden_BTD.requires_grad or weight_VD.requires_grad):
        loss: Tensor = _LinearCrossEntropySum.apply(hidden_ND, weight_VD, labels_N, scale, each_N, chunk_bytes)  # type: ignore[no-untyped-call]
        return loss
    weight = _cast(weight_VD, hidden_ND.dtype)
    loss = torch.zeros((), device=hidden_ND.device)
    for tokens in _slices(len(hidden_ND), weight.shape[0] * weight.element_size(), chunk_bytes):
        logits_CV = linear(hidden_ND[tokens], weight)[:, : len(weight_VD)]
        loss += softmax_loss(logits_CV, labels_N[tokens], scale, _part(each_N, tokens), to_gradient=False)
    return loss


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        scale: Tensor | float,
        each_N: Tensor | None,
        chunk_bytes: int,
    ) -> Tensor:
        weight = _cast(weight_VD, hidden_ND.dtype)
        loss = torch.zeros((), device=hidden_ND.device)
        d_hidden = torch.empty_like(hidden_ND)
        d_weight: Tensor | None = None
        for tokens in _slices(len(hidden_ND), weight.shape[0] * weight.element_size(), chunk_bytes):
            logits_CV = linear(hidden_ND[tokens], weight)
            logits, each_C = logits_CV[:, : len(weight_VD)], _part(each_N, tokens)
            loss += softmax_loss(logits, labels_N[tokens], scale, each_C, to_gradient=True)
            torch.mm(logits_CV, weight, out=d_hidden[tokens])
            # `logits_CV` now holds d loss / d logits: with z = h W^T, d h = d z W and d W = d z^T h
            product = (logits_CV.t() @ hidden_ND[tokens])[: len(weight_VD)]
            d_weight = product.to(weight_VD.dtype) if d_weight is None else d_weight.add_(product)
            del logits_CV, logits, product  # before the next chunk's logits are allocated
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        grad = grad_outputs[0]
        if _is_one(grad):
            return (
                (d_hidden if ctx.needs_input_grad[0] else None),
                (d_weight if ctx.needs_input_grad[1] else None),
                None,
                None,
                None,
                None,
            )
        hidden = d_hidden * grad.to(d_hidden.dtype) if ctx.needs_input_grad[0] else None
        weight = d_weight * grad if ctx.needs_input_grad[1] and d_weight is not None else None
        return hidden, weight, None, None, None, None


def _cast(weight_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast the weight to `dtype`; a copy may get rows of zeros, whose logits are 0 and add nothing to a gradient."""
    missing = -len(weight_VD) % MULTIPLE_OF_ROWS.get(weight_VD.device.type, 1)
    if weight_VD.dtype == dtype or not missing:
        return weight_VD.to(dtype)
    return F.pad(weight_VD.to(dtype), (0, 0, 0, missing))


def _is_one(grad: Tensor) -> bool:
    """
    Return whether `grad` is 1, so that backward can skip its products; False if finding out would wait for a device.

    On a CPU the products, a pass over the head's gradient, cost 3 to 5% of GPT-2's step. While compiling, tensors have no
    value.
    """
    return grad.device.type == "cpu" and type(grad) is Tensor and grad.item() == 1.0


def _slices(length: int, row_bytes: int, limit_bytes: int) -> Iterator[slice]:
    """Yield consecutive slices of rows, each within the limit but at least one row; the last may be shorter."""
    rows = max(1, limit_bytes // row_bytes)
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))


def _part(each_N: Tensor | None, tokens: slice) -> Tensor | None:
    return None if each_N is None else each_N[tokens]


def softmax_loss(
    logits_CV: Tensor, labels_C: Tensor, scale: Tensor | float, each_C: Tensor | None, *, to_gradient: bool
) -> Tensor:
    """
    Return the loss of these tokens; write each token's into `each_C`; with `to_gradient`, overwrite the logits with their gradient.

    With p = softmax(z): loss = -weight log p[label], and d loss / d z = weight (p - onehot(label)).
    """
    loss = torch.zeros((), device=logits_CV.device)
    limit = SLICE_BYTES_CPU if logits_CV.device.type == "cpu" else CHUNK_BYTES
    for rows in _slices(len(logits_CV), 4 * logits_CV.shape[1], limit):
        labels = labels_C[rows].unsqueeze(1)
        weight = ((labels != IGNORED) * scale).float()  # 0 if ignored, without a branch or a count on the host
        labels = labels.clamp(min=0)
        log_p = torch.log_softmax(logits_CV[rows], dim=-1, dtype=torch.float32)
        gained = log_p.gather(1, labels) * weight
        loss -= gained.sum()
        if each_C is not None:
            torch.neg(gained.squeeze(1), out=each_C[rows])
        if to_gradient:
            d_logits = log_p.exp_().mul_(weight)
            d_logits.scatter_add_(1, labels, -weight)
            logits_CV[rows] = d_logits
            del d_logits
        del log_p  # before the next slice's is allocated
    return loss
