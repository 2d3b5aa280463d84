"""The layouts of a config on given devices, in order of preference. No torch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.plan.choice.sketch import sketch
from shoal.plan.fits import Need, layouts, need_of, why_unknown
from shoal.plan.machine import Machine
from shoal.plan.speed.corrections import Corrections, Interval, Seen
from shoal.plan.speed.rates import WIDTHS, Rates
from shoal.plan.speed.seconds import Part, idle_share, step_seconds

LARGEST_MICRO_BATCH: Final = 1024
NEARLY: Final = 1.05  # of a device's memory: what a rough estimate may exceed and still fit
MOST_REHEARSED: Final = 12  # layouts; of more, those that look best


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
    def fitting(self) -> list[Choice]:
        return [c for c in self.found if not c.is_sketch and c.need.fits(self.machine)]


def choose(config: Config, machine: Machine, rates: Rates | None = None, seen: Sequence[Seen] = ()) -> Choices:
    """
    Return all layouts of `config`, whose own layout is ignored. Raises `ShoalError` if it allows none, or is not known.

    rates: of the machine's processes; None takes its data sheet's. seen: steps that were measured on such a machine.
    """
    if why := why_unknown(config):
        raise ShoalError(why)
    rates = rates or Rates(machine, WIDTHS[config.train.dtype])
    corrections = Corrections(seen, calibrated=rates.measured)
    asked = list(layouts(config, machine))
    if not asked:
        raise ShoalError(
            f"no layout of this recipe uses all {machine.world_size} devices; change train.global_batch "
            f"({config.train.global_batch}) or train.micro_batch ({config.train.micro_batch}), or the number of devices"
        )

    def order(choice: Choice) -> tuple[bool, float]:
        fits = choice.need.fits(machine)
        return not fits, choice.seconds.middle if fits else choice.need.total

    rough = list[Choice]()
    if len(asked) > MOST_REHEARSED:
        sketches = [choice_of(sketch(each, layout, cuda=machine.cuda), rates, corrections) for each, layout in asked]
        sketches.sort(key=order)
        rough = [dataclasses.replace(each, is_sketch=True) for each in sketches[MOST_REHEARSED:]]
        asked = [(each.need.config, each.need.layout) for each in sketches[:MOST_REHEARSED]]
    found = [choice_of(need_of(each, layout, cuda=machine.cuda), rates, corrections) for each, layout in asked]
    return Choices(config, machine, rates, corrections, [*sorted(found, key=order), *rough])


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
