"""
A shape -> a model on the meta device, and its initial weights.

**Initial weights do not depend on the layout.** Row r of a parameter is a function of (seed, the parameter's global
name, r) and nothing else: its numbers come from a generator of its own. A rank draws the rows it holds; 1 process
and 64 start from the same bits. It is always the CPU's generator that draws, whatever device the weights go to.
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

# Fills `out` with a region of the parameter `name`, `shape` as a whole: fill(out, name, shape, slices).
Fill = Callable[[Tensor, str, tuple[int, ...], tuple[slice, ...]], None]
MASK32 = (1 << 32) - 1


def build_model(model: Model, *, compute_dtype: torch.dtype) -> LanguageModel:
    """
    The model on the meta device: shapes and names, no memory. `initialize` gives it weights.

    Raises ValueError if `model.vocab_size` is still null.
    """
    shape = resolve_shape(model)
    if shape.vocab_size is None:
        raise ValueError("model.vocab_size is null: take it from the tokenizer before building")
    family = FAMILIES[shape.family]
    module, _, name = family.code.partition(".")
    kind = getattr(importlib.import_module(f"shoal.models.{module}"), name)  # transformers is an extra, slow to import
    with torch.device("meta") if family.native else nullcontext():
        built: LanguageModel = kind(shape, compute_dtype)
    return built


def initial_weights(model: LanguageModel, seed: int) -> Fill:
    """What a model starts from where nothing else is said."""

    def fill(out: Tensor, name: str, shape: tuple[int, ...], slices: tuple[slice, ...]) -> None:
        draw_region(out, model.initial(name, model.shape), seed, name, shape, slices)

    return fill


def materialize(model: LanguageModel, fill: Fill, device: torch.device | str) -> None:
    """Give a whole model on meta its memory on `device`, and its weights."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fill(parameter, name, tuple(parameter.shape), tuple(slice(0, size) for size in parameter.shape))


def initialize(model: LanguageModel, seed: int, device: torch.device | str) -> None:
    """Give a model on meta its memory on `device`, and its initial weights."""
    materialize(model, initial_weights(model, seed), device)


def draw_rows(
    initial: Initial, seed: int, name: str, shape: torch.Size | tuple[int, ...], start: int, stop: int
) -> Tensor:
    """Rows [start, stop) along the first dim of a parameter of this whole shape; float32, on the CPU."""
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
    Fill `out` with a region of a parameter of this whole shape: `slices` of it, rows first.

    A few rows at a time, so that a process that holds some columns never holds all of them.
    """
    first, stop, _ = slices[0].indices(shape[0])
    for start in range(first, stop, ROWS_AT_A_TIME):
        rows = draw_rows(initial, seed, name, shape, start, min(start + ROWS_AT_A_TIME, stop))
        out[start - first : start - first + len(rows)].copy_(rows[(slice(None), *slices[1:])])


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4).digest(), "little")


def _row_seed(key: int, row: int) -> int:
    """32 bits, all that the CPU's Mersenne Twister takes of a seed. Two rows of a parameter never share one."""
    return _mix32(_mix32(row) ^ key)


def _mix32(value: int) -> int:
    """MurmurHash3's finalizer (fmix32): one-to-one on 32 bits, and neighbours end far apart."""
    value ^= value >> 16
    value = value * 0x85EBCA6B & MASK32
    value ^= value >> 13
    value = value * 0xC2B2AE35 & MASK32
    return value ^ (value >> 16)
