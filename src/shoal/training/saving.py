"""When a run saves, what becomes of it, and from where it goes on."""

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
from shoal.mesh.mesh import Mesh
from shoal.run.console import Console
from shoal.training.state import TrainState

Say = Callable[..., None]
"""Called with an event and its facts."""

_FIRST_RETRY: Final = 10  # steps; then twice as many each time


@dataclass
class _Tier:
    """A store, and its turns."""

    store: CheckpointStore
    every: int  # steps; 0: only at the end
    retry_at: int | None = None  # the step at which a save that failed is tried again
    retries: int = 0
    memory: MemoryTier | None = field(default=None, kw_only=True)  # of a fast one
    has_room: bool | None = None  # a fast one; None: nobody has looked
    closed: bool = False  # a fast one that cannot be used

    def is_due(self, step: int) -> bool:
        return not self.closed and (step == self.retry_at or (self.every > 0 and step % self.every == 0))

    def learn(self, outcome: Outcome, step: int) -> None:
        """When to try again, after a failure."""
        self.retries = 0 if outcome.ok else self.retries + 1
        if not outcome.ok:
            self.retry_at = step + _FIRST_RETRY * 2 ** (self.retries - 1)
        elif self.retry_at != step:  # one that was put off to this very step is still to come
            self.retry_at = None


