"""A comparison in words and tables, for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich.table import Table

from shoal.report.compare.comparison import Comparison, Measure
from shoal.report.compare.difference import Difference
from shoal.report.compare.series import Parting

SHOWN_OPTIONS: Final = 20
SHORT: Final = {"nats/token": "nats", "tokens/s": "tok/s"}  # for 80 columns


def headline(found: Comparison) -> str:
    """Return the verdict about loss in a sentence."""
    measure, difference = found.loss, found.loss.difference
    if difference is None:
        return f"cannot tell: {measure.why}"
    if found.part.step is None and found.part.compared and len(found.a) == len(found.b) == 1:
        return f"the same: all {found.part.compared:,} recorded losses and gradient norms are equal, bit by bit"
    if difference.is_real:
        return f"{measure.verdict}: its {measure.name} is {_by(difference)} ({_interval(difference)})"
    return f"cannot tell: the {measure.name} of B is {_by(difference)}, within noise ({_interval(difference)})"


def speed_line(found: Comparison) -> str:
    """Return the verdict about speed in a sentence."""
    difference = found.measures[-1].difference
    if difference is None:
        return f"speed: cannot tell: {found.measures[-1].why}"
    faster = "faster" if difference.estimate > 0 else "slower"
    size = f"{abs(math.expm1(difference.estimate)):.1%} {faster}"
    if difference.is_real:
        return f"speed: B is {size} ({_interval(difference)})"
    return f"speed: cannot tell: B is {size}, within noise ({_interval(difference)})"


def table(found: Comparison) -> Table:
    """Return a row for each measure: both groups, the difference, its interval and the verdict."""
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for title in ("", "A", "B", "B - A", _percent_of(found), "verdict"):
        shown.add_column(title, justify="left" if title in ("", "verdict") else "right", no_wrap=True)
    for measure in found.measures:
        name = f"{measure.name}, {SHORT.get(measure.unit, measure.unit)}"
        shown.add_row(name, _value(measure.a), _value(measure.b), *_apart(measure))
    return shown


def lines(found: Comparison) -> Iterator[str]:
    """Yield how it was tested, what more runs would show, the options and the first step that differ, and notes."""
    if found.loss.difference is not None:
        yield from _test_lines(found.loss.difference)
    yield from _option_lines(found)
    yield parting_line(found.part, found.a[0].facts.name, found.b[0].facts.name)
    yield from (f"note: {note}" for note in found.notes)


def _test_lines(test: Difference) -> Iterator[str]:
    measured = "assumed" if test.assumed else "measured"
    chosen = ", the more precise of paired and unpaired, at half the level each" if test.tests > 1 else ""
    yield f"test: {test.how}{chosen}; level {test.level:.2g}, run-to-run noise {test.run_noise:.2%} ({measured})"
    if test.run_noise == 0:
        return
    now = max(2, min(test.sizes))
    aim = _aim(test)
    needed = test.runs_to_show(aim)
    each = f"{now} runs on each side would find" if test.assumed else f"runs like these, {now} on each side, find"
    more = (
        ""
        if needed is None or needed <= now
        else f"; {needed} would find {aim:.2g}".replace(f"{aim:.2g}", f"{aim:.2%}")
    )
    yield f"power: {each} a difference of {test.detectable(now):.2%} in 8 of 10 cases{more}"


def _aim(test: Difference) -> float:
    """Return the difference that more runs are wanted for: the one seen, or half a percent if that is larger."""
    return max(abs(math.expm1(test.estimate)), 0.005)


def _option_lines(found: Comparison) -> Iterator[str]:
    """Yield the options that differ, those that differ between the groups first."""
    count = len(found.a)
    sides = {key: (_distinct(values[:count]), _distinct(values[count:])) for key, values in found.options.items()}
    apart = [f"  {key}: {a} in A, {b} in B" for key, (a, b) in sides.items() if a != b]
    inside = [f"  {key}: {a} in both" for key, (a, b) in sides.items() if a == b]
    shown = [*apart, *inside]
    yield "options that differ:" if shown else "options: all are the same"
    yield from shown[:SHOWN_OPTIONS]
    if len(shown) > SHOWN_OPTIONS:
        yield f"  and {len(shown) - SHOWN_OPTIONS} more; --json has all"


def _distinct(values: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(json.dumps(value, default=str) for value in values))


def parting_line(part: Parting, a: str, b: str) -> str:
    """Return the first step that parts the runs named `a` and `b`, in a sentence."""
    pair = f"{a} and {b}"
    if not part.compared:
        return f"first difference: {pair} have no step in common"
    if part.step is None:
        return f"first difference: none; {pair} agree bit by bit in all {part.compared:,} recorded steps"
    return f"first difference: step {part.step:,}, {part.what.replace('_', ' ')} {part.a!r} in {a}, {part.b!r} in {b}"


def _by(difference: Difference) -> str:
    relative = math.expm1(difference.estimate)
    return f"{abs(relative):.2%} {'lower' if relative < 0 else 'higher'}"


def _interval(difference: Difference) -> str:
    low, high = map(math.expm1, difference.interval)
    return f"{1 - difference.level:.0%} interval {low:+.2%} to {high:+.2%}"


def _percent_of(found: Comparison) -> str:
    test = found.loss.difference or found.measures[-1].difference
    return f"{1 - test.level:.0%} interval" if test else "interval"


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4f}"


def _apart(measure: Measure) -> tuple[str, str, str]:
    if measure.difference is None:
        return "-", "-", measure.verdict
    low, high = map(math.expm1, measure.difference.interval)
    return f"{math.expm1(measure.difference.estimate):+.2%}", f"{low:+.2%} to {high:+.2%}", measure.verdict
