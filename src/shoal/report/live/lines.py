"""The live view without a terminal: a line at each interval, at each change of phase, and for each alert. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from shoal.report.live.state import State
from shoal.run.console import duration
from shoal.system.output import on_one_line

ENDED: Final = ("finished", "stopped", "crashed")


class Lines:
    """Turns the states of a run into lines. quiet: only changes of its condition, alerts and the result."""

    def __init__(self, every_seconds: float, *, quiet: bool = False) -> None:
        self._every, self._quiet = every_seconds, quiet
        self._due = 0.0
        self._condition = self._phase = ""
        self._alerts: set[str] = set()

    def of(self, state: State, now: float) -> Iterator[str]:
        """Yield the lines that are due."""
        name = on_one_line(state.name)
        raised = {str(each.get("rule")): each for each in state.alerts}
        for rule, alert in raised.items():
            if rule not in self._alerts:
                yield f"{name}: alert: {on_one_line(alert.get('text', rule))}"
        for rule in self._alerts - raised.keys():
            yield f"{name}: alert is over: {rule}"
        self._alerts = set(raised)
        phase = state.phase.name if state.phase else ""
        changed = state.condition != self._condition
        if changed or (not self._quiet and (phase != self._phase or now >= self._due)):
            yield summary(state)
            self._due = now + self._every
        self._condition, self._phase = state.condition, phase


def summary(state: State) -> str:
    """Return the state in one line, with units."""
    parts = [f"{on_one_line(state.name)}: {state.condition}"]
    if state.phase is not None and state.phase.name != "training":
        share = f" {100 * state.phase.done / state.phase.total:.0f}%" if state.phase.total else ""
        parts.append(f"{on_one_line(state.phase.name)}{share}")
    if state.step or state.total_steps:
        parts.append(f"step {state.step:,}" + (f"/{state.total_steps:,}" if state.total_steps else ""))
    if state.loss is not None:
        parts.append(f"loss {state.loss:.4f}")
    if state.val_loss is not None:
        parts.append(f"held-out {state.val_loss:.4f}")
    if state.tokens_per_second is not None:
        parts.append(f"{state.tokens_per_second:,.0f} tokens/s")
    if state.mfu is not None:
        parts.append(f"MFU {100 * state.mfu:.1f}%")
    if peak := (state.peak_memory_bytes or state.memory_bytes):
        parts.append(f"{max(peak) / 2**30:.2f} GiB")
    if state.goodput is not None:
        parts.append(f"goodput {100 * state.goodput:.1f}%")
    if state.left_seconds is not None:
        parts.append(f"{duration(state.left_seconds)} left")
    if state.why:
        parts.append(on_one_line(state.why))
    return "  ".join(parts)
