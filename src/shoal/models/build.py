"""
Models on the meta device, and their initial weights.

**Initial weights do not depend on the layout.** Row r of a parameter is a function of (seed, the parameter's global
name, r) only: each row has its own generator. A rank draws only the rows it holds; runs on 1 and on 64 ranks start from
the same bits. The CPU's generator draws the numbers, whatever the device.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from shoal.config.families import FAMILIES
from shoal.config.options import Model
from shoal.config.presets import resolve_shape
from shoal.models.family import Initial, LanguageModel

ROWS_AT_A_TIME = 1024
COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  # of `train.dtype`

# Fills `out` with the region `slices` of the parameter `name` of unsharded `shape`: fill(out, name, shape, slices).
Fill = Callable[[Tensor, str, tuple[int, ...], tuple[slice, ...]], None]
MASK32 = (1 << 32) - 1


def build_model(model: Model, *, compute_dtype: torch.dtype) -> LanguageModel:
    """
    Build the model on the meta device: shapes and names, without memory. `initialize` gives it weights.

    Raises ValueError if `model.vocab_size` is still null.
    """
    shape = resolve_shape(model)
    if shape.vocab_size is None:
        raise ValueError("model.vocab_size is null: take it from the tokenizer before building")
    family = FAMILIES[shape.family]
    module, _, name = family.code.partition(".")
    # imported only if used: transformers is optional, and slow to import
    kind = getattr(importlib.import_module(f"shoal.models.{module}"), name)
    with torch.device("meta") if family.native else nullcontext():
        built: LanguageModel = kind(shape, compute_dtype)
    return built


def initial_weights(model: LanguageModel, seed: int) -> Fill:
    """Return a `Fill` with random initial weights."""

    def fill(out: Tensor, name: str, shape: tuple[int, ...], slices: tuple[slice, ...]) -> None:
        draw_region(out, model.initial(name, model.shape), seed, name, shape, slices)

    return fill


def materialize(model: LanguageModel, fill: Fill, device: torch.device | str) -> None:
    """Allocate an unsharded model on `device` and fill it with weights."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(parameter, name, tuple(parameter.shape), tuple(slice(0, size) for size in parameter.shape))


def initialize(model: LanguageModel, seed: int, device: torch.device | str) -> None:
    """Allocate an unsharded model on `device` and fill it with initial weights."""
    materialize(model, initial_weights(model, seed), device)


def draw_rows(
    initial: Initial, seed: int, name: str, shape: torch.Size | tuple[int, ...], start: int, stop: int
) -> Tensor:
    """Draw rows [start, stop) along the first dim of a parameter of unsharded `shape`; float32, on the CPU."""
    rows = torch.empty((stop - start, *shape[1:]))
    match initial.kind:
        case "zeros":
            return rows.zero_()
        case "ones":
            return rows.fill_(1.0)
        case "normal":
            generator, key = torch.Generator(), _key(seed, name)
            for index, row in enumerate(rows.unbind(0), start):
                generator.manual_seed(_row_seed(key, index))
                row.normal_(0.0, initial.std, generator=generator)
            return rows


def draw_region(
    out: Tensor, initial: Initial, seed: int, name: str, shape: torch.Size | tuple[int, ...], slices: tuple[slice, ...]
) -> None:
    """
    Fill `out` with the region `slices` (one slice per dim) of a parameter of unsharded `shape`.

    Draws a few whole rows at a time: a rank that holds only some columns never allocates all columns of all its rows.
    """
    first, stop, _ = slices[0].indices(shape[0])
    for start in range(first, stop, ROWS_AT_A_TIME):
        rows = draw_rows(initial, seed, name, shape, start, min(start + ROWS_AT_A_TIME, stop))
        out[start - first : start - first + len(rows)].copy_(rows[(slice(None), *slices[1:])])


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "little")


def _row_seed(key: int, row: int) -> int:
    """Return a row's seed: 32 bits, as many as the CPU's Mersenne Twister uses. It is unique within a parameter."""
    return _mix32(_mix32(row) ^ key)


def _mix32(value: int) -> int:
    """Mix 32 bits by MurmurHash3's finalizer (fmix32): a bijection that sends neighboring rows to unrelated seeds."""
    value ^= value >> 16
    value = value * 0x85EBCA6B & MASK32
    value ^= value >> 13
    value = value * 0xC2B2AE35 & MASK32
    return value ^ (value >> 16)
