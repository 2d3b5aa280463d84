"""Which processes see the same folder: all of them on a shared disk, those of one machine in its memory. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Sharers:
    """
    Those that write to the same folder as `rank`, and how many folders there are in all.

    firsts: for each process of the world, the first one that sees what it sees.
    """

    rank: int
    firsts: tuple[int, ...]

    @classmethod
    def all(cls, rank: int, world_size: int) -> Sharers:
        return cls(rank, (0,) * world_size)

    @classmethod
    def of(cls, rank: int, seen: Sequence[list[int]]) -> Sharers | None:
        """From which processes each one sees, itself among them; None where they do not see each other alike."""
        found = cls(rank, tuple(min(sees, default=r) for r, sees in enumerate(seen)))
        return found if all(seen[r] == ranks for ranks in found.groups for r in ranks) else None

    @cached_property
    def groups(self) -> list[list[int]]:
        """The processes of each folder."""
        return [[r for r, f in enumerate(self.firsts) if f == first] for first in sorted(set(self.firsts))]

    @cached_property
    def ranks(self) -> list[int]:
        """The processes of this one's folder."""
        return next(ranks for ranks in self.groups if self.rank in ranks)

    @property
    def index(self) -> int:
        """The place of this process among them."""
        return self.ranks.index(self.rank)

    @property
    def is_first(self) -> bool:
        """True on the one that does in a folder what is done once."""
        return self.index == 0

    @property
    def folders(self) -> int:
        return len(self.groups)
