"""
Checkpoints in the memory of machines: which ranks share a folder, and which checkpoints belong to the run's history.

On a shared disk, every checkpoint found belongs to the run. In memory this does not hold: each machine has a folder of its
own, and a machine that left and came back may hold checkpoints of steps that the others have since repeated. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from shoal.checkpoint.saved import Saved, shard_of

_ANCESTORS: Final = 8  # generations kept in the history: more than the checkpoints kept in memory


@dataclass(frozen=True)
class FolderGroup:
    """
    The ranks that write to the same folder as `rank`, and the number of folders in all.

    leaders: for each rank of the world, the lowest rank that sees the same folder.
    """

    rank: int
    leaders: tuple[int, ...]

    @classmethod
    def shared_by_all(cls, rank: int, world_size: int) -> FolderGroup:
        """Return the group of a folder that all ranks see."""
        return cls(rank, (0,) * world_size)

    @classmethod
    def from_visible(cls, rank: int, seen: Sequence[list[int]]) -> FolderGroup | None:
        """Build the group from the list of ranks that each rank sees, itself included; None if the lists disagree."""
        found = cls(rank, tuple(min(sees, default=r) for r, sees in enumerate(seen)))
        return found if all(seen[r] == ranks for ranks in found.groups for r in ranks) else None

    @cached_property
    def groups(self) -> list[list[int]]:
        """The ranks of each folder."""
        return [[r for r, f in enumerate(self.leaders) if f == first] for first in sorted(set(self.leaders))]

    @cached_property
    def ranks(self) -> list[int]:
        """The ranks that share this rank's folder."""
        return next(ranks for ranks in self.groups if self.rank in ranks)

    @property
    def index(self) -> int:
        """The position of this rank in `ranks`."""
        return self.ranks.index(self.rank)

    @property
    def is_leader(self) -> bool:
        """Whether this is the folder's lowest rank, which alone writes manifests and removes checkpoints."""
        return self.index == 0

    @property
    def count(self) -> int:
        """The number of folders."""
        return len(self.groups)


@dataclass
class MemoryTier:
    """
    The checkpoints in memory, and the history of the run that decides which of them count.

    A generation is one start of the run's processes. generations: the generations in the run's history, oldest first, each
    with its last valid step (None: all are valid). For example, {"a": 6, "b": None} means generation a's checkpoints up to
    step 6, from which b resumed, and all of b's. generation: the generation of these processes, set by `begin_generation`.
    group: the ranks that see this rank's folder. layout_key: describes which parts of the tensors each rank holds.
    """

    group: FolderGroup
    layout_key: str
    generations: Mapping[str, int | None]
    generation: str = ""

    def begin_generation(self, generation: str, newest: Saved | None) -> None:
        """Add `generation` to the history that led to `newest`, the checkpoint it resumes from; drop all other generations."""
        origin = newest.save_id.generation if newest and newest.save_id else ""
        names = list(self.generations)
        led = {name: self.generations[name] for name in names[: names.index(origin) + 1]} if origin in names else {}
        if newest and led:
            led[origin] = newest.step
        self.generation, self.generations = generation, {**dict(list(led.items())[-_ANCESTORS:]), generation: None}

    def is_current(self, saved: Saved) -> bool:
        """Return whether this checkpoint is in the run's history."""
        if saved.save_id is None or saved.save_id.generation not in self.generations:
            return False
        last = self.generations[saved.save_id.generation]
        return last is None or saved.step <= last

    def can_read(self, saved: Saved) -> bool:
        """Return whether this rank can load `saved`: its tensors are whole, or this rank wrote the parts it holds now."""
        assert saved.save_id is not None
        if not saved.save_id.layout_key:
            return True
        return saved.save_id.layout_key == self.layout_key and shard_of(saved.folder, self.group.rank).is_file()
