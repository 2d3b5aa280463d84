"""
What must be known of checkpoints in the memory of machines: who sees which, and whether they are still of this run.

On a disk that all see, a folder speaks for itself. Memory does not: each machine has its own, and one that was away for a
while may have steps that the others have taken again since. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from shoal.checkpoint.saved import Saved, shard_of

_ANCESTORS: Final = 8  # there are no more checkpoints in memory than that


@dataclass(frozen=True)
class FolderGroup:
    """
    Those that write to the same folder as `rank`, and how many folders there are in all.

    leaders: for each process of the world, the first one that sees what it sees.
    """

    rank: int
    leaders: tuple[int, ...]

    @classmethod
    def shared_by_all(cls, rank: int, world_size: int) -> FolderGroup:
        return cls(rank, (0,) * world_size)

    @classmethod
    def from_visible(cls, rank: int, seen: Sequence[list[int]]) -> FolderGroup | None:
        """From which processes each one sees, itself among them; None where they do not see each other alike."""
        found = cls(rank, tuple(min(sees, default=r) for r, sees in enumerate(seen)))
        return found if all(seen[r] == ranks for ranks in found.groups for r in ranks) else None

    @cached_property
    def groups(self) -> list[list[int]]:
        """The processes of each folder."""
        return [[r for r, f in enumerate(self.leaders) if f == first] for first in sorted(set(self.leaders))]

    @cached_property
    def ranks(self) -> list[int]:
        """The processes of this one's folder."""
        return next(ranks for ranks in self.groups if self.rank in ranks)

    @property
    def index(self) -> int:
        """The place of this process among them."""
        return self.ranks.index(self.rank)

    @property
    def is_leader(self) -> bool:
        """True on the one that does in a folder what is done once."""
        return self.index == 0

    @property
    def count(self) -> int:
        return len(self.groups)


@dataclass
class MemoryTier:
    """
    group: who sees this process's folder; cut: what decides which parts of the tensors a process holds, in words;
    generations: whose checkpoints are of this run, in order, and up to which step. {"a": 6, "b": None}: those of the processes
    a up to step 6, from which b went on, and all of b's. generation: of these processes, once they have begun.
    """

    group: FolderGroup
    layout_key: str
    generations: Mapping[str, int | None]
    generation: str = ""

    def begin_generation(self, generation: str, newest: Saved | None) -> None:
        """What these processes write is of this run, and what led to `newest`, from which they go on; nothing else is."""
        origin = newest.save_id.generation if newest and newest.save_id else ""
        names = list(self.generations)
        led = {name: self.generations[name] for name in names[: names.index(origin) + 1]} if origin in names else {}
        if newest and led:
            led[origin] = newest.step
        self.generation, self.generations = generation, {**dict(list(led.items())[-_ANCESTORS:]), generation: None}

    def is_current(self, saved: Saved) -> bool:
        """Whether the run as it is went through this checkpoint."""
        if saved.save_id is None or saved.save_id.generation not in self.generations:
            return False
        last = self.generations[saved.save_id.generation]
        return last is None or saved.step <= last

    def can_read(self, saved: Saved) -> bool:
        """Whether this process finds its parts there: all is whole, or it wrote what it holds itself."""
        assert saved.save_id is not None
        if not saved.save_id.layout_key:
            return True
        return saved.save_id.layout_key == self.layout_key and shard_of(saved.folder, self.group.rank).is_file()
