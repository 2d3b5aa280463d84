"""The schedule and the outcome of a run's saves, and the choice of the checkpoint from which it resumes."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shoal.checkpoint.memory_folder import (
    KEPT,
    clear,
    find_folder_group,
    folder_in_memory,
    lacks_room,
    read_generations,
    write_generations,
)
from shoal.checkpoint.memory_tier import MemoryTier
from shoal.checkpoint.saved import Saved
from shoal.checkpoint.store import CheckpointStore, Keep, Outcome
from shoal.config.options import Config
from shoal.errors import RunError
from shoal.mesh.ballot import Vote
from shoal.mesh.mesh import Mesh
from shoal.run.console import Console
from shoal.training.state import TrainState

Say = Callable[..., None]
"""A function that is called with an event's name and its facts."""

_FIRST_RETRY: Final = 10  # steps between a failed save and its retry; doubles with each further failure


@dataclass
class _Tier:
    """A checkpoint store and its schedule."""

    store: CheckpointStore
    every: int  # steps between saves; 0: only at the end
    retry_at: int | None = None  # step at which a failed or postponed save is due
    retries: int = 0
    memory: MemoryTier | None = field(default=None, kw_only=True)  # only for the fast tier
    has_room: bool | None = None  # whether the fast tier has enough space; None: not checked yet
    closed: bool = False  # whether this is a fast tier that cannot be used

    def is_due(self, step: int) -> bool:
        """Return whether this tier saves after `step`."""
        return not self.closed and (step == self.retry_at or (self.every > 0 and step % self.every == 0))

    def learn(self, outcome: Outcome, step: int) -> None:
        """Schedule a retry after a failure."""
        self.retries = 0 if outcome.ok else self.retries + 1
        if not outcome.ok:
            self.retry_at = step + _FIRST_RETRY * 2 ** (self.retries - 1)
        elif self.retry_at != step:  # else a save was postponed to this very step and is still due
            self.retry_at = None


