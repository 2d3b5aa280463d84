"""The layouts of a config on given devices, in order of preference. No torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.config.auto import LARGEST_MICRO_BATCH
from shoal.config.layout import Layout
from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.plan.choice.sketch import sketch
from shoal.plan.fits import Need, layouts, need_of, why_unknown
from shoal.plan.machine import Machine
from shoal.plan.speed.corrections import Corrections, Interval, Seen
from shoal.plan.speed.rates import WIDTHS, Rates
from shoal.plan.speed.seconds import Part, idle_share, step_seconds

NEARLY: Final = 1.05  # of a device's memory: what a rough estimate may exceed and still fit
MOST_REHEARSED: Final = 12  # layouts with their micro-batches; of more, those that look best
SIZES_REHEARSED: Final = 3  # micro-batches of a layout, if there are several layouts


@dataclass(frozen=True)
class Choice:
    """
    A layout, what it needs, and the seconds of its step: by part without correction, and corrected.

    is_sketch: whether it was not rehearsed, since others are better.
    """

    need: Need
    parts: Mapping[Part, float]
    seconds: Interval
    is_sketch: bool = False


@dataclass(frozen=True)
class Choices:
    """All layouts of `config` on `machine`, the fastest that fit first, then those that do not, the smallest first."""

    config: Config
    machine: Machine
    rates: Rates
    corrections: Corrections
    found: Sequence[Choice]

    @property
    def has_several_sizes(self) -> bool:
        """Whether layouts are compared with several micro-batches."""
        return len({c.need.config.train.micro_batch for c in self.found}) > 1

    def memory(self, choice: Choice) -> Interval:
        """Return the bytes that a rank needs."""
        return self.corrections.memory(choice.need.total, cuda=self.machine.cuda)

    @property
    def fitting(self) -> list[Choice]:
        return [c for c in self.found if not c.is_sketch and c.need.fits(self.machine)]


def sized_layouts(config: Config, machine: Machine, sizes: Sequence[int]) -> list[list[tuple[Config, Layout]]]:
    """Return for each layout of all devices the configs with those of the micro-batch `sizes` that it allows."""
    found: dict[Layout, list[tuple[Config, Layout]]] = {}
    for size in sizes:
        for sized, layout in layouts(config.replace("train", micro_batch=size), machine):
            found.setdefault(layout, []).append((sized, layout))
    return list(found.values())


def choose(
    config: Config,
    machine: Machine,
    rates: Rates | None = None,
    seen: Sequence[Seen] = (),
    asked: Sequence[Sequence[tuple[Config, Layout]]] | None = None,
) -> Choices:
    """
    Return all layouts of `config`, whose own layout is ignored. Raises `ShoalError` if it allows none, or is not known.

    rates: of the machine's processes; None takes its data sheet's. seen: steps that were measured on such a machine. asked: the
    configs to compare, in a list for each layout (`sized_layouts`); None: the config's micro-batch in every layout.
    """
    if why := why_unknown(config):
        raise ShoalError(why)
    rates = rates or Rates(machine, WIDTHS[config.train.dtype])
    corrections = Corrections(seen, calibrated=rates.measured)
    asked = sized_layouts(config, machine, [config.train.micro_batch]) if asked is None else asked
    if not asked:
        raise ShoalError(no_layout(config, machine.world_size))

    def look(each: Config, layout: Layout) -> Choice:
        return choice_of(sketch(each, layout, cuda=machine.cuda), rates, corrections)

    rough, chosen = _shortlist(asked, look, machine, config.train.micro_batch)
    found = [choice_of(need_of(each, layout, cuda=machine.cuda), rates, corrections) for each, layout in chosen]
    found.sort(key=lambda choice: _order(choice, machine))
    return Choices(config, machine, rates, corrections, [*found, *rough])


def _order(choice: Choice, machine: Machine) -> tuple[bool, float]:
    """Return the key by which choices are sorted: those that fit first, by their time; the others by their memory."""
    fits = choice.need.fits(machine)
    return not fits, choice.seconds.middle if fits else choice.need.total


def _shortlist(
    asked: Sequence[Sequence[tuple[Config, Layout]]],
    look: Callable[[Config, Layout], Choice],
    machine: Machine,
    usual: int,
) -> tuple[list[Choice], list[tuple[Config, Layout]]]:
    """
    Return the sketch of each layout that is not rehearsed, and the configs that are, at most `MOST_REHEARSED`.

    look: makes a sketch. usual: the micro-batch that each layout's configs include besides those that look best.
    """
    if sum(map(len, asked)) <= MOST_REHEARSED:
        return [], [each for sizes in asked for each in sizes]

    def key(choice: Choice) -> tuple[bool, float]:
        return _order(choice, machine)

    deep = min(SIZES_REHEARSED, max(map(len, asked))) if len(asked) > 1 else MOST_REHEARSED
    most = MOST_REHEARSED // deep
    looks = sorted(((look(*sizes[len(sizes) // 2]), sizes) for sizes in asked), key=lambda each: key(each[0]))
    better = looks[: most if deep == 1 else 2 * most]
    rows = [sorted((look(*each) for each in sizes), key=key) for _, sizes in better]
    rows.sort(key=lambda row: key(row[0]))
    kept = [each for row in rows[:most] for each in _with_usual(row, deep, usual)]
    rough = [*(row[0] for row in rows[most:]), *(each for each, _ in looks[len(better) :])]
    return [dataclasses.replace(each, is_sketch=True) for each in rough], [(c.need.config, c.need.layout) for c in kept]


def _with_usual(row: Sequence[Choice], count: int, usual: int) -> Sequence[Choice]:
    """Return the first of a layout's choices, and the one of the usual micro-batch, if there is one."""
    others = [c for c in row[count - 1 :] if c.need.config.train.micro_batch == usual]
    return [*row[: count - 1], *(others or row[count - 1 : count])]


def no_layout(config: Config, processes: int) -> str:
    """Return the message for a config that no layout of all devices allows."""
    return (
        f"no layout of this recipe uses all {processes} devices; change train.global_batch ({config.train.global_batch}) or "
        f"train.micro_batch ({config.train.micro_batch}), or the number of devices"
    )


def choice_of(need: Need, rates: Rates, corrections: Corrections) -> Choice:
    """Return a layout with its step's seconds."""
    parts = step_seconds(need.works, need.layout, idle_share(need), rates)
    return Choice(need, parts, corrections.predict(parts))


def largest_micro_batch(choice: Choice, machine: Machine) -> int:
    """Return the largest micro-batch, by doubling the config's, with which this layout fits, and that divides the global batch."""
    config, layout = choice.need.config, choice.need.layout
    base = config.train.micro_batch

    def need(size: int) -> int:
        return need_of(config.replace("train", micro_batch=size), layout, cuda=machine.cuda).total

    doubled = itertools.takewhile(LARGEST_MICRO_BATCH.__ge__, (base * 2**n for n in itertools.count(1)))
    sizes = list(itertools.takewhile(lambda size: config.train.global_batch % (size * layout.dp) == 0, doubled))
    if not sizes or (twice := need(sizes[0])) > machine.usable_bytes:
        return base
    # memory grows at most linearly, so a line says where to look
    more = max(1, twice - choice.need.total)
    far = (NEARLY * machine.usable_bytes - choice.need.total) / more
    likely = [size for size in sizes[1:] if size / base - 1 <= far]
    return next((size for size in reversed(likely) if need(size) <= machine.usable_bytes), int(sizes[0]))
