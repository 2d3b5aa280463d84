"""The rules of alerts: what each one looks at, and its message. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shoal.config.alert_options import Alerts
from shoal.run.console import duration
from shoal.run.goodput import Account
from shoal.run.records import StepRecord

TREND_SECONDS: Final = 3600.0  # the past from which the disk's future follows
FEWEST_SECONDS: Final = 300.0  # a shorter past does not show a trend
GIB: Final = 2**30
CRASHES: Final = ("crashed", "hang")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one look at a run's files found. Times are in seconds."""

    now: float
    step: int = 0  # the last step taken
    stepless_seconds: float = 0.0  # since the last step, or since the run's processes were started
    stepped: bool = False  # whether a step was taken since the last look
    steps: Sequence[StepRecord] = ()  # new ones
    events: Sequence[Mapping[str, Any]] = ()  # new ones
    account: Account | None = None
    free_bytes: int | None = None
    ended: str = ""  # how the run ended


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Whether a rule is broken. text: the message if it is."""

    rule: str
    broken: bool
    text: str = ""
    value: float | None = None
    limit: float | None = None
    step: int = 0


@dataclass
class Rules:
    """The rules of a config. They remember how full the disk was, and the last crash."""

    options: Alerts
    _free: list[tuple[float, int]] = field(default_factory=list)  # (time, free bytes) of the last hour
    _crash_step: int = -1  # of the last crash

    def judge(self, seen: Seen) -> Iterator[Finding]:
        """Yield a finding for each rule and each thing it looks at, in the order in which they happened."""
        options = self.options
        for record in seen.steps:
            yield from _judge_step(options, record)
        if options.no_step_for is not None:
            yield _judge_silence(options.no_step_for, seen)
        if options.goodput_below is not None and seen.account is not None:
            yield from _judge_goodput(options.goodput_below, options.goodput_grace, seen, seen.account)
        if seen.free_bytes is not None:
            yield from self._judge_disk(seen, seen.free_bytes)
        if options.crashed:
            yield from self._judge_crashes(seen)
        if options.ended and (seen.ended or seen.stepped):
            yield Finding(
                rule="ended", broken=bool(seen.ended), text=f"{seen.ended}, after step {seen.step:,}", step=seen.step
            )

    def _judge_disk(self, seen: Seen, free: int) -> Iterator[Finding]:
        limit, hours_limit = self.options.disk_free_below, self.options.disk_full_within
        there_are = f"{free / GIB:.1f} GiB are free on the disk of the run"
        if limit is not None:
            yield Finding(
                rule="disk_free_below", broken=free < limit * GIB, value=free / GIB, limit=limit, step=seen.step,
                text=f"{there_are}; the limit is {limit:g} GiB",
            )  # fmt: skip
        self._free = [each for each in self._free if seen.now - each[0] <= TREND_SECONDS]
        self._free.append((seen.now, free))
        if hours_limit is not None:
            hours = hours_until_full(self._free)
            yield Finding(
                rule="disk_full_within", broken=hours < hours_limit, value=hours, limit=hours_limit, step=seen.step,
                text=f"{there_are}, which is full in {hours:.1f} hours at the pace of the last hour",
            )  # fmt: skip

    def _judge_crashes(self, seen: Seen) -> Iterator[Finding]:
        crashes = [event for event in seen.events if event.get("event") in CRASHES]
        for event in crashes:
            step = int(event.get("step") or 0)
            if step > self._crash_step >= 0:  # the run had recovered, perhaps within this look
                yield Finding(rule="crashed", broken=False, step=step)
            self._crash_step = step
            how = f"worker {event.get('rank')} {event.get('how')} at step {step}"
            text = how if event["event"] == "crashed" else str(event.get("why")).partition("; stacks in")[0]
            yield Finding(rule="crashed", broken=True, text=text, step=step)
        if seen.stepped and not crashes:
            yield Finding(rule="crashed", broken=False, step=seen.step)


def _judge_step(options: Alerts, record: StepRecord) -> Iterator[Finding]:
    loss, score = record.loss, record.spike_score
    if options.loss_above is not None:
        high = loss is None or not math.isfinite(loss) or loss > options.loss_above
        shown = "NaN or Inf" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"
        yield Finding(
            rule="loss_above", broken=high, value=loss, limit=options.loss_above, step=record.step,
            text=f"loss {shown} at step {record.step:,}; the limit is {options.loss_above:g}",
        )  # fmt: skip
    if options.spike_above is not None and score is not None:
        limit = options.spike_above
        yield Finding(
            rule="spike_above", broken=not score <= limit, value=score, limit=limit, step=record.step,
            text=f"spike at step {record.step:,}: loss {loss:.4f}, spike score {score:.1f}; the limit is {limit:g}",
        )  # fmt: skip


def _judge_silence(limit: float, seen: Seen) -> Finding:
    silent = seen.stepless_seconds
    after = f"after step {seen.step:,}" if seen.step else "since the start"
    text = f"no step for {duration(silent)} {after}; the limit is {duration(limit)}"
    broken = silent > limit and not seen.ended
    return Finding(rule="no_step_for", broken=broken, value=silent, limit=limit, step=seen.step, text=text)


def _judge_goodput(limit: float, grace_seconds: float, seen: Seen, account: Account) -> Iterator[Finding]:
    value = account.goodput
    if account.total / 1e6 < grace_seconds:
        return
    worst = max((c for c in account.spent if c != "step"), key=lambda category: account.spent[category])
    yield Finding(
        rule="goodput_below", broken=value < limit, value=value, limit=limit, step=seen.step,
        text=f"goodput {100 * value:.1f}%; the limit is {100 * limit:g}%. The largest other part is {worst}, "
        f"{duration(account.spent[worst] / 1e6)}",
    )  # fmt: skip


def hours_until_full(free: Sequence[tuple[float, int]]) -> float:
    """Return when a disk is full if it fills as in `free`, pairs of time and free bytes; infinite if it does not fill."""
    (begin, before), (end, now) = free[0], free[-1]
    if end - begin < FEWEST_SECONDS or now >= before:
        return math.inf
    return now * (end - begin) / (before - now) / 3600
