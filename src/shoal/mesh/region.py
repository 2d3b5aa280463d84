"""Which part of a parameter a process holds: the noun that lets optimizer and checkpoints know nothing of layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class Region:
    """A box in a tensor of `shape`: it begins at `offsets` and is `sizes` large."""

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Region:
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def is_whole(self) -> bool:
        return self.sizes == self.shape

    @property
    def slices(self) -> tuple[slice, ...]:
        """As an index into the whole tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def chunk(self, dim: int, index: int, count: int) -> Region:
        """Chunk `index` of `count` along `dim`, as `torch.chunk` cuts: ceil(size / count) long, later ones shorter."""
        length = -(-self.sizes[dim] // count)
        start = min(index * length, self.sizes[dim])
        stop = min(start + length, self.sizes[dim])
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dim], sizes[dim] = offsets[dim] + start, stop - start
        return replace(self, offsets=tuple(offsets), sizes=tuple(sizes))


class Part(NamedTuple):
    """A region, and what is in it: what a checkpoint writes, or fills."""

    region: Region
    tensor: torch.Tensor

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Part:
        return cls(Region.whole(tensor.shape), tensor)


@dataclass(eq=False)
class Shard:
    """
    What this process holds of one parameter.

    `tensor` shares its memory with `parameter`, is plain, float32, of the region's sizes, and is what the optimizer
    updates, with `tensor.grad` as its gradient. `counted` is true on exactly one of the processes that hold this
    region, so that a sum over counted shards of all processes sees each element once.
    """

    name: str  # global: the name in the unwrapped, uncut model
    region: Region
    tensor: torch.Tensor
    parameter: nn.Parameter
    counted: bool = True
    summed_over_tp: bool = False  # whole on each process of `tp`, with a part of the gradient on each
    twin: bool = False  # the last pipeline stage's copy of an embedding that the first one holds too
