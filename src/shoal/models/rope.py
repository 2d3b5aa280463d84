"""Rotary position embedding: Su et al. 2021 (arXiv:2104.09864), in Llama's layout (first half with second half)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shoal.config.options import Model

Rope = tuple[Tensor, Tensor]  # cosines [B or 1, T, 1, head_dim], sines [B or 1, T, 1, head_dim / 2]


def inverse_frequencies(model: Model, device: torch.device) -> Tensor:
    """
    Radians a position turns each pair, [head_dim / 2], float32; with Llama 3's scaling where the model asks for it.

    Computed where it is used, and never stored: it cannot be left uninitialised by a move from the meta device.
    """
    assert model.head_dim is not None
    exponents = torch.arange(0, model.head_dim, 2, device=device, dtype=torch.float32) / model.head_dim
    turns = 1.0 / model.rope_theta**exponents
    return turns if model.rope_factor is None else _scale_llama3(turns, model, model.rope_factor)


def _scale_llama3(turns: Tensor, model: Model, factor: float) -> Tensor:
    """
    Slow pairs turn `factor` times slower, fast ones stay, those between are blended.

    Llama 3.1's rule: meta-llama/llama-models, `models/llama3/model.py`, `apply_scaling`.
    """
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    # how often a pair turns round in the context the model was first trained at
    rounds = model.rope_original_seq_len * turns / (2 * math.pi)
    kept = ((rounds - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * turns / factor + kept * turns


def rope_tables(model: Model, positions: Tensor, dtype: torch.dtype) -> Rope:
    """Tables for positions [T] or [B, T]: angles in float32, then rounded once to `dtype`."""
    angles = positions.float().unsqueeze(-1) * inverse_frequencies(model, positions.device)
    angles = angles.unsqueeze(-2) if positions.ndim == 2 else angles[None, :, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), sin


def rotate(x_BTHd: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle."""
    if not torch.is_grad_enabled():  # what a Function costs beside the arithmetic counts for one token
        return _turn(x_BTHd, *rope, 1.0)
    out: Tensor = _Rotate.apply(x_BTHd, *rope)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """Backward turns the other way; doing it in place saves a third of the passes over memory, both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad_outputs[0], cos, sin, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    # Compiled too, unlike what `multiplied` avoids: the writes return views, and no operation but the product returned
    # `out` itself. Seen with torch 2.11: the compiled gradients are eager's, with aot_eager and inductor alike.
    out = x * cos
    out[..., :half].addcmul_(second, sin, value=-sign)
    out[..., half:].addcmul_(first, sin, value=sign)
    return out
