"""
Layers that both families share: float32 master weights, cast to the activations' dtype at each use.

This defines mixed precision in shoal (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1). A weight is cast at each
use, so its gradient arrives in float32. Products accumulate in float32 and round once; norms compute in float32 and
round once, at the end. Casting a whole block's weights in advance, as FSDP2 does, gives the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shoal.system.cpu import multiplies_best_with_onednn

ONEDNN: bool = (
    multiplies_best_with_onednn()
    and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]  # without MKL torch multiplies with another library
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
# oneDNN is faster from this number of multiplications on: each call costs 12 microseconds more (AMD EPYC, Zen 4).
ONEDNN_FROM: Final = 2**24


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """
    Return `F.linear(x, weight, bias)` of tensors of one dtype, by the faster of the CPU's libraries.

    torch multiplies float32 matrices with MKL. On AMD's CPUs with AVX-512, oneDNN takes 0.83 to 0.93 of the time for outputs
    and inputs' gradients. It is not faster for weights' gradients, for which the transposed gradient is copied first.
    """
    if (
        ONEDNN
        and not torch.compiler.is_compiling()  # the compiler chooses its own products
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() * len(weight) >= ONEDNN_FROM
    ):
        out: Tensor = _OneDnnLinear.apply(x.flatten(0, -2), weight, bias)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


class _OneDnnLinear(torch.autograd.Function):
    """The product that torch's compiler calls on CPUs, with a backward; x is [rows, inputs]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad_outputs[0]
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = torch.ops.mkldnn._linear_pointwise(grad, weight.t(), None, "none", [], "")
        if ctx.needs_input_grad[1]:
            d_weight = grad.t() @ x
        if ctx.needs_input_grad[2]:
            d_bias = grad.sum(0)
        return d_x, d_weight, d_bias


class Linear(nn.Module):
    """y_O = W_OI x_I (+ b_O) in the dtype of x."""

    # Whether gradients of inputs and weights are computed apart, as in a V-shaped pipeline schedule. A Python `Function`
    # would compute all of them each time: it does not learn which of them are asked for.
    splits_backward = False

    def __init__(self, in_dim: int, out_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, None if self.bias is None else self.bias.to(x.dtype))

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return W x + `bias`, which replaces the layer's own."""
        multiply = F.linear if self.splits_backward else linear
        return multiply(x, self.weight.to(x.dtype), bias)


class Embedding(nn.Module):
    """
    Embedding table; returns rows in the table's own dtype.

    The caller casts the result, so that a row's gradient is a float32 sum over all positions that used it.
    """

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016, arXiv:1607.06450). PyTorch's kernels compute in float32 on every device."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)


def multiplied(own: Tensor, by: Tensor) -> Tensor:
    """
    Return `own * by` in the memory of `own`, a temporary of the caller.

    Compiled code multiplies out of place: the compiler fuses the product anyway, and must not see the write. With torch
    2.11 a compiled `torch.autograd.Function` loses its backward, and gradients are zero, if two operations in its forward
    return one tensor object, the one that forward returns. This happens if the second works in place, or casts to the same
    dtype.
    """
    return own * by if torch.compiler.is_compiling() else own.mul_(by)


class RMSNorm(nn.Module):
    """RMS normalization (Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4): x / rms(x) * weight over the last dim."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.is_cuda:  # on CUDA F.rms_norm is one fused kernel, forward and backward
            return F.rms_norm(x, weight.shape, weight, self.eps)
        if not torch.is_grad_enabled():
            return _rms_norm(x, weight, self.eps)[0]
        # On CPUs F.rms_norm is a chain of eleven operators and their autograd: 1.4 to 2.4 times as slow.
        out: Tensor = _RMSNorm.apply(x, weight, self.eps)  # type: ignore[no-untyped-call]
        return out


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalized x, and each row's factor 1 / rms, float32."""
    # All operands have one dtype: mixed dtypes take PyTorch's slow path on CPUs.
    x32, weight32 = x.float(), weight.float()
    # torch.linalg.vector_norm reads x once and allocates no temporary of its size, unlike x.square().mean().
    rms = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square() / x.shape[-1]
    scale = torch.rsqrt(rms + eps)
    out = multiplied(x32 * scale, weight32)
    return out if out.dtype == x.dtype else out.to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in few passes over memory; saves only x and one number per row for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        dim, grad, weight32 = x.shape[-1], grad_outputs[0].float(), weight.float()
        normed = x.float() * scale
        product = grad * normed
        d_weight = product.flatten(0, -2).sum(0)
        # With n = x * scale: d_x = scale * (w g - n mean(w g n)). The output does not depend on the length of x, so the
        # gradient has no component along x.
        along = (product @ weight32).div_(dim).unsqueeze(-1)
        d_x = (grad * weight32).sub_(normed.mul_(along)).mul_(scale)
        return d_x.to(x.dtype), d_weight.to(weight.dtype), None


@contextlib.contextmanager
def products_by_quarters() -> Iterator[None]:
    """
    Compute each linear layer as four products, of each half of the inputs with each half of the outputs, and add them.

    These are the same sums, rounded differently: the change of the results measures the effect of rounding alone.
    """
    kinds: tuple[Any, ...] = (Linear, nn.Linear)  # shoal's Linear, and the one in transformers' models
    plain = [kind.forward for kind in kinds]

    def forward(self: Linear, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        inputs, outputs = weight.shape[1] // 2, weight.shape[0] // 2
        halves = []
        for rows in (weight[:outputs], weight[outputs:]):
            first, second = F.linear(x[..., :inputs], rows[:, :inputs]), F.linear(x[..., inputs:], rows[:, inputs:])
            halves.append((first.float() + second.float()).to(x.dtype))
        out = torch.cat(halves, dim=-1)
        return out if self.bias is None else out + self.bias.to(x.dtype)

    for kind in kinds:
        kind.forward = forward
    try:
        yield
    finally:
        for kind, before in zip(kinds, plain, strict=True):
            kind.forward = before
