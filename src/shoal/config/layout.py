"""
How many processes stand along each axis, and where each one is. Pure, no torch.

The axes, outermost first: `pp` (pipeline stages), `dp_replicate` (copies of the model), `dp_shard` (the model cut
into so many shards), `cp` (parts of a sequence), `tp` (parts of each matrix). Neighbours along `tp` have neighbouring
ranks, since they talk most.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import astuple, dataclass, fields

from shoal.config.options import Parallel


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; their product is the number of processes."""

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
        """Parts a step's micro-batches are dealt to."""
        return self.dp_replicate * self.dp_shard

    @property
    def sharded(self) -> bool:
        """Whether a process holds less than the whole model."""
        return self.pp * self.dp_shard * self.tp > 1

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` stands on each axis."""
        places = {}
        for name in reversed(AXES):
            rank, places[name] = divmod(rank, getattr(self, name))
        return {name: places[name] for name in AXES}

    def rank(self, **coordinates: int) -> int:
        """The rank at these coordinates; axes that are left out are at 0."""
        found = 0
        for name in AXES:
            found = found * getattr(self, name) + coordinates.get(name, 0)
        return found

    def groups(self, *axes: str) -> list[list[int]]:
        """The ranks that differ along `axes` alone, in order of their coordinates there: a list for each group."""
        fixed = [name for name in AXES if name not in axes]
        outer = itertools.product(*(range(getattr(self, name)) for name in fixed))
        inner = list(itertools.product(*(range(getattr(self, name)) for name in axes)))
        return [
            [self.rank(**dict(zip(fixed, o, strict=True)), **dict(zip(axes, i, strict=True))) for i in inner]
            for o in outer
        ]

    def __str__(self) -> str:
        """ "dp_shard 2 x tp 2"; "one process"."""
        named = [f"{name} {getattr(self, name)}" for name in AXES if getattr(self, name) > 1]
        return " x ".join(named) or "one process"


AXES = tuple(f.name for f in fields(Layout))


def find_layout(parallel: Parallel, processes: int | None) -> Layout | str:
    """
    The layout that is asked for on `processes` (None: as few as it needs), or why there is none.

    One axis may be -1, what remains; `dp_replicate` is, unless another one is.
    """
    sizes = {name: getattr(parallel, name) for name in AXES}
    if zeros := [name for name in AXES if sizes[name] == 0]:
        return f"parallel.{zeros[0]} is at least 1, or -1 for what remains, not 0"
    rest = [name for name in AXES if sizes[name] == -1]
    if len(rest) > 1 and "dp_replicate" in rest:
        rest.remove("dp_replicate")
        sizes["dp_replicate"] = 1
    if len(rest) > 1:
        return f"parallel.{rest[0]} and parallel.{rest[1]} are both -1 (what remains); set one of them"
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"parallel.{name} {size}" for name, size in sizes.items() if size > 1) or "one process"
    if rest:
        if processes is not None and (processes < fixed or processes % fixed):
            near = sorted({max(1, processes // fixed) * fixed, (processes // fixed + 1) * fixed})
            return (
                f"{asked} needs a multiple of {fixed} processes, and launch.processes is {processes}; "
                f"set launch.processes to {' or '.join(map(str, near))}"
            )
        sizes[rest[0]] = 1 if processes is None else processes // fixed
    layout = Layout(**sizes)
    if processes is not None and layout.world_size != processes:
        return (
            f"{asked} needs {fixed} processes, launch.processes is {processes}; leave launch.processes out, or set "
            "parallel.dp_replicate to -1 (what remains)"
        )
    return layout


def split_slots(slots: int, dp: int) -> list[range]:
    """A step's slots (micro-batches) dealt to `dp` parts: contiguous, the first ones a slot longer where it must be."""
    short, longer = divmod(slots, dp)
    starts = [part * short + min(part, longer) for part in range(dp + 1)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]
