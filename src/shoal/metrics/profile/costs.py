"""What the recorded steps of a rank cost: by operator, by module and by phase, and how much communication was hidden. No torch."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from shoal.metrics.profile.intervals import Interval, intersection, length, union, without
from shoal.metrics.profile.records import ModuleCost, OperatorCost, Overlap, Timeline
from shoal.metrics.profile.trace import BACKWARD_NODE, Span, Trace, backward_lanes
from shoal.run.phases import PHASES

MICRO: Final = 1e-6
MOST_OPERATORS: Final = 50
MOST_RANGES: Final = 2000
MOST_COLLECTIVES: Final = 500

Sums = defaultdict[str, float]  # amounts by name


def most_of(sums: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    """Return the names with the largest amounts, the largest first."""
    return sorted(sums.items(), key=lambda item: -item[1])[:count]


def operators(trace: Trace, *, on_device: bool) -> list[OperatorCost]:
    """Return the dearest operators of the recorded steps: by their kernels' time on a GPU, by their own time on a CPU."""
    calls: Counter[str] = Counter()
    cpu: Sums = defaultdict(float)
    device: Sums = defaultdict(float)
    by_module: dict[str, Sums] = defaultdict(lambda: defaultdict(float))
    for span in trace.spans:
        if span.kind == "op":
            calls[span.name] += 1
            cpu[span.name] += span.self_time
        elif span.kind == "kernel":
            device[launcher(span)] += span.stop - span.start
        if span.kind == ("kernel" if on_device else "op"):
            time = span.stop - span.start if on_device else span.self_time
            by_module[launcher(span)][kind_of(span.module)] += time
    ranked = device if on_device else cpu
    whole = sum(step.stop - step.start for step in trace.steps) or 1.0
    return [
        _cost(name, calls[name], cpu[name], device[name], time / whole, by_module[name])
        for name, time in most_of(ranked, MOST_OPERATORS)
    ]


def launcher(span: Span) -> str:
    """Return the name of an operator or, for a kernel, of the operator that launched it."""
    return span.parent.name if span.kind == "kernel" and span.parent is not None else span.name


def _cost(name: str, calls: int, cpu: float, device: float, share: float, modules: Sums) -> OperatorCost:
    [(module, time)] = most_of(modules, 1) or [("", 0.0)]
    return OperatorCost(
        name=name, calls=calls, cpu_seconds=cpu * MICRO, device_seconds=device * MICRO, share=share, module=module,
        module_share=time / (sum(modules.values()) or 1.0),
    )  # fmt: skip


