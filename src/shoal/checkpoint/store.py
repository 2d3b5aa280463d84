"""
Saving checkpoints in the background of training, atomically.

A save has three parts. `begin` copies this rank's tensors to host memory; the step waits only for this. A thread writes
the copy to a temporary folder, flushes it, hashes it and reads it back. When every rank has done so, the leader of the
folder writes the manifest and renames the folder. Ranks exchange their progress in an all-reduce that each step does anyway:
each rank contributes its `votes`, and `advance` gets the sum. So no step waits for a disk, and all ranks learn at the same
step that a save is done.

The folder is either one that all ranks see, or one on each machine, usually in memory (`checkpoint.fast`). Each folder has a
leader, and a checkpoint is complete when every folder has it.

A failure costs only the checkpoint being saved. Files are never pickles; ranks exchange small objects through
torch.distributed, which pickles them.
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
from typing import Any, NamedTuple

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


@dataclass(frozen=True)
class Keep:
    """
    Which checkpoints to keep.

    last: the number of newest ones. every: keep also those of steps divisible by this; 0 keeps none of them. best: whether to
    keep also the one with the lowest validation loss.
    """

    last: int = 2
    every: int = 0
    best: bool = True

    def steps(self, saved: Sequence[Saved], newest: int | None = None) -> set[int]:
        """
        Return the steps to keep of `saved`, which is sorted oldest first.

        newest: the step just saved. Later steps will be repeated and do not count among the newest `last`; None counts all.
        """
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
    """The result of a save."""

    step: int
    seconds: float  # since it began
    problem: str = ""  # why it failed

    @property
    def ok(self) -> bool:
        return not self.problem


class Progress(NamedTuple):
    """Flags (0 or 1) for how far a process is with a save; the sum over the world counts the processes."""

    written: float = 0.0
    committed: float = 0.0
    failed: float = 0.0


@dataclass
class _Save:
    """A save in progress."""

    serial: int
    step: int
    temporary: Path
    state: dict[str, Any]
    read_back: bool
    begun: float = field(default_factory=time.perf_counter)
    thread: threading.Thread | None = None
    written: bool = False  # whether this rank's shard is written
    committed: bool = False  # whether this folder's leader has committed it
    committing: bool = False
    error: Exception | None = None


class CheckpointStore:
    """
    The checkpoints of one run in one folder. All ranks call its methods at the same steps.

    memory: the history of a folder in memory; None for a folder on disk, whose files are flushed and read back. at: a function
    called with the phase that a save reaches: stage, write, manifest, rename or retention.
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
        self._last: int | None = None  # step of the newest checkpoint known to all ranks
        self._serial = 0
        self._save: _Save | None = None
        self._tidying: threading.Thread | None = None  # may still run after its save is over
        self._mine: list[str] | None = None  # the parts that this rank writes
        self._whole = True  # each folder holds every tensor whole
        self._staging: Staging | None = None
        if self.folder_group.is_leader:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                for leftover in folder.glob(".*"):  # of an interrupted save or removal
                    shutil.rmtree(leftover, ignore_errors=True)
        mesh.barrier()

    @property
    def last_step(self) -> int | None:
        """The step of the newest checkpoint known to all ranks."""
        return self._last

    # --- saving --------------------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether a save is in progress; the same on all ranks between steps."""
        return self._save is not None

    def begin(self, parts: Mapping[str, Part], state: Mapping[str, Any], *, read_back: bool = True) -> bool:
        """
        Begin to save step `state["step"]`; return False if that step is already saved, or a save is in progress.

        `parts` may change once this returns. read_back: verify the file by reading it from the disk. The first call is a
        collective over the world.
        """
        step = int(state["step"])
        if self._save is not None or step == self._last:
            return False
        self._share(parts)
        self._serial += 1
        temporary = self.folder / f".step-{step:08d}.{self._serial}.tmp"
        # never replace the only checkpoint by one that was not read back
        careful = self._memory is None and (read_back or self._keep.last == 1)
        state = {"format": FORMAT, **state}
        if self._memory:
            layout_key = "" if self._whole else self._memory.layout_key
            state |= SaveId(self._memory.generation, self._serial, layout_key).to_state()
        self._save = save = _Save(self._serial, step, temporary, state, careful)
        try:
            items, copied = self._stage(parts)
        except Exception as error:  # reported to all ranks by the next votes
            save.error = error
            return True
        save.thread = threading.Thread(target=self._write, args=(save, items, copied), name="save", daemon=True)
        save.thread.start()
        return True

    def prepare(self, parts: Mapping[str, Part]) -> None:
        """
        Allocate the host memory for saves, so that the first save does not wait for it.

        The first call of `prepare`, `own_bytes` or `begin` is a collective over the world.
        """
        own = [parts[name].tensor for name in self._share(parts)]
        if self._staging is None:
            with contextlib.suppress(RuntimeError, MemoryError):  # no memory now: a save tries again and reports it
                self._staging = Staging(own)

    def own_bytes(self, parts: Mapping[str, Part]) -> int:
        """Return how many bytes this rank writes in a save. The first call may be a collective, as that of `prepare`."""
        return sum(parts[name].tensor.nbytes for name in self._share(parts))

    def _share(self, parts: Mapping[str, Part]) -> list[str]:
        if self._mine is None:
            self._mine, self._whole = share_out(parts, self._mesh, self.folder_group)
        return self._mine

    def _stage(self, parts: Mapping[str, Part]) -> tuple[list[ShardItem], torch.cuda.Event | None]:
        """Copy this rank's parts to the staging buffers; on CUDA, also return an event that comes after the copies."""
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
        """Write this rank's shard and receipt; runs in a thread."""
        try:
            if copied is not None:
                torch.cuda.set_device(self._mesh.device)  # the device is set per thread
                copied.synchronize()
            save.temporary.mkdir(parents=True, exist_ok=True)
            path = shard_of(save.temporary, self._mesh.place.rank)
            digest = None
            if items or not self._whole:
                digest = write_shard(path, items, durable=self._memory is None, read_back=save.read_back, at=self._at)
            leave_receipt(save.temporary, self._mesh.place.rank, path, digest)
            save.written = True
        except Exception as error:  # of any kind: the run continues without this checkpoint
            save.error = error

    def votes(self) -> Progress:
        """Return this rank's progress, to be summed over the world and passed to `advance` with `serial`."""
        save = self._save
        if save is None:
            return Progress()
        return Progress(float(save.written), float(save.committed), float(save.error is not None))

    @property
    def serial(self) -> int:
        """The number of the save that the votes are about."""
        return self._serial

    def advance(self, serial: int, votes: Sequence[float]) -> Outcome | None:
        """
        Act on the sum of all ranks' `votes` on save `serial`; return the save's outcome, None while it is in progress.

        A collective over the world if a rank has failed.
        """
        save = self._save
        if save is None or save.serial != serial:
            return None  # these votes arrived after the save was over
        world = Progress(*votes)
        if world.failed:
            return self._give_up(save)
        if world.committed == self.folder_group.count:
            self._save, self._last, self._tidying = None, save.step, save.thread
            return Outcome(save.step, time.perf_counter() - save.begun)
        if world.written == self._mesh.world_size and self.folder_group.is_leader and not save.committing:
            save.committing = True
            save.thread = threading.Thread(target=self._commit, args=(save,), name="commit", daemon=True)
            save.thread.start()
        return None

    def finish(self) -> Outcome | None:
        """Wait for the save in progress; return its outcome, None if there is none. A collective over the world."""
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
        Save, and wait until it is done; a save in progress is finished first. A collective over the world.

        The file is read back only if `keep.last` is 1: the caller may have little time, and resuming verifies every byte anyway.
        """
        self.finish()
        if not self.begin(parts, state, read_back=False):
            return Outcome(int(state["step"]), 0.0)
        outcome = self.finish()
        assert outcome is not None
        return outcome

    def _give_up(self, save: _Save) -> Outcome:
        """Return the outcome of a failed save, and remove its files in a thread. A collective over the world."""
        self._save = None
        reasons = self._mesh.gather_objects("" if save.error is None else _reason(save.error))
        rank, reason = next((r, text) for r, text in enumerate(reasons) if text)
        if self.folder_group.is_leader:
            self._tidying = threading.Thread(target=self._remove, args=(save,), name="remove", daemon=True)
            self._tidying.start()
        where = f"rank {rank}: " if self._mesh.world_size > 1 else ""
        return Outcome(save.step, time.perf_counter() - save.begun, f"{self.folder}: {where}{reason}")

    def _remove(self, save: _Save) -> None:
        """Remove a failed save, also if this folder has committed it but another has not; runs in a thread."""
        if save.thread is not None:
            save.thread.join()
        shutil.rmtree(save.temporary, ignore_errors=True)
        if save.committed:
            discard(folder_of(self.folder, save.step))

    # --- the leader's work after all ranks have written ------------------------------------------------------

    def _commit(self, save: _Save) -> None:
        """Complete the checkpoint and remove old ones; runs in a thread."""
        try:
            self._at("manifest")
            write_manifest(save.temporary, self.folder_group.ranks, save.state)
            self._at("rename")
            final = folder_of(self.folder, save.step)
            replace_folder(save.temporary, final)
            point_to_latest(self.folder, save.step)
            sync(self.folder)
            save.committed = True
        except Exception as error:
            save.error = error
            return
        with contextlib.suppress(OSError):  # a failed removal costs space, but no checkpoint
            self._at("retention")
            self._retain(save.step)

    def _retain(self, step: int) -> None:
        """Remove checkpoints not to be kept once `step` is saved; in memory also newer ones, whose steps will be repeated."""
        saved = listed(self.folder)
        kept = self._keep.steps(saved, step if self._memory else None)
        for old in saved:
            if old.step not in kept:
                discard(old.folder)

    # --- loading ---------------------------------------------------------------------------------------------

    def newest(self) -> tuple[Saved | None, list[str]]:
        """
        Return the newest undamaged checkpoint, the same on all ranks, and the damage found in each newer one.

        Damaged checkpoints are renamed, or removed if in memory. A collective over the world.
        """
        if self._tidying is not None:
            self._tidying.join()
        newest, problems = choose(self.folder, self._mesh, self.folder_group, self._memory)
        self._last = newest.step if newest else None
        return newest, problems

    def replicate(self, after: int, to: Path) -> tuple[Saved | None, list[str]]:
        """
        Copy a checkpoint newer than `after` from some machine's memory to the folder `to`, which all ranks see.

        Returns the copy, if any, and the damage found in newer checkpoints. A collective over the world. Raises
        `CheckpointError` if the copy cannot be written.
        """
        assert self._memory is not None
        return replicate(self.folder, self._mesh, self._memory, after, to)

    def load(self, saved: Saved, parts: Mapping[str, Part]) -> dict[str, Any]:
        """
        Fill `parts` in place from a checkpoint that `newest` found; return its `state.json`. A collective over the world.

        Raises `CheckpointError` on all ranks if it cannot be read on one.
        """
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
