"""
Checkpoints while a run goes on: staged, written by a thread, and there all at once or not at all.

A save has three parts. `begin` copies what this process is to write (all that the step waits for); a thread
writes it aside, flushes it, hashes it and reads it back; and when every process has done so, the first one
writes the manifest and renames the folder into its place. Processes tell each other how far they are in the sum that a
step takes anyway: `votes` go in, `advance` gets what came out. So no step waits for a disk, and all know at the same
step whether a save is there.

A folder may be one for all, or one on each machine, in its memory: then the first process of each does what is done
once, and a checkpoint is there when it is on all machines.

What fails costs this checkpoint and nothing else. Nothing here is ever pickled or unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from shoal.checkpoint.commit import leave_receipt, write_manifest
from shoal.checkpoint.memory_tier import FolderGroup, MemoryTier
from shoal.checkpoint.newest import choose, point_to_latest, replicate
from shoal.checkpoint.planner import share_out
from shoal.checkpoint.restore import read_into, read_own
from shoal.checkpoint.saved import (
    FORMAT,
    Saved,
    SaveId,
    discard,
    folder_of,
    listed,
    read_state,
    shard_of,
)
from shoal.checkpoint.shard_file import ShardItem, write_shard
from shoal.checkpoint.staging import Staging, copy_all
from shoal.errors import CheckpointError
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Part
from shoal.system.disk import replace_folder, sync

VOTES: Final = 3  # numbers of `votes`


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the last so many, those of each so many steps (0: none), the best."""

    last: int = 2
    every: int = 0
    best: bool = True

    def steps(self, saved: Sequence[Saved], newest: int | None = None) -> set[int]:
        """Which steps stay of those `saved`, oldest first. newest: count the last ones from this step back."""
        last = [s.step for s in saved if newest is None or s.step <= newest]
        kept = set(last[-self.last :])
        if self.every:
            kept |= {s.step for s in saved if s.step % self.every == 0}
        judged = [s for s in saved if s.val_loss is not None]
        if self.best and judged:
            kept.add(min(judged, key=lambda s: (s.val_loss, s.step)).step)
        return kept


@dataclass(frozen=True)
class Outcome:
    """What became of a save."""

    step: int
    seconds: float  # from its beginning
    problem: str = ""  # why it is not there

    @property
    def ok(self) -> bool:
        return not self.problem


@dataclass
class _Save:
    """One that is under way."""

    serial: int
    step: int
    aside: Path
    state: dict[str, Any]
    read_back: bool
    begun: float = field(default_factory=time.perf_counter)
    thread: threading.Thread | None = None
    written: bool = False  # this process's part
    committed: bool = False  # by the first process of its folder
    committing: bool = False
    error: Exception | None = None


