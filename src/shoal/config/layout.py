"""
The size of each parallel axis, and every rank's coordinates. Pure, no torch.

The axes, outermost first: `pp` (pipeline stages), `dp_replicate` (replicas), `dp_shard` (shards of the parameters),
`cp` (parts of a sequence), `tp` (parts of each matrix). Neighbors along `tp` have adjacent ranks, since they communicate
most.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, dataclass, fields
from typing import Final

from shoal.config.options import Parallel


@dataclass(frozen=True)
class Layout:
    """The sizes of the axes; their product is the number of processes."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return math.prod(astuple(self))

    @property
    def dp(self) -> int:
        """The data-parallel degree, over which a step's micro-batches are split."""
        return math.prod(getattr(self, name) for name in DATA_PARALLEL)

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of the model."""
        return self.pp * self.dp_shard * self.tp > 1

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the coordinate of `rank` on each axis."""
        places = {}
        for name in reversed(AXES):
            rank, places[name] = divmod(rank, getattr(self, name))
        return {name: places[name] for name in AXES}

    def rank(self, **coordinates: int) -> int:
        """Return the rank at these coordinates; the coordinate on an axis that is not given is 0."""
        found = 0
        for name in AXES:
            found = found * getattr(self, name) + coordinates.get(name, 0)
        return found

    def groups(self, *axes: str) -> list[list[int]]:
        """Return one list per group of ranks that differ only along `axes`, in order of their coordinates along `axes`."""
        fixed = [name for name in AXES if name not in axes]
        outer = itertools.product(*(range(getattr(self, name)) for name in fixed))
        inner = list(itertools.product(*(range(getattr(self, name)) for name in axes)))
        return [
            [self.rank(**dict(zip(fixed, o, strict=True)), **dict(zip(axes, i, strict=True))) for i in inner]
            for o in outer
        ]

    def group_of(self, rank: int, *axes: str) -> list[int]:
        """Return the list of `groups(*axes)` that has `rank`."""
        return next(ranks for ranks in self.groups(*axes) if rank in ranks)

    def __str__(self) -> str:
        """ "dp_shard 2 x tp 2"; "one process"."""
        named = [f"{name} {getattr(self, name)}" for name in AXES if getattr(self, name) > 1]
        return " x ".join(named) or "one process"


AXES = tuple(f.name for f in fields(Layout))
DATA_PARALLEL: Final = ("dp_replicate", "dp_shard")  # the axes that split a step's micro-batches, outermost first


def find_layout(parallel: Parallel, processes: int | None) -> Layout | str:
    """
    Return the requested layout on `processes` (None: as few as it needs), or the reason for rejecting it.

    An axis of -1 takes the remaining processes. If `dp_replicate` and another axis are -1, `dp_replicate` is 1.
    """
    sizes = {name: getattr(parallel, name) for name in AXES}
    if zeros := [name for name in AXES if sizes[name] == 0]:
        return f"parallel.{zeros[0]} is 0; set it to at least 1, or to -1 for the remaining processes"
    rest = [name for name in AXES if sizes[name] == -1]
    if len(rest) > 1 and "dp_replicate" in rest:
        rest.remove("dp_replicate")
        sizes["dp_replicate"] = 1
    if len(rest) > 1:
        return f"parallel.{rest[0]} and parallel.{rest[1]} are both -1 (the remaining processes); set one of them"
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"parallel.{name} {size}" for name, size in sizes.items() if size > 1) or "one process"
    if rest:
        if processes is not None and (processes < fixed or processes % fixed):
            near = sorted({max(1, processes // fixed) * fixed, (processes // fixed + 1) * fixed})
            return (
                f"{asked} needs a multiple of {fixed} processes, but launch.processes is {processes}; "
                f"set launch.processes to {' or '.join(map(str, near))}"
            )
        sizes[rest[0]] = 1 if processes is None else processes // fixed
    layout = Layout(**sizes)
    if processes is not None and layout.world_size != processes:
        return (
            f"{asked} needs {fixed} processes, but launch.processes is {processes}; remove launch.processes, or set "
            "parallel.dp_replicate to -1 (the remaining processes)"
        )
    return layout


def split_slots(slots: int, dp: int) -> list[range]:
    """Split a step's slots (micro-batches) into `dp` contiguous ranges; if `dp` does not divide them, the first get one more."""
    short, longer = divmod(slots, dp)
    starts = [part * short + min(part, longer) for part in range(dp + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]
