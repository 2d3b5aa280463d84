"""Regions of parameters. Optimizer and checkpoints work on regions, so they need not know the parallel layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn


@dataclass(frozen=True)
class Region:
    """A box of `sizes` elements at `offsets` in a tensor of `shape`."""

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
        """Return the region as an index into the whole tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def chunk(self, dim: int, index: int, count: int) -> Region:
        """
        Return chunk `index` of `count` along `dim`, split as `torch.chunk` does.

        Chunks have length ceil(size / count); the last ones may be shorter or empty.
        """
        length = -(-self.sizes[dim] // count)
        start = min(index * length, self.sizes[dim])
        stop = min(start + length, self.sizes[dim])
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dim], sizes[dim] = offsets[dim] + start, stop - start
        return replace(self, offsets=tuple(offsets), sizes=tuple(sizes))


class Part(NamedTuple):
    """A region of a named tensor, and the tensor with its elements, which a checkpoint saves or fills."""

    region: Region
    tensor: torch.Tensor

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> Part:
        return cls(Region.whole(tensor.shape), tensor)


@dataclass(eq=False)
class Shard:
    """
    This rank's part of one parameter.

    `tensor` is a plain float32 tensor of the region's sizes that shares memory with `parameter`. The optimizer updates it
    with `tensor.grad`. `counted` is true on exactly one of the ranks that hold this region, so that a sum over the counted
    shards of all ranks includes each element once.
    """

    name: str  # global: the name in the unwrapped, unsharded model
    region: Region
    tensor: torch.Tensor
    parameter: nn.Parameter
    counted: bool = True
    summed_over_tp: bool = False  # whether the parameter is replicated over `tp` with a partial gradient on each rank
    twin: bool = False  # whether the parameter is the last pipeline stage's copy of a tied embedding