@dataclass
class Saving:
    """
    The checkpoints of a run: on disk and, if `checkpoint.fast` is set, also in fast storage, which may be volatile.

    All ranks call its methods at the same steps.
    """

    tiers: Sequence[_Tier]
    mesh: Mesh
    console: Console
    event: Say
    wait: bool  # whether training waits for each save
    data_id: str = field(kw_only=True)
    # called with the seconds that a save to disk took
    on_saved: Callable[[float], None] = field(default=lambda seconds: None, kw_only=True)
    # called with the step of a completed save in any tier
    on_checkpoint: Callable[[int], None] = field(default=lambda step: None, kw_only=True)
    total_steps: int | None = field(default=None, kw_only=True)  # of the run, if known

    @classmethod
    def open(
        cls,
        config: Config,
        folder: Path,
        mesh: Mesh,
        console: Console,
        event: Say,
        data_id: str,
        at: Callable[[str], None],
    ) -> Saving:
        """
        Open the tiers. A collective over the world. Raises `RunError` if only some ranks have `checkpoint.fast`.

        folder: the folder of the run's checkpoints on disk. `at(phase)` is called at each phase of a save to disk.
        """
        options = config.checkpoint
        have = mesh.gather_objects(options.fast is not None)
        if any(have) and not all(have):
            raise RunError(
                f"checkpoint.fast is set on rank {have.index(True)} and not on rank {have.index(False)}: set it on all "
                "nodes, to a local folder of each, or on none"
            )
        keep = Keep(options.keep, options.keep_every, options.keep_best)
        tiers = [_Tier(CheckpointStore(folder, mesh, keep=keep, at=at), options.every)]
        why = ""
        if options.fast is not None:
            near = folder_in_memory(options.fast, folder.parent)
            group, why = find_folder_group(near, mesh)
            generations = mesh.gather_objects(read_generations(folder))[0]
            memory = MemoryTier(group, f"{mesh.world_size} {config.parallel}", generations)
            store = CheckpointStore(near, mesh, keep=Keep(KEPT, 0, best=False), memory=memory)
            tiers.append(_Tier(store, options.fast_every, memory=memory, closed=bool(why)))
        saving = cls(tiers, mesh, console, event, not options.background, data_id=data_id)
        if why:
            saving._do_without(why, 0)
        return saving

    @property
    def folder(self) -> Path:
        """Return the folder of the checkpoints on disk."""
        return self.tiers[0].store.folder

    def find(self) -> Saved | None:
        """
        Return the newest whole checkpoint, the same on all ranks; report what was wrong with newer ones.

        A newer checkpoint that only some nodes have in memory is copied to disk, for all nodes. A collective over the world.
        """
        found: list[Saved] = []
        for tier in self.tiers:
            if tier.closed:
                continue
            saved, problems = tier.store.newest()
            self._pass_over(problems, "removed" if tier.memory else "set aside")
            found += [saved] if saved else []
        newest = max(found, key=lambda s: s.step, default=None)
        for tier in self.tiers[1:]:  # also a closed tier: nodes without its problem may have a checkpoint
            newest = self._borrow(tier, newest) or newest
        return newest

    def _borrow(self, tier: _Tier, newest: Saved | None) -> Saved | None:
        """
        Copy to disk a checkpoint that only some nodes have in memory, if it is newer than `newest`, which all nodes have.

        If `newest` is itself in memory, the copied checkpoint must be newer by more than the tier's `every` steps.
        """
        after = newest.step if newest else 0
        if newest and newest.folder.parent == tier.store.folder:
            after += tier.every
        replica, problems = tier.store.replicate(after, self.folder)
        self._pass_over(problems, "not used")
        if replica:
            self.console.note(
                f"step {replica.step} was in the memory of some nodes only; it is now in {replica.folder}, for all"
            )
            self.event("lent", step=replica.step)
        return replica

    def _pass_over(self, problems: Sequence[str], done: str) -> None:
        """Report checkpoints that cannot be used, and what was done with them."""
        for problem in problems:
            self.console.warn(f"{problem}; that checkpoint is {done}, and the one before it is used")
            self.event("damaged", why=problem)

    def restore(self, saved: Saved, state: TrainState) -> None:
        """
        Fill `state` from `saved`. A collective over the world.

        Raises `CheckpointError` if the checkpoint cannot be read, `RunError` if it was trained on other tokens.
        """
        tier = next(t for t in self.tiers if t.store.folder == saved.folder.parent)
        scalars = tier.store.load(saved, state.tensors())
        if scalars["data_id"] != self.data_id:
            raise RunError(
                f"{saved.folder} was trained on other tokens than those prepared now, so resuming would repeat or skip "
                "samples; choose another --name to start from scratch on the new tokens"
            )
        state.load_scalars(scalars)

    def begin_life(self, newest: Saved | None) -> None:
        """
        Record which in-memory checkpoints belong to this run's history. A collective over the world.

        The history is the checkpoints that led to `newest`, from which the run resumes, and those written from now on. It
        excludes checkpoints of steps that the run repeats; a node that left and came back may still have them.
        """
        fast = next((tier for tier in self.tiers if tier.memory and not tier.closed), None)
        generations: Mapping[str, int | None] = {}
        if fast and fast.memory:
            fast.memory.begin_generation(self.mesh.gather_objects(uuid.uuid4().hex)[0], newest)
            generations = fast.memory.generations
        problem = ""
        if self.mesh.is_first:
            try:
                write_generations(self.folder, generations)
            except OSError as error:
                problem = f"{self.folder} cannot be written: {error.strerror}"
        if fast and (problem := self.mesh.first_problem(problem)):
            fast.closed = True
            self._do_without(problem, 0)

    def prepare(self, state: TrainState) -> None:
        """
        Allocate, before the first save, the page-locked memory for saves from a GPU to disk. A collective over the world.

        The free space of the fast tier is checked at its first save.
        """
        if self.mesh.device.type == "cuda":
            for tier in self.tiers:
                if not tier.closed and not tier.memory:
                    tier.store.prepare(state.tensors())

    # --- between steps ---------------------------------------------------------------------------------------

    def votes(self, step: int) -> dict[str, Vote]:
        """Return this rank's votes on the progress of its saves, by tier."""
        return {"fast save" if tier.memory else "save": self._vote(tier, step) for tier in self.tiers}

    def _vote(self, tier: _Tier, step: int) -> Vote:
        serial = tier.store.serial  # the save that this vote is about, which may be over when the sums arrive

        def hear(sums: Sequence[float]) -> None:
            if (outcome := tier.store.advance(serial, sums)) is not None:
                self._tell(tier, outcome, step)

        return Vote(tier.store.votes(), hear)

    def is_due(self, step: int) -> bool:
        """Return whether any tier saves after `step`."""
        return any(tier.is_due(step) for tier in self.tiers)

    def put_off(self, step: int) -> None:
        """Postpone the saves due at `step` to the next step."""
        for tier in self.tiers:
            if tier.is_due(step):
                tier.retry_at = step + 1

    def begin(self, state: TrainState, val_loss: float | None) -> None:
        """Start the saves that are due at `state.step`."""
        for tier in self.tiers:
            if not tier.is_due(state.step):
                continue
            if tier.memory and not self._fits(tier, state):
                continue
            if tier.store.is_busy and tier.memory:
                # The fast tier bounds the steps that a crash loses: training waits rather than skip a save.
                if (outcome := tier.store.finish()) is not None:
                    self._tell(tier, outcome, state.step)
                if not tier.is_due(state.step):
                    continue
            elif tier.store.is_busy:
                self.console.warn(
                    f"no checkpoint of step {state.step}: the one before it is still being written; use a faster disk or "
                    "a larger checkpoint.every"
                )
                continue
            tier.retry_at = None
            if self.wait:
                self._tell(tier, tier.store.save(state.tensors(), self._scalars(state, val_loss)), state.step)
            else:
                tier.store.begin(state.tensors(), self._scalars(state, val_loss))

    def wait_for_all(self, step: int) -> None:
        """Wait for the saves in progress. A collective over the world."""
        for tier in self.tiers:
            if (outcome := tier.store.finish()) is not None:
                self._tell(tier, outcome, step)

    def finish(self, state: TrainState, val_loss: float | None) -> Outcome:
        """Save to disk now, and wait until it is complete. A collective over the world."""
        self.wait_for_all(state.step)
        last = self.tiers[0]
        outcome = last.store.save(state.tensors(), self._scalars(state, val_loss))
        if outcome.seconds or not outcome.ok:
            self._tell(last, outcome, state.step)
        if outcome.ok:
            self._clear_memory()
        return outcome

    def _clear_memory(self) -> None:
        """Delete the in-memory checkpoints: none is newer than the one on disk."""
        for tier in self.tiers[1:]:
            # For a tier that could not be used, it is unknown which ranks share a folder: each rank clears it
            if tier.closed or tier.store.folder_group.is_leader:
                clear(tier.store.folder)
        if self.mesh.is_first:
            with contextlib.suppress(OSError):
                write_generations(self.folder, {})

    def _fits(self, tier: _Tier, state: TrainState) -> bool:
        """Return whether the fast tier has enough space. Its first save checks this, with collectives over the world."""
        if tier.has_room is None:
            store = tier.store
            why = lacks_room(store.folder, store.own_bytes(state.tensors()), self.mesh, store.folder_group)
            tier.has_room, tier.closed = not why, bool(why)
            if why:
                self._do_without(why, state.step)
        return tier.has_room

    def _do_without(self, why: str, step: int) -> None:
        """Report that the fast tier is not used."""
        self.console.warn(
            f"checkpoint.fast is not used: {why}. Training continues, and saves every checkpoint.every steps"
        )
        self.event("no fast place", step=step, why=why)

    def _scalars(self, state: TrainState, val_loss: float | None) -> Mapping[str, Any]:
        """Return the values that a checkpoint holds besides tensors."""
        return {**state.scalars(), "data_id": self.data_id, "val_loss": val_loss}

    def _next_try(self, tier: _Tier, step: int) -> str:
        """Say when a failed save is retried, if it is."""
        if self.total_steps is None or (tier.retry_at or 0) < self.total_steps:
            return f"; training continues, and the save is retried at step {tier.retry_at}"
        return "; training continues, and the save is retried at the end" if step < self.total_steps else ""

    def _tell(self, tier: _Tier, outcome: Outcome, step: int) -> None:
        """Report a save that is over, and schedule a retry if it failed."""
        tier.learn(outcome, step)
        if outcome.ok:
            self.on_checkpoint(outcome.step)
            if tier is self.tiers[0]:
                self.on_saved(outcome.seconds)
                self.event("saved", step=outcome.step, seconds=round(outcome.seconds, 3))
        else:
            kept = "; earlier ones are kept" if tier.store.last_step is not None else ""
            self.console.warn(
                f"{outcome.problem}: no checkpoint of step {outcome.step}{kept}{self._next_try(tier, step)}"
            )
            self.event("save failed", step=outcome.step, why=outcome.problem)
