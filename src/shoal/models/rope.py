"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864, section 3.2), pairing x[i] with x[i + d/2] as Llama does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from shoal.config.options import Model

Rope = tuple[Tensor, Tensor]  # cosines [B or 1, T, 1, head_dim], sines [B or 1, T, 1, head_dim / 2]


def inverse_frequencies(model: Model, device: torch.device) -> Tensor:
    """
    Return each pair's angle per position, theta^(-2i/d) radians, [head_dim / 2], float32; with Llama 3's scaling if set.

    The angles are computed at each use. A buffer of them would be uninitialized after moving from the meta device.
    """
    assert model.head_dim is not None
    exponents = torch.arange(0, model.head_dim, 2, device=device, dtype=torch.float32) / model.head_dim
    turns = 1.0 / model.rope_theta**exponents
    return turns if model.rope_factor is None else _scale_llama3(turns, model, model.rope_factor)


def _scale_llama3(turns: Tensor, model: Model, factor: float) -> Tensor:
    """
    Divide low frequencies by `factor`, keep high ones, and interpolate between.

    Llama 3.1's rule: meta-llama/llama-models, `models/llama3/model.py`, `apply_scaling`. Low frequencies make less than a
    few turns in the original context, so longer texts would show the model angles it was not trained on.
    """
    low, high = model.rope_low_freq_factor, model.rope_high_freq_factor
    # full turns of each pair in the context of the original training
    rounds = model.rope_original_seq_len * turns / (2 * math.pi)
    kept = ((rounds - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * turns / factor + kept * turns


def rope_tables(model: Model, positions: Tensor, dtype: torch.dtype) -> Rope:
    """Return cosines and sines for positions [T] or [B, T]: float32 angles, rounded once to `dtype`."""
    angles = positions.float().unsqueeze(-1) * inverse_frequencies(model, positions.device)
    angles = angles.unsqueeze(-2) if positions.ndim == 2 else angles[None, :, None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), sin


def rotate(x_BTHd: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair (x[i], x[i + d/2]) by its position's angle."""
    if not torch.is_grad_enabled():  # for a single token a Function's overhead matters
        return _turn(x_BTHd, *rope, 1.0)
    out: Tensor = _Rotate.apply(x_BTHd, *rope)  # type: ignore[no-untyped-call]
    return out


class _Rotate(torch.autograd.Function):
    """Rotation whose backward rotates by the negative angle. It adds in place, which saves a third of the memory passes."""

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
    # (a, b) -> (a cos - b sin, b cos + a sin) for the pair a = x[i], b = x[i + d/2]. These in-place writes are safe to
    # compile, unlike those that `multiplied` avoids: they return views, so only the product has returned `out` itself.
    # With torch 2.11 compiled gradients equal eager ones, with aot_eager and inductor.
    out = x * cos
    out[..., :half].addcmul_(second, sin, value=-sign)
    out[..., half:].addcmul_(first, sin, value=sign)
    return out
