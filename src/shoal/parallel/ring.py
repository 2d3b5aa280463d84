"""
Ring attention (Liu et al. 2023, arXiv:2310.01889): ranks pass keys and values on, and none ever holds all of them.

Private functions of torch run the rounds: they choose which chunks meet, merge partial softmaxes and compute the
backward. `system/torch_private.py` lists them. Runs with ring attention are rejected with untested torch versions
(`resolve/layout_checks.py`).
Each rank holds chunks r and 2N-1-r of 2N, as with allgather: this is how torch balances its rounds.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from shoal.errors import LaunchError
from shoal.mesh.mesh import Axis
from shoal.models.attention import CPU_HAS_TILES
from shoal.system.torch_private import require

ATTENTION_SEQUENCE = 2  # the dim of a sequence in [B, H, T, d]


class Ring:
    """
    The attention function of a block, causal over the whole sequence. Collectives over `axis`.

    The constructor raises `LaunchError` if torch lacks one of the private functions.
    """

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        require("ring")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, mask_B1TS: Tensor | None = None, *, dropout: float = 0.0
    ) -> Tensor:
        """Return [B, T, H * d]. Raises ValueError for a mask or dropout, `LaunchError` for float32 on CUDA."""
        if mask_B1TS is not None:
            no_mask(mask_B1TS)
        if dropout:
            raise ValueError("ring attention does not support dropout; use parallel.cp_method allgather or ulysses")
        dtype = q_BTHd.dtype
        if q_BTHd.device.type == "cpu" and not CPU_HAS_TILES:  # float32 is faster there, as in `attend`
            q_BTHd, k_BTKd, v_BTKd = q_BTHd.float(), k_BTKd.float(), v_BTKd.float()
        elif q_BTHd.is_cuda and dtype == torch.float32:
            raise LaunchError(
                "ring attention on CUDA supports bfloat16 only; set train.dtype bfloat16, or parallel.cp_method allgather"
            )
        out_BTHd: Tensor = _RingAttention.apply(q_BTHd, k_BTKd, v_BTKd, self.axis)  # type: ignore[no-untyped-call]
        return out_BTHd.flatten(2).to(dtype)


def no_mask(documents_BT: Tensor) -> Tensor:
    """Reject document masks, which torch's ring attention does not support."""
    raise ValueError("ring attention has no document mask; use parallel.cp_method allgather or ulysses")


class _RingAttention(torch.autograd.Function):
    """The device's flash operator, round by round, on queries [B, T, H, d] and keys [B, T, K, d]; H a multiple of K."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, axis: Axis) -> Tensor:
        aten = torch.ops.aten
        op = aten._scaled_dot_product_flash_attention if q.is_cuda else aten._scaled_dot_product_flash_attention_for_cpu
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out, lse, *ctx.rest = _torch_ring()._templated_ring_attention(
            axis.group, ATTENTION_SEQUENCE, op, q, k, v, is_causal=True, dropout_p=0.0
        )
        ctx.axis = axis
        ctx.save_for_backward(q, k, v, out, lse)
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        aten = torch.ops.aten
        q, k, v, out, lse = ctx.saved_tensors
        if q.is_cuda:
            op = aten._scaled_dot_product_flash_attention_backward.default
            # the forward operator's further results: row lengths and random state, which its backward requires
            names = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset")
            rest = dict(zip(names, ctx.rest, strict=False))
        else:
            op, rest = aten._scaled_dot_product_flash_attention_for_cpu_backward.default, {}
        grads = _torch_ring()._templated_ring_attention_backward(
            ctx.axis.group, ATTENTION_SEQUENCE, op, grad_outputs[0].transpose(1, 2), "grad_out", q, k, v, out, lse,
            is_causal=True, dropout_p=0.0, **rest,
        )  # fmt: skip
        d_q, d_k, d_v = (grad.transpose(1, 2) for grad in grads[:3])
        return d_q, d_k, d_v, None


def _torch_ring() -> ModuleType:
    """Return torch's ring-attention module, configured to pass keys on instead of gathering them."""
    from torch.distributed.tensor.experimental._context_parallel import _attention

    _attention._cp_options.rotate_method = _attention._RotateMethod.ALL_TO_ALL
    _attention._cp_options.enable_load_balance = True
    return _attention
