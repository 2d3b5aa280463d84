"""
Loss parallel: the cross-entropy of `models/loss.py`, with the vocabulary sharded over ranks.

No rank ever holds the logits of the whole vocabulary. Ranks exchange three numbers per token: its largest logit, its sum
of exponentials and its label's logit (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.mesh.mesh import Axis
from shoal.models.layers import linear
from shoal.models.loss import CHUNK_BYTES, IGNORED
from shoal.parallel.collectives import all_gather, gather_parts


def vocab_parallel_cross_entropy_sum(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    scale: Tensor | float,
    each_BT: Tensor | None = None,
    *,
    axis: Axis,
    first: int,
    rows: int,
) -> Tensor:
    """
    Return `linear_cross_entropy_sum` over the whole vocabulary and sequence, on every rank of `axis`; float32, 0-d.

    hidden_BTD: this rank's part of the sequence, [B, T/tp, D]. weight_VD: this rank's rows of the head, from row `first`
    on. rows: the largest number of head rows on a rank. labels_BT: labels of the whole sequence. each_BT: a float32 buffer
    that gets each token's term of the sum. Collectives over `axis`.
    """
    hidden_ND = all_gather(hidden_BTD, 1, axis).flatten(0, 1)
    each_N = None if each_BT is None else each_BT.view(-1)
    loss: Tensor = _VocabLoss.apply(hidden_ND, weight_VD, labels_BT.flatten(), scale, each_N, axis, first, rows)  # type: ignore[no-untyped-call]
    return loss


class _VocabLoss(torch.autograd.Function):
    """Computes the gradients in forward, one chunk of tokens at a time, so that only one chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        scale: Tensor | float,
        each_N: Tensor | None,
        axis: Axis,
        first: int,
        rows: int,
    ) -> Tensor:
        weight = weight_VD.to(hidden_ND.dtype)
        loss = torch.zeros((), device=hidden_ND.device)
        train = any(ctx.needs_input_grad)
        d_hidden = torch.empty_like(hidden_ND) if train else None
        d_weight = torch.zeros_like(weight_VD) if train else None
        # Each chunk runs collectives, so all ranks use one chunk size, which suits the rank with the most rows.
        step = max(1, CHUNK_BYTES // (4 * rows))
        for start in range(0, len(hidden_ND), step):
            tokens = slice(start, start + step)
            each_C, d_logits_CV = _softmax(linear(hidden_ND[tokens], weight), labels_N[tokens], scale, axis, first)
            loss += each_C.sum()
            if each_N is not None:
                each_N[tokens] = each_C
            if d_hidden is not None and d_weight is not None:
                d_logits_CV = d_logits_CV.to(hidden_ND.dtype)
                torch.mm(d_logits_CV, weight, out=d_hidden[tokens])
                d_weight += d_logits_CV.t() @ hidden_ND[tokens]
            del d_logits_CV  # before the next chunk's logits are allocated
        ctx.save_for_backward(d_hidden, d_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        grad = grad_outputs[0]
        return (
            d_hidden * grad.to(d_hidden.dtype),
            d_weight * grad.to(d_weight.dtype),
            None,
            None,
            None,
            None,
            None,
            None,
        )


def _softmax(
    logits_CV: Tensor, labels_C: Tensor, scale: Tensor | float, axis: Axis, first: int
) -> tuple[Tensor, Tensor]:
    """
    Return the loss of each of these tokens, and its gradient with respect to this rank's logits; both float32.

    With p = softmax(z): loss = weight (log(sum exp z) - z[label]), and d loss / d z = weight (p - onehot(label)). The weight
    is `scale`, or 0 for an ignored label.
    """
    logits_CV = logits_CV.float()
    peak_C = logits_CV.amax(-1)
    # subtracting the peak, which cancels in p, keeps exp from overflowing
    dist.all_reduce(peak_C, op=dist.ReduceOp.MAX, group=axis.group)
    logits_CV -= peak_C.unsqueeze(1)
    weight_C = ((labels_C != IGNORED) * scale).float()
    local_C = labels_C - first
    here_C = (local_C >= 0) & (local_C < logits_CV.shape[1])
    local_C1 = local_C.clamp(0, logits_CV.shape[1] - 1).unsqueeze(1)
    label_C = logits_CV.gather(1, local_C1).squeeze(1) * here_C
    exps_CV = logits_CV.exp_()
    # added in rank order, so that the sum has the same bits on all ranks and in every run
    parts = gather_parts(torch.stack([exps_CV.sum(-1), label_C]), 0, axis).view(axis.size, 2, -1)
    total_C, label_C = parts.sum(0)
    each_C = (total_C.log() - label_C) * weight_C
    d_logits_CV = exps_CV.mul_((weight_C / total_C).unsqueeze(1))
    d_logits_CV.scatter_add_(1, local_C1, -(weight_C * here_C).unsqueeze(1))
    return each_C, d_logits_CV
