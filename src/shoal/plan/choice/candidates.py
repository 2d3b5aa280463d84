"""
What `parallel: auto` and `train.micro_batch: auto` choose from on this machine, and which candidate to try next. No torch.

Where the planner knows the config, its predictions order the candidates, and each measured step scales those of the others.
Else the order is fixed: replicas, then shards, then other micro-batches of the fastest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.config.auto import LAYOUT, MICRO_BATCH, micro_batches, usual_micro_batch
from shoal.config.layout import Layout, find_layout
from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.plan.choice.choose import Choice, Choices, choice_of, choose, no_layout, sized_layouts
from shoal.plan.choice.table import lacking
from shoal.plan.fits import need_of, why_unknown
from shoal.plan.machine import Machine
from shoal.plan.speed.corrections import Interval, Seen
from shoal.plan.speed.rates import Rates
from shoal.resolve.layout_checks import refusals

MOST_MEASURED: Final = 3
MOST_TRIED: Final = 5  # with those that fail
STEPS: Final = (3, 12)  # fewest and most that are timed
UNPLANNED_TURNS: Final = 4  # micro-batches of each process in the steps that are timed, if nothing is predicted


@dataclass(frozen=True)
class Candidate:
    """A config with sizes in place of auto. choice: its plan; None if the planner does not know such a config."""

    config: Config
    layout: Layout
    choice: Choice | None = None

    @property
    def size(self) -> int:
        """The micro-batch."""
        return self.config.train.micro_batch

    @property
    def turns(self) -> int:
        """The micro-batches of the process that has most of a step."""
        return math.ceil(self.config.train.global_batch / self.size / self.layout.dp)

    @property
    def fewest_turns(self) -> int:
        """How many of them a step needs to take as much memory: the second adds gradients, a pipeline holds several."""
        return min(self.turns, 2 if self.layout.pp == 1 else self.layout.pp + 1)

    @property
    def fewest(self) -> int:
        """The sequences of the shortest step that is timed."""
        return self.size * self.layout.dp * self.fewest_turns

    def __str__(self) -> str:
        return f"{self.layout}, micro-batch {self.size}"


@dataclass(frozen=True)
class Timing:
    """
    The median of a candidate's steps, or why there is none.

    seconds: None if no step was finished. steps: how many were. memory_bytes: the peak of a GPU; None on a CPU. dtype: the one that
    the processes chose. why: what failed; empty if nothing did.
    """

    seconds: float | None
    steps: int = 0
    memory_bytes: int | None = None
    dtype: str = ""
    why: str = ""
    out_of_memory: bool = False
    too_slow: bool = False  # for a step within the limit


@dataclass(frozen=True)
class Trial:
    """
    The steps by which a candidate is timed: those of `config`, which has fewer micro-batches if a whole step takes long.

    steps: how many are timed, after warmup. factor: a whole step's seconds over those of such a step. share: of a whole step's
    micro-batches.
    """

    candidate: Candidate
    config: Config
    steps: int
    factor: float = 1.0
    share: float = 1.0


@dataclass(frozen=True)
class Tried:
    """A trial, its timing, and how long it took to make, in seconds."""

    trial: Trial
    timing: Timing
    took: float = 0.0

    @property
    def candidate(self) -> Candidate:
        return self.trial.candidate

    @property
    def seconds(self) -> float:
        """The seconds of a whole step; Inf if none was measured."""
        return math.inf if self.timing.seconds is None else self.timing.seconds * self.trial.factor

    @property
    def is_measured(self) -> bool:
        return self.timing.seconds is not None


@dataclass(frozen=True)
class Candidates:
    """
    The candidates in the order of preference, and what to tell the user about them.

    plan: None if their steps cannot be predicted.
    """

    listed: Sequence[Candidate]
    plan: Choices | None
    notes: Sequence[str] = ()

    def predicted(self, candidate: Candidate, tried: Sequence[Tried] = ()) -> Interval | None:
        """Return the seconds of a step, scaled by how far off those of `tried` were; None if they cannot be predicted."""
        if candidate.choice is None:
            return None
        off = [t.seconds / t.candidate.choice.seconds.middle for t in tried if t.is_measured and t.candidate.choice]
        return candidate.choice.seconds.scaled(statistics.median(off) if off else 1.0)

    def trial(self, candidate: Candidate, tried: Sequence[Tried], seconds: float) -> Trial:
        """Return the steps to time: with as few micro-batches as take `seconds`, and more steps if a whole one is short."""
        layout, turns = candidate.layout, candidate.turns
        whole = self.predicted(candidate, tried)
        steps = STEPS[0] if whole is None else max(STEPS[0], min(STEPS[1], int(seconds / whole.middle)))
        enough = UNPLANNED_TURNS if whole is None else int(seconds / whole.middle * turns)
        for fewer in range(max(enough, candidate.fewest_turns), turns):
            short = candidate.config.replace("train", global_batch=candidate.size * layout.dp * fewer)
            if not any(refusals(short, layout.world_size)):
                return Trial(candidate, short, steps, self._factor(candidate, short) or turns / fewer, fewer / turns)
        return Trial(candidate, candidate.config, steps)

    def _factor(self, candidate: Candidate, short: Config) -> float | None:
        """Return the seconds of a whole step over those of a shorter one, by the plan; None without one."""
        if candidate.choice is None or self.plan is None:
            return None
        need = need_of(short, candidate.layout, cuda=self.plan.machine.cuda)
        return candidate.choice.seconds.middle / choice_of(need, self.plan.rates, self.plan.corrections).seconds.middle

    def following(self, tried: Sequence[Tried]) -> Candidate | str:
        """Return the candidate to try next, or why no other one is tried."""
        left = [c for c in self.listed if not any(t.candidate is c or _rules_out(t, c) for t in tried)]
        measured = [t for t in tried if t.is_measured]
        if not left:
            return (
                "there is no other that may fit" if any(t.timing.out_of_memory for t in tried) else "there is no other"
            )
        if len(measured) >= MOST_MEASURED:
            return f"{MOST_MEASURED} were measured"
        if len(tried) >= MOST_TRIED:
            return f"{MOST_TRIED} were tried"
        return self._next_planned(left, tried) if self.plan else _next_unplanned(left, tried)

    def _next_planned(self, left: Sequence[Candidate], tried: Sequence[Tried]) -> Candidate | str:
        """
        Return the best of a layout that was not tried yet, while only one was; then the fastest layout with the usual micro-batch,
        in case the predictions err in what they say of sizes; then the best of all.
        """
        said = [(interval, c) for c in left if (interval := self.predicted(c, tried))]
        said.sort(key=lambda each: each[0].middle)
        layouts = {t.candidate.layout for t in tried}
        others = [each for each in said if each[1].layout not in layouts] if len(layouts) == 1 else []
        best = fastest(tried)
        if best is not None and not others:
            usual = usual_micro_batch(best.candidate.config.train.global_batch)
            others = [each for each in said if each[1].layout == best.candidate.layout and each[1].size == usual]
        for interval, candidate in (*others[:1], *said[:1]):
            if best is None or interval.low < best.seconds:
                return candidate
        return "no other is likely to be faster"


def fastest(tried: Sequence[Tried]) -> Tried | None:
    """Return the fastest of those that were measured; None if there is none."""
    return min((t for t in tried if t.is_measured), key=lambda t: t.seconds, default=None)


def _rules_out(tried: Tried, candidate: Candidate) -> bool:
    """Return whether a candidate would fail too: it needs at least as much memory, or its shortest step is about as long."""
    if tried.timing.too_slow:
        return candidate.fewest > tried.candidate.fewest / 2
    if not tried.timing.out_of_memory:
        return False
    if tried.candidate.choice and candidate.choice:
        return candidate.choice.need.total >= tried.candidate.choice.need.total
    return candidate.layout == tried.candidate.layout and candidate.size >= tried.candidate.size


def _next_unplanned(left: Sequence[Candidate], tried: Sequence[Tried]) -> Candidate | str:
    """
    Return the next layout with its first micro-batch; then larger micro-batches of the fastest layout, while they are faster.

    If nothing has fitted, the next smaller micro-batch of the layout that needs least.
    """
    layouts = {t.candidate.layout for t in tried}
    if new := [c for c in left if c.layout not in layouts]:
        return new[0]
    best = fastest(tried)
    if best is None:
        last = [c for c in left if c.layout == tried[-1].candidate.layout] or left
        return max(last, key=lambda c: c.size) if tried[-1].timing.out_of_memory else "none could be measured"
    of_best = [c for c in left if c.layout == best.candidate.layout]
    sizes = [t.candidate.size for t in tried if t.candidate.layout == best.candidate.layout]
    larger = [c for c in of_best if c.size > best.candidate.size] if best.candidate.size == max(sizes) else []
    smaller = [c for c in of_best if c.size < best.candidate.size] if len(sizes) == 1 and not larger else []
    found = [*sorted(larger, key=lambda c: c.size)[:1], *sorted(smaller, key=lambda c: -c.size)[:1]]
    return found[0] if found else "a larger micro-batch is not faster"


def find_candidates(
    config: Config, machine: Machine, undecided: Mapping[str, str], known: tuple[Rates, Sequence[Seen]]
) -> Candidates:
    """
    Return what `undecided` sizes of `config` may become on all devices of `machine`.

    config: with its vocabulary and dtype. known: rates of the machine and steps measured on it. If by the plan nothing fits, those
    that need least are listed. Raises `ShoalError` if nothing is possible.
    """
    asked = _asked(config, machine, undecided)
    if not asked:
        raise ShoalError(_nothing(config, machine, undecided))
    if why := why_unknown(config):
        return Candidates(
            _fixed(asked, config), None, [f"no prediction ({why.partition(';')[0]}): trying a fixed list"]
        )
    rates, seen = known
    choices = choose(config, machine, rates, seen, asked)
    found = choices.fitting or [c for c in choices.found if not c.is_sketch][:MOST_MEASURED]
    notes = [] if choices.fitting else [f"{lacking(choices)}: trying those that need least"]
    return Candidates([Candidate(each.need.config, each.need.layout, each) for each in found], choices, notes)


def _asked(config: Config, machine: Machine, undecided: Mapping[str, str]) -> list[list[tuple[Config, Layout]]]:
    train, world = config.train, machine.world_size
    sizes = micro_batches(train.global_batch) if MICRO_BATCH in undecided else [train.micro_batch]
    if LAYOUT in undecided:
        return sized_layouts(config, machine, sizes)
    layout = find_layout(config.parallel, world)
    each = (config.replace("train", micro_batch=size) for size in sizes)
    fitting = [(sized, layout) for sized in each if isinstance(layout, Layout) and not any(refusals(sized, world))]
    return [fitting] if fitting else []


def _nothing(config: Config, machine: Machine, undecided: Mapping[str, str]) -> str:
    found = [] if LAYOUT in undecided else list(refusals(config, machine.world_size))
    return "\n".join(found) or no_layout(config, machine.world_size)


def _fixed(asked: Sequence[Sequence[tuple[Config, Layout]]], config: Config) -> list[Candidate]:
    """Return the data-parallel layouts, replicas first; the sizes of each by their distance from the usual one."""
    usual = usual_micro_batch(config.train.global_batch)
    pure = [sizes for sizes in asked if _is_pure(sizes[0][1])] or asked[:1]
    return [
        Candidate(sized, layout)
        for sizes in sorted(pure, key=lambda sizes: -sizes[0][1].dp_replicate)
        for sized, layout in sorted(
            sizes, key=lambda each: abs(each[0].train.micro_batch.bit_length() - usual.bit_length())
        )
    ]


def _is_pure(layout: Layout) -> bool:
    return layout.world_size in (layout.dp_replicate, layout.dp_shard)
