"""Which module's forward allocated the memory that a rank holds at the peak of the recorded steps. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from shoal.metrics.profile.trace import Change, Trace


@dataclass(frozen=True)
class Peak:
    """The moment at which the recorded steps hold most of the memory that they have allocated."""

    seconds: float  # from the first step's begin
    bytes: int
    by_module: dict[str, int]  # allocated in the forward of each module, without the modules inside it
    other_bytes: int  # allocated elsewhere


def find_peak(trace: Trace, device: int) -> Peak:
    """
    Follow each allocation to its release, and return the peak.

    device: type of the device whose memory counts: 0 is the CPU. Memory allocated before the recording is not counted.
    """
    changes = [each for each in trace.changes if each.device == device]
    live: dict[int, Change] = {}
    now = most = at = 0
    for number, change in enumerate(changes):
        now += _apply(change, live)
        if now > most:
            most, at = now, number + 1
    live.clear()
    for change in changes[:at]:
        _apply(change, live)
    by_module: Counter[str] = Counter()
    for change in live.values():
        by_module[_forward_module(change)] += change.size
    other = by_module.pop("", 0)
    seconds = (changes[at - 1].time - trace.start) * 1e-6 if at else 0.0
    return Peak(seconds, most, dict(by_module), other)


def _apply(change: Change, live: dict[int, Change]) -> int:
    """Note an allocation or a release in `live`; return by how many bytes it changes what is live."""
    freed = live.pop(change.address, None)  # before an allocation, too: its release may not have been recorded
    if change.size > 0:
        live[change.address] = change
    return max(change.size, 0) - (freed.size if freed is not None else 0)


def _forward_module(change: Change) -> str:
    """Return the module whose forward made this allocation; "" for anything else."""
    span = change.span
    return span.module if span is not None and span.phase == "forward" else ""