def kind_of(module: str) -> str:
    """Return a module's name with * for the number of its block."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", module)


def outside_operators(trace: Trace) -> float:
    """Return the seconds of the recorded steps in which their thread ran no operator: Python and waits."""
    steps = union((step.start, step.stop) for step in trace.steps)
    thread = trace.steps[0].thread if trace.steps else None
    # an operator around a named range may wait inside it, as FSDP2's hooks do: only operators inside count then
    tops = [s for s in trace.spans if s.kind == "op" and s.thread == thread]
    busy = union(interval for span in tops for interval in own_time(span))
    return (length(steps) - length(intersection(steps, busy))) * MICRO


def own_time(span: Span) -> list[Interval]:
    """Return the intervals of an operator outside of the named ranges in it."""
    return without((span.start, span.stop), [(c.start, c.stop) for c in span.children if c.kind == "range"])


def modules(trace: Trace) -> list[ModuleCost]:
    """Return the cost of each module with its inner ones, in the order of the model."""
    calls: Counter[str] = Counter()
    forward: Sums = defaultdict(float)
    backward: Sums = defaultdict(float)
    known = frozenset(trace.modules)
    for span in trace.spans:
        if span.kind == "range" and span.name in known:
            calls[span.name] += 1
            if span.phase != "backward":
                forward[span.name] += span.stop - span.start
    for name, start, stop in backward_lanes(trace):
        backward[name] += stop - start
    return [
        ModuleCost(name=m, calls=calls[m], forward_seconds=forward[m] * MICRO, backward_seconds=backward[m] * MICRO)
        for m in trace.modules
        if calls[m]
    ]


def phases(trace: Trace) -> dict[str, float]:
    """Return the seconds of each phase in the recorded steps."""
    spent = dict.fromkeys(PHASES, 0.0)
    for span in _phase_ranges(trace):
        spent[span.name] += (span.stop - span.start) * MICRO
    return spent


def _phase_ranges(trace: Trace) -> list[Span]:
    return [s for s in trace.spans if s.kind == "range" and s.name in PHASES and s.name == s.phase]


def overlap(trace: Trace) -> Overlap:
    """Return how much communication was hidden behind computing; see `Overlap` for both terms."""
    communication = union((span.start, span.stop) for span in trace.spans if transfers(span))
    compute = union(interval for span in trace.spans for interval in computing(span, trace))
    hidden = length(intersection(communication, compute))
    return Overlap(
        communication_seconds=length(communication) * MICRO, compute_seconds=length(compute) * MICRO,
        hidden_seconds=hidden * MICRO,
    )  # fmt: skip


def transfers(span: Span) -> bool:
    """Return whether data moves between ranks in this span: a kernel of NCCL, or a transfer on a thread of gloo."""
    return span.is_communication and span.kind in ("kernel", "range")


def computing(span: Span, trace: Trace) -> list[Interval]:
    """Return the intervals in which this span itself computes."""
    if trace.on_device:
        return [(span.start, span.stop)] if span.kind == "kernel" and not span.is_communication else []
    if span.kind != "op" or span.is_communication or span.name.startswith(BACKWARD_NODE):
        return []
    if any(each.is_communication for each in (*span.children, *span.above())):
        return []  # it waits for the collective that it calls, or is a part of a transfer
    return own_time(span)


def timeline(trace: Trace) -> Timeline:
    """Return the largest ranges: steps, phases in them, and modules in forward and backward."""
    start = trace.start
    found = [(0, s.start, s.stop, s.name) for s in trace.steps]
    found += [(1, s.start, s.stop, s.name) for s in _phase_ranges(trace)]
    known = frozenset(trace.modules)
    for span in trace.spans:
        if span.kind == "range" and span.name in known and span.phase != "backward":
            depth = 2 + sum(each.name in known for each in span.above())
            found.append((depth, span.start, span.stop, span.name))
    found += _nested(backward_lanes(trace))
    moved = sorted((s.stop - s.start, s.start, s.name) for s in trace.spans if transfers(s))[::-1]
    kept = sorted(sorted(found, key=lambda r: r[1] - r[2])[:MOST_RANGES], key=lambda r: (r[1], r[0]))
    names = sorted({r[3] for r in kept} | {name for *_, name in moved[:MOST_COLLECTIVES]})
    index = {name: number for number, name in enumerate(names)}
    return Timeline(
        names=names,
        ranges=[[depth, *_place(a, b - a, start), index[name]] for depth, a, b, name in kept],
        collectives=sorted([*_place(a, spent, start), index[name]] for spent, a, name in moved[:MOST_COLLECTIVES]),
        dropped=max(0, len(found) - MOST_RANGES) + max(0, len(moved) - MOST_COLLECTIVES),
    )


def _nested(lanes: Sequence[tuple[str, float, float]]) -> list[tuple[int, float, float, str]]:
    """Return the lanes with their depths below the phase."""
    found: list[tuple[int, float, float, str]] = []
    open_: list[float] = []
    for name, start, stop in sorted(lanes, key=lambda lane: (lane[1], -lane[2], len(lane[0]))):
        while open_ and open_[-1] <= start:
            open_.pop()
        found.append((2 + len(open_), start, stop, name))
        open_.append(stop)
    return found


def _place(start: float, spent: float, origin: float) -> tuple[float, float]:
    """Return begin and duration in seconds, to 0.1 microseconds."""
    return round((start - origin) * MICRO, 7), round(spent * MICRO, 7)