class CheckpointStore:
    """
    The checkpoints of one run. Its methods are called by all processes, at the same steps.

    memory: of a folder in memory, that need not outlive the machine; others are flushed and read back.
    `at(phase)` is called when a save comes to stage, write, manifest, rename, retention.
    """

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        *,
        keep: Keep = Keep(),
        memory: MemoryTier | None = None,
        at: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self.folder, self._mesh, self._keep, self._memory, self._at = folder, mesh, keep, memory, at
        self.folder_group = memory.group if memory else FolderGroup.shared_by_all(mesh.place.rank, mesh.world_size)
        self._last: int | None = None  # the step of the newest that all know of
        self._serial = 0
        self._save: _Save | None = None
        self._tidying: threading.Thread | None = None  # after a save that is over
        self._mine: list[str] | None = None  # the parts that this process writes
        self._whole = True  # whether each folder has all of every tensor
        self._staging: Staging | None = None
        if self.folder_group.is_leader:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.glob(".*"):  # of a save or a removal that was cut short
                    shutil.rmtree(leftover, ignore_errors=True)
        mesh.barrier()

    @property
    def last_step(self) -> int | None:
        """Of the newest checkpoint that all know of."""
        return self._last

    # --- saving --------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way: the same on all processes between two steps."""
        return self._save is not None

    def begin(self, parts: Mapping[str, Part], state: Mapping[str, Any], *, read_back: bool = True) -> bool:
        """
        Begin to save step `state["step"]`; whether it was begun: not where it is there, or another is under way.

        `parts` may change as soon as it returns. read_back: from the disk, before it counts as written. A collective over
        the world, at the first call alone.
        """
        step = int(state["step"])
        if self._save is not None or step == self._last:
            return False
        self._share(parts)
        self._serial += 1
        aside = self.folder / f".step-{step:08d}.{self._serial}.tmp"
        # the only checkpoint is never replaced by one that was not read
        careful = self._memory is None and (read_back or self._keep.last == 1)
        state = {"format": FORMAT, **state}
        if self._memory:
            layout_key = "" if self._whole else self._memory.layout_key
            state |= SaveId(self._memory.generation, self._serial, layout_key).to_state()
        self._save = save = _Save(self._serial, step, aside, state, careful)
        try:
            items, copied = self._stage(parts)
        except Exception as error:  # told to all by the next votes
            save.error = error
            return True
        save.thread = threading.Thread(target=self._write, args=(save, items, copied), name="save", daemon=True)
        save.thread.start()
        return True

    def prepare(self, parts: Mapping[str, Part]) -> None:
        """
        Ask for the memory that a save takes, so that the first one need not wait for it. A collective over the world, at the
        first call of this or of `begin`.
        """
        own = [parts[name].tensor for name in self._share(parts)]
        if self._staging is None:
            with contextlib.suppress(RuntimeError, MemoryError):  # no room now: a save tries again, and says so
                self._staging = Staging(own)

    def own_bytes(self, parts: Mapping[str, Part]) -> int:
        """What this process writes in a save. A collective over the world, at the first call of this or of `begin`."""
        return sum(parts[name].tensor.nbytes for name in self._share(parts))

    def _share(self, parts: Mapping[str, Part]) -> list[str]:
        if self._mine is None:
            self._mine, self._whole = share_out(parts, self._mesh, self.folder_group)
        return self._mine

    def _stage(self, parts: Mapping[str, Part]) -> tuple[list[ShardItem], torch.cuda.Event | None]:
        """Copy what is this process's to write into memory that is kept for it; on CUDA, see when it will be there."""
        self._at("stage")
        assert self._mine is not None
        live = [parts[name].tensor for name in self._mine]
        self._staging = self._staging or Staging(live)
        staged = self._staging.buffers()
        copy_all(live, staged)
        event = torch.cuda.Event() if any(t.is_cuda for t in live) else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        return [
            ShardItem(n, parts[n].region.offsets, buffer) for n, buffer in zip(self._mine, staged, strict=True)
        ], event

    def _write(self, save: _Save, items: Sequence[ShardItem], copied: torch.cuda.Event | None) -> None:
        """In a thread: this process's file, and beside it what it is known by."""
        try:
            if copied is not None:
                torch.cuda.set_device(self._mesh.device)  # a thread's own, else the first
                copied.synchronize()
            save.aside.mkdir(parents=True, exist_ok=True)
            path = shard_of(save.aside, self._mesh.place.rank)
            digest = None
            if items or not self._whole:
                digest = write_shard(path, items, durable=self._memory is None, read_back=save.read_back, at=self._at)
            leave_receipt(save.aside, self._mesh.place.rank, path, digest)
            save.written = True
        except Exception as error:  # whatever it is: the run goes on without this checkpoint
            save.error = error

    def votes(self) -> tuple[float, ...]:
        """How far this process is: to be summed over the world, and given to `advance` with `serial`."""
        save = self._save
        if save is None:
            return (0.0,) * VOTES
        return float(save.written), float(save.committed), float(save.error is not None)

    @property
    def serial(self) -> int:
        """Which save the votes are about."""
        return self._serial

    def advance(self, serial: int, votes: Sequence[float]) -> Outcome | None:
        """
        What the sum of `votes`, cast when `serial` was under way, comes to; None where it is not over.

        A collective over the world where a process has failed.
        """
        save = self._save
        if save is None or save.serial != serial:
            return None  # votes that were on their way when it was over
        written, committed, failed = votes
        if failed:
            return self._give_up(save)
        if committed == self.folder_group.count:
            self._save, self._last, self._tidying = None, save.step, save.thread
            return Outcome(save.step, time.perf_counter() - save.begun)
        if written == self._mesh.world_size and self.folder_group.is_leader and not save.committing:
            save.committing = True
            save.thread = threading.Thread(target=self._commit, args=(save,), name="commit", daemon=True)
            save.thread.start()
        return None

    def finish(self) -> Outcome | None:
        """Wait for the save that is under way, if there is one. A collective over the world."""
        while (save := self._save) is not None:
            if save.thread is not None:
                save.thread.join()
            votes = torch.tensor(self.votes(), dtype=torch.float64, device=self._mesh.device)
            outcome = self.advance(self._serial, self._mesh.sum(votes).tolist())
            if outcome is not None:
                return outcome
        return None

    def save(self, parts: Mapping[str, Part], state: Mapping[str, Any]) -> Outcome:
        """
        Save and wait for it; what was there before is waited for first. A collective over the world.

        It is not read back: who waits has little time, and every byte is compared with its hash when it is loaded.
        """
        self.finish()
        if not self.begin(parts, state, read_back=False):
            return Outcome(int(state["step"]), 0.0)
        outcome = self.finish()
        assert outcome is not None
        return outcome

    def _give_up(self, save: _Save) -> Outcome:
        """Say why, and leave nothing behind. A collective over the world."""
        self._save = None
        reasons = self._mesh.gather_objects("" if save.error is None else _reason(save.error))
        rank, reason = next((r, text) for r, text in enumerate(reasons) if text)
        if self.folder_group.is_leader:
            self._tidying = threading.Thread(target=self._remove, args=(save,), name="remove", daemon=True)
            self._tidying.start()
        where = f"rank {rank}: " if self._mesh.world_size > 1 else ""
        return Outcome(save.step, time.perf_counter() - save.begun, f"{self.folder}: {where}{reason}")

    def _remove(self, save: _Save) -> None:
        """In a thread: also where this folder has it by now, and another one has not."""
        if save.thread is not None:
            save.thread.join()
        shutil.rmtree(save.aside, ignore_errors=True)
        if save.committed:
            discard(folder_of(self.folder, save.step))

    # --- what the first process of a folder does when all have written ---------------------------------------

    def _commit(self, save: _Save) -> None:
        """In a thread."""
        try:
            self._at("manifest")
            write_manifest(save.aside, self.folder_group.ranks, save.state)
            self._at("rename")
            final = folder_of(self.folder, save.step)
            replace_folder(save.aside, final)
            point_to_latest(self.folder, save.step)
            sync(self.folder)
            save.committed = True
        except Exception as error:
            save.error = error
            return
        with contextlib.suppress(OSError):  # what should be gone and is not costs room, and no checkpoint
            self._at("retention")
            self._retain(save.step)

    def _retain(self, step: int) -> None:
        """Remove what is not to be kept after `step`: in memory also what is newer, whose steps are taken anew."""
        saved = listed(self.folder)
        kept = self._keep.steps(saved, step if self._memory else None)
        for old in saved:
            if old.step not in kept:
                discard(old.folder)

    # --- loading ---------------------------------------------------------------------------------------------

    def newest(self) -> tuple[Saved | None, list[str]]:
        """
        The newest checkpoint of which every byte is as it was written, the same on all processes; and what was wrong
        with each newer one. Those are set aside, or in memory removed. A collective over the world.
        """
        if self._tidying is not None:
            self._tidying.join()
        newest, problems = choose(self.folder, self._mesh, self.folder_group, self._memory)
        self._last = newest.step if newest else None
        return newest, problems

    def replicate(self, after: int, to: Path) -> tuple[Saved | None, list[str]]:
        """
        Of a store in memory: where some machine has one that is newer than `after`, copy it to `to`, which all see. The
        copy, if there is one; and what was wrong with others. A collective over the world. Raises `CheckpointError`.
        """
        assert self._memory is not None
        return replicate(self.folder, self._mesh, self._memory, after, to)

    def load(self, saved: Saved, parts: Mapping[str, Part]) -> dict[str, Any]:
        """Fill `parts` in place from what `newest` found; its `state.json`. Raises `CheckpointError`."""
        state, problem = {}, ""
        try:
            state = read_state(saved.folder)
            if saved.save_id and saved.save_id.layout_key:
                read_own(shard_of(saved.folder, self._mesh.place.rank), parts)
            else:
                read_into(saved, parts)
        except CheckpointError as error:
            problem = str(error)
        if problem := self._mesh.first_problem(problem):
            raise CheckpointError(problem)
        return state


def _reason(error: Exception) -> str:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in text:
        return "the disk is full"
    return text.strip() or type(error).__name__
