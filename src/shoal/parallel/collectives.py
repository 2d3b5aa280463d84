"""
Differentiable collectives along an axis, for tensor and context parallel.

All sums use one algorithm. Every rank sends each other rank the part that the receiver will keep (an all-to-all, which
moves as many bytes as a ring reduce-scatter). It then adds the received parts in rank order in float32 and rounds once.
So a sum does not depend on the library's algorithm, and bfloat16 parts are not rounded in between.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.mesh.mesh import Axis

# the same collective under either name: torch 2.13 renamed it and warns about the older name
gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """
    Concatenate the equal parts of all ranks along `dim`, in rank order.

    Backward: a reduce-scatter of the gradient. Collectives over `axis`.
    """
    return x if axis.size == 1 else _AllGather.apply(x, dim, axis)  # type: ignore[no-untyped-call]


def reduce_scatter(x: Tensor, dim: int, axis: Axis, bias: Tensor | None = None) -> Tensor:
    """
    Return this rank's part along `dim` of the sum over the axis, in the dtype of `x`; `bias` is added before rounding.

    The axis's size must divide the size of `dim`. Backward: an all-gather. Collectives over `axis`.
    """
    if axis.size == 1:
        return x if bias is None else x + bias.to(x.dtype)
    return _ReduceScatter.apply(x, dim, axis, bias)  # type: ignore[no-untyped-call, no-any-return]


def all_reduce_gradient(x: Tensor, axis: Axis) -> Tensor:
    """
    Return `x`, which is replicated. Backward: all-reduce its gradient, a collective over `axis`.

    The operator f of Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053, section 3); `all_reduce` is its g.
    """
    return x if axis.size == 1 else _AllReduceGradient.apply(x, axis)  # type: ignore[no-untyped-call]


def all_reduce(x: Tensor, axis: Axis, bias: Tensor | None = None) -> Tensor:
    """
    Return the sum over the axis on all ranks, in the dtype of `x`; `bias` is added before rounding.

    All ranks must use the result identically, so that its gradient is replicated: backward returns the gradient unchanged.
    Collectives over `axis`.
    """
    if axis.size == 1:
        return x if bias is None else x + bias.to(x.dtype)
    return _AllReduce.apply(x, axis, bias)  # type: ignore[no-untyped-call, no-any-return]


def gather_output(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """
    All-gather along `dim`, for a result that all ranks use identically. A collective over `axis`.

    Backward: this rank's part of the gradient, not a sum.
    """
    return x if axis.size == 1 else _GatherOutput.apply(x, dim, axis)  # type: ignore[no-untyped-call]


def split_input(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Return this rank's equal part of a replicated `x` along `dim`. Backward: an all-gather, a collective."""
    return x if axis.size == 1 else _SplitInput.apply(x, dim, axis)  # type: ignore[no-untyped-call]


def all_to_all(x: Tensor, split_dim: int, join_dim: int, axis: Axis) -> Tensor:
    """
    Split `x` along `split_dim`, send part r to rank r, and concatenate the received parts along `join_dim`.

    The axis's size must divide the size of `split_dim`. Backward: the reverse all-to-all. A collective over `axis`.
    """
    return x if axis.size == 1 else _AllToAll.apply(x, split_dim, join_dim, axis)  # type: ignore[no-untyped-call]


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return gather_parts(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return sum_parts(grad_outputs[0], ctx.dim, ctx.axis), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis, bias: Tensor | None) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        ctx.has_bias = bias is not None
        return sum_parts(x, dim, axis, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        grad = grad_outputs[0]
        # summed over this rank's positions only; `sum_replicated` adds the sums of the other ranks
        bias = grad.flatten(0, -2).float().sum(0) if ctx.has_bias else None
        return gather_parts(grad, ctx.dim, ctx.axis), None, None, bias


class _AllReduceGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return total_parts(grad_outputs[0], ctx.axis), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, bias: Tensor | None) -> Tensor:
        ctx.bias_dtype = None if bias is None else bias.dtype
        return total_parts(x, axis, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, Tensor | None]:
        grad = grad_outputs[0]
        bias = None if ctx.bias_dtype is None else grad.flatten(0, -2).float().sum(0).to(ctx.bias_dtype)
        return grad, None, bias


class _GatherOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return gather_parts(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return grad_outputs[0].chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank].contiguous(), None, None


class _SplitInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return x.chunk(axis.size, dim)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return gather_parts(grad_outputs[0], ctx.dim, ctx.axis), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split_dim: int, join_dim: int, axis: Axis) -> Tensor:
        ctx.split_dim, ctx.join_dim, ctx.axis = split_dim, join_dim, axis
        return torch.cat(exchange_parts(x, split_dim, axis).unbind(0), dim=join_dim)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        grad = torch.cat(exchange_parts(grad_outputs[0], ctx.join_dim, ctx.axis).unbind(0), dim=ctx.split_dim)
        return grad, None, None, None


def gather_parts(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """`all_gather` without autograd."""
    parts = torch.empty((axis.size * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
    gather_single(parts, x.contiguous(), group=axis.group)
    return parts if dim == 0 else torch.cat(parts.chunk(axis.size, 0), dim=dim)


def sum_parts(x: Tensor, dim: int, axis: Axis, bias: Tensor | None = None) -> Tensor:
    """`reduce_scatter` without autograd."""
    total, *others = exchange_parts(x, dim, axis).unbind(0)  # in rank order
    total = total.float() if total.dtype != torch.float32 else total.clone()
    for other in others:
        total += other
    if bias is not None:
        total += bias
    return total.to(x.dtype)


def total_parts(x: Tensor, axis: Axis, bias: Tensor | None = None) -> Tensor:
    """`all_reduce` without autograd: a reduce-scatter and an all-gather, so that all ranks get the same bits."""
    flat = x.reshape(-1, x.shape[-1])
    rows = -(-len(flat) // axis.size) * axis.size
    padded = flat if rows == len(flat) else torch.cat([flat, flat.new_zeros(rows - len(flat), flat.shape[1])])
    return gather_parts(sum_parts(padded, 0, axis, bias), 0, axis)[: len(flat)].view(x.shape)


def exchange_parts(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Send part r of `x` along `dim` to rank r; return the received parts, [axis.size, ...]."""
    if x.shape[dim] % axis.size:
        raise ValueError(f"cannot split {x.shape[dim]} into {axis.size} equal parts")
    sent = torch.stack(x.chunk(axis.size, dim))
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=axis.group)
    return got