@dataclass
class Saving:
    """
    The checkpoints of a run: those on its disk, and where `checkpoint.fast` is set, others in a fast place that need
    not last. Its methods are called by all processes at the same steps.
    """

    tiers: Sequence[_Tier]
    mesh: Mesh
    console: Console
    event: Say
    wait: bool  # for each save, rather than train on
    data_id: str = field(kw_only=True)
    on_saved: Callable[[float], None] = field(default=lambda seconds: None, kw_only=True)  # of one that lasts
    on_checkpoint: Callable[[int], None] = field(default=lambda step: None, kw_only=True)  # of any: its step
    total_steps: int | None = field(default=None, kw_only=True)  # of the run, where that is known

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
        `folder`: that of the run's checkpoints; `at(phase)` is called as a save goes on. A collective over the world.

        Raises `RunError` where some have a fast place and others have none.
        """
        options = config.checkpoint
        have = mesh.gather_objects(options.fast is not None)
        if any(have) and not all(have):
            raise RunError(
                f"checkpoint.fast is set on rank {have.index(True)} and not on rank {have.index(False)}: set it on all "
                "machines, to a folder of each, or on none"
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
        """Of the checkpoints that last."""
        return self.tiers[0].store.folder

    def find(self) -> Saved | None:
        """
        The newest checkpoint that is whole, the same on all processes. What was wrong with newer ones is said. One that
        is in the memory of some machines and not of all is written where it lasts first. A collective over the world.
        """
        found: list[Saved] = []
        for tier in self.tiers:
            if tier.closed:
                continue
            saved, problems = tier.store.newest()
            self._pass_over(problems, "removed" if tier.memory else "set aside")
            found += [saved] if saved else []
        newest = max(found, key=lambda s: s.step, default=None)
        for tier in self.tiers[1:]:  # also one that is closed: a machine has it that is not the cause
            newest = self._borrow(tier, newest) or newest
        return newest

    def _borrow(self, tier: _Tier, newest: Saved | None) -> Saved | None:
        """What some machines have alone in memory, and is worth a copy for all: not where all have one as good as it."""
        after = newest.step if newest else 0
        if newest and newest.folder.parent == tier.store.folder:
            after += tier.every
        replica, problems = tier.store.replicate(after, self.folder)
        self._pass_over(problems, "not used")
        if replica:
            self.console.note(
                f"step {replica.step} was in the memory of some machines alone: it is in {replica.folder} now, for all"
            )
            self.event("lent", step=replica.step)
        return replica

    def _pass_over(self, problems: Sequence[str], done: str) -> None:
        for problem in problems:
            self.console.warn(f"{problem}; that checkpoint is {done}, and the one before it is taken")
            self.event("damaged", why=problem)

    def restore(self, saved: Saved, state: TrainState) -> None:
        """
        Fill `state` from `saved`. A collective over the world.

        Raises `CheckpointError`, or `RunError` where it was trained on other tokens.
        """
        tier = next(t for t in self.tiers if t.store.folder == saved.folder.parent)
        scalars = tier.store.load(saved, state.tensors())
        if scalars["data_id"] != self.data_id:
            raise RunError(
                f"{saved.folder} was trained on other tokens than those prepared now, so going on would repeat or skip "
                "samples; choose another --name to start anew on the new ones"
            )
        state.load_scalars(scalars)

    def begin_life(self, newest: Saved | None) -> None:
        """
        Leave word whose checkpoints in memory are of this run from now on: what led to `newest`, from which it goes on,
        and what these processes write; not what a machine that was away has of the steps that they take. A collective over
        the world.
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
        Ask for the memory that saves on disk take, where it takes long to have: page-locked, for a GPU. A collective over
        the world. Whether there is room for those in memory is seen at the first one.
        """
        if self.mesh.device.type == "cuda":
            for tier in self.tiers:
                if not tier.closed and not tier.memory:
                    tier.store.prepare(state.tensors())

    # --- between steps ---------------------------------------------------------------------------------------

    def votes(self) -> list[float]:
        """How far this process's saves are, to be summed over the world in the next step."""
        return [vote for tier in self.tiers for vote in tier.store.votes()]

    def serials(self) -> list[int]:
        """What the votes are about."""
        return [tier.store.serial for tier in self.tiers]

    def settle(self, serials: Sequence[int], votes: Sequence[float], step: int) -> None:
        """What the sum of the votes, cast when `serials` were under way, comes to: said, and tried again if need be."""
        size = len(votes) // len(self.tiers)
        for number, (tier, serial) in enumerate(zip(self.tiers, serials, strict=True)):
            outcome = tier.store.advance(serial, votes[number * size : (number + 1) * size])
            if outcome is not None:
                self._tell(tier, outcome, step)

    def is_due(self, step: int) -> bool:
        return any(tier.is_due(step) for tier in self.tiers)

    def put_off(self, step: int) -> None:
        """What is due at `step` is saved after the next one."""
        for tier in self.tiers:
            if tier.is_due(step):
                tier.retry_at = step + 1

    def begin(self, state: TrainState, val_loss: float | None) -> None:
        """Begin the saves that are due at `state.step`."""
        for tier in self.tiers:
            if not tier.is_due(state.step):
                continue
            if tier.memory and not self._fits(tier, state):
                continue
            if tier.store.is_busy and tier.memory:
                # its promise is the number of steps: training waits, rather than leave one out
                if (outcome := tier.store.finish()) is not None:
                    self._tell(tier, outcome, state.step)
                if not tier.is_due(state.step):
                    continue
            elif tier.store.is_busy:
                self.console.warn(
                    f"no checkpoint of step {state.step}: the one before it is still being written; the disk is slow, or "
                    "checkpoint.every is short"
                )
                continue
            tier.retry_at = None
            if self.wait:
                self._tell(tier, tier.store.save(state.tensors(), self._scalars(state, val_loss)), state.step)
            else:
                tier.store.begin(state.tensors(), self._scalars(state, val_loss))

    def settle_all(self, step: int) -> None:
        """Wait for what is under way. A collective over the world."""
        for tier in self.tiers:
            if (outcome := tier.store.finish()) is not None:
                self._tell(tier, outcome, step)

    def finish(self, state: TrainState, val_loss: float | None) -> Outcome:
        """Save now where it lasts, and wait until it is there. A collective over the world."""
        self.settle_all(state.step)
        last = self.tiers[0]
        outcome = last.store.save(state.tensors(), self._scalars(state, val_loss))
        if outcome.seconds or not outcome.ok:
            self._tell(last, outcome, state.step)
        if outcome.ok:
            self._clear_memory()
        return outcome

    def _clear_memory(self) -> None:
        """All that is there is older than what lasts."""
        for tier in self.tiers[1:]:
            if (
                tier.closed or tier.store.folder_group.is_leader
            ):  # of one that was not to be used, it is not known who sees it
                clear(tier.store.folder)
        if self.mesh.is_first:
            with contextlib.suppress(OSError):
                write_generations(self.folder, {})

    def _fits(self, tier: _Tier, state: TrainState) -> bool:
        """Whether there is room in a fast place: looked at before the first save. A collective over the world, then."""
        if tier.has_room is None:
            store = tier.store
            why = lacks_room(store.folder, store.own_bytes(state.tensors()), self.mesh, store.folder_group)
            tier.has_room, tier.closed = not why, bool(why)
            if why:
                self._do_without(why, state.step)
        return tier.has_room

    def _do_without(self, why: str, step: int) -> None:
        self.console.warn(
            f"checkpoint.fast is not used: {why}. Training goes on, and saves each checkpoint.every steps"
        )
        self.event("no fast place", step=step, why=why)

    def _scalars(self, state: TrainState, val_loss: float | None) -> Mapping[str, Any]:
        return {**state.scalars(), "data_id": self.data_id, "val_loss": val_loss}

    def _next_try(self, tier: _Tier, step: int) -> str:
        """When a save is tried again, if it is."""
        if self.total_steps is None or (tier.retry_at or 0) < self.total_steps:
            return f", training goes on, and it is tried again at step {tier.retry_at}"
        return ", training goes on, and it is tried again at the end" if step < self.total_steps else ""

    def _tell(self, tier: _Tier, outcome: Outcome, step: int) -> None:
        tier.learn(outcome, step)
        if outcome.ok:
            self.on_checkpoint(outcome.step)
            if tier is self.tiers[0]:
                self.on_saved(outcome.seconds)
                self.event("saved", step=outcome.step, seconds=round(outcome.seconds, 3))
        else:
            stands = "; those before it stand" if tier.store.last_step is not None else ""
            self.console.warn(
                f"{outcome.problem}: no checkpoint of step {outcome.step}{stands}{self._next_try(tier, step)}"
            )
            self.event("save failed", step=outcome.step, why=outcome.problem)
