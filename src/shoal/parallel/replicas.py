"""Check that all ranks that hold the same shard of a model hold the same bits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Part, Region


@dataclass(frozen=True)
class Mismatch:
    """A tensor whose replicas differ."""

    name: str
    ranks: tuple[int, ...]  # the ranks of the minority; all ranks that hold the tensor, if there is no majority


def has_replicas(mesh: Mesh) -> bool:
    """Return whether any shard is held by several ranks: fully sharded weights have nothing to compare."""
    return mesh.axis("batch").size > mesh.axis("shard").size


def compare(parts: Mapping[str, Part], mesh: Mesh) -> list[Mismatch]:
    """
    Return the tensors whose replicas differ in the sum of their elements, read as integers: one flipped bit changes the sum.

    Reads each part once. A collective over the world; the host waits for the device.
    """
    names = list(parts)
    sums = [_sum_of_bits(parts[name].tensor) for name in names]
    mine: dict[tuple[str, Region], int] = {}
    if sums:
        values = torch.stack(sums).tolist()
        mine = {(n, parts[n].region): v for n, v in zip(names, values, strict=True)}
    held: defaultdict[tuple[str, Region], dict[int, int]] = defaultdict(dict)
    for rank, theirs in enumerate(mesh.gather_objects(mine)):
        for key, value in theirs.items():
            held[key][rank] = value
    return [Mismatch(name, _outvoted(by_rank)) for (name, _), by_rank in held.items() if len(set(by_rank.values())) > 1]


def _outvoted(by_rank: Mapping[int, int]) -> tuple[int, ...]:
    (most, count), *_ = Counter(by_rank.values()).most_common()
    if 2 * count <= len(by_rank):
        return tuple(by_rank)
    return tuple(rank for rank, value in by_rank.items() if value != most)


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(words).sum(dtype=torch.int64)
