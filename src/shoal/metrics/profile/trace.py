"""
Reads the trace of a rank: spans of time with the step, phase and module that each belongs to. No torch.

The file has the trace-event format, as torch's profiler writes it: operators, named ranges, GPU kernels and changes of memory.
A span of backward belongs to the module whose forward made its autograd node: both carry the node's sequence number.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from shoal.run.phases import PHASES
from shoal.system.disk import write_whole

BACKWARD_NODE: Final = "autograd::engine::evaluate_function: "
COMMUNICATION: Final = ("c10d::", "_c10d_functional::", "c10d_functional::", "record_param_comms")
TRANSFER: Final = ("gloo:", "mpi:", "ucc:")  # named ranges around a transfer, on the threads of the library
_STEP: Final = re.compile(r"step (\d+)")
_FSDP: Final = re.compile(r"FSDP::\S+ .*?\(?([\w.]+)\)?$")
_DEVICE: Final = ("kernel", "gpu_memcpy", "gpu_memset")
LANE: Final = "modules in backward"


@dataclass(slots=True, eq=False)
class Span:
    """An operator, a named range, or a kernel; times in microseconds."""

    name: str
    kind: str  # "op", "range" or "kernel"
    start: float
    stop: float
    thread: Any
    parent: Span | None = None
    children: list[Span] = field(default_factory=list)
    step: int = 0  # 0: outside of steps
    phase: str = ""
    module: str = ""
    external: int = 0  # of an operator: the id by which its kernels name it

    @property
    def self_time(self) -> float:
        """Microseconds outside of its children."""
        return self.stop - self.start - sum(each.stop - each.start for each in self.children)

    @property
    def is_communication(self) -> bool:
        """Whether it is a call of a collective, or the transfer of one."""
        if self.kind == "kernel":
            return "nccl" in self.name.lower()
        return self.name.startswith(COMMUNICATION if self.kind == "op" else TRANSFER)

    def above(self) -> Iterator[Span]:
        """Yield the spans around this one, innermost first."""
        around = self.parent
        while around is not None:
            yield around
            around = around.parent


@dataclass(slots=True)
class Change:
    """Memory that was allocated (bytes > 0) or freed."""

    time: float  # microseconds
    size: int
    address: int
    device: int  # type of the device: 0 is the CPU
    span: Span | None  # the innermost span around it


@dataclass
class Trace:
    """A rank's spans in the order of their starts, and changes of memory."""

    spans: list[Span]
    changes: list[Change]
    modules: Sequence[str]
    on_device: bool = False  # whether it holds kernels of a GPU

    @functools.cached_property
    def steps(self) -> list[Span]:
        """The ranges of whole steps."""
        return [span for span in self.spans if span.kind == "range" and _STEP.fullmatch(span.name)]

    @property
    def start(self) -> float:
        """Begin of the first step in microseconds, or of the trace if it holds no step."""
        return min((span.start for span in self.steps or self.spans), default=0.0)


def read_events(path: Path) -> dict[str, Any]:
    """Read a trace, compressed or not. Raises `OSError`, and `ValueError` if it is not JSON."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


def separate_transfers(events: dict[str, Any]) -> None:
    """
    Move transfers off the thread of the steps, in place.

    gloo records a send from its call to its end, which outlasts the operator around it. Complete events of a thread must nest.
    """
    listed: list[dict[str, Any]] = events["traceEvents"]
    steps = next((e for e in listed if e.get("ph") == "X" and _STEP.fullmatch(e["name"])), None)
    if steps is None:
        return
    moved = [
        e for e in listed if e.get("tid") == steps["tid"] and e.get("ph") == "X" and e["name"].startswith(TRANSFER)
    ]
    first, ends = _free_lane(listed), [0.0]
    for event in sorted(moved, key=lambda e: float(e["ts"])):
        lane = next((number for number, end in enumerate(ends) if end <= event["ts"]), len(ends))
        ends[lane:lane] = [] if lane < len(ends) else [0.0]
        ends[lane] = event["ts"] + event["dur"]
        event["tid"] = first + lane
    if moved:
        for lane in range(len(ends)):
            listed += _lane_names(steps, first + lane, f"transfers {lane}")


def _free_lane(listed: Iterable[Mapping[str, Any]]) -> int:
    """Return a number that no thread of the trace has, nor any above it."""
    return 1 + max((e["tid"] for e in listed if isinstance(e.get("tid"), int)), default=0)


def _lane_names(like: Mapping[str, Any], lane: int, name: str) -> list[dict[str, Any]]:
    """Return the events that name a lane, and place it after the other threads."""
    about = {"ph": "M", "pid": like["pid"], "tid": lane, "ts": like["ts"]}
    return [
        {**about, "name": "thread_name", "args": {"name": name}},
        {**about, "name": "thread_sort_index", "args": {"sort_index": lane}},
    ]


def build(events: Iterable[Mapping[str, Any]], modules: Collection[str]) -> Trace:
    """Nest the spans of each thread, and find the step, phase and module of each. modules: names of ranges of modules."""
    timed = [e for e in events if e.get("ph") in ("X", "i") and e.get("cat") in _KINDS]
    timed.sort(key=lambda e: (e["ts"], -e.get("dur", 0)))
    owners = _Owners(frozenset(modules))
    trace = Trace([], [], [*modules])
    stacks: dict[Any, list[Span]] = defaultdict(list)
    kernels = []
    for event in timed:
        if event["cat"] in _DEVICE:
            kernels.append(event)
            continue
        stack = stacks[event["tid"]]
        while stack and stack[-1].stop <= event["ts"]:
            stack.pop()
        if event["ph"] == "i":
            if event["name"] == "[memory]":
                trace.changes.append(_change(event, stack[-1] if stack else None))
            continue
        span = _span(event, stack[-1] if stack else None)
        owners.claim(span, event.get("args", {}))
        stack.append(span)
        trace.spans.append(span)
    _place_threads(trace.spans)
    trace.spans += _kernels(kernels, trace.spans)
    trace.on_device = bool(kernels)
    return trace


_KINDS: Final = {
    "cpu_op": "op",
    "user_annotation": "range",
    "cpu_instant_event": "",
    **dict.fromkeys(_DEVICE, "kernel"),
}


def _span(event: Mapping[str, Any], parent: Span | None) -> Span:
    start, stop = event["ts"], event["ts"] + event["dur"]
    if parent is not None:
        stop = min(stop, parent.stop)  # times are rounded
    kind = _KINDS[event["cat"]]
    span = Span(
        event["name"], kind, start, stop, event["tid"], parent, external=event.get("args", {}).get("External id", 0)
    )
    if parent is not None:
        parent.children.append(span)
        span.step, span.phase, span.module = parent.step, parent.phase, parent.module
    return span


def _change(event: Mapping[str, Any], span: Span | None) -> Change:
    args = event["args"]
    return Change(event["ts"], int(args["Bytes"]), int(args["Addr"]), int(args["Device Type"]), span)


class _Owners:
    """Decides which step, phase and module a span belongs to. Spans must come in the order of their starts."""

    def __init__(self, modules: frozenset[str]) -> None:
        self._modules = modules
        self._made_in: dict[int, str] = {}  # module that ran when the autograd node of this sequence number was made
        self._last: dict[Any, str] = {}  # module of each thread's last node of backward

    def claim(self, span: Span, args: Mapping[str, Any]) -> None:
        """Set the span's owners, if they differ from those of the span around it."""
        if span.kind == "range":
            self._of_range(span)
        elif span.kind == "op":
            self._of_operator(span, args)

    def _of_range(self, span: Span) -> None:
        if found := _STEP.fullmatch(span.name):
            span.step, span.phase, span.module = int(found[1]), "", ""
        elif span.name in PHASES and span.phase == "":
            span.phase, span.module = span.name, ""
        elif span.name in self._modules:
            span.module = span.name
        elif (fsdp := _FSDP.fullmatch(span.name)) and fsdp[1] in self._modules:
            span.module = fsdp[1]

    def _of_operator(self, span: Span, args: Mapping[str, Any]) -> None:
        number = args.get("Sequence number")
        if args.get("Fwd thread id"):  # an autograd node in backward
            span.module = self._last[span.thread] = self._made_in.get(number, span.module) if number is not None else ""
            if span.parent is not None and span.parent.name.startswith(BACKWARD_NODE):
                span.parent.module = span.module  # FSDP2's hooks hide the number of the node itself
        elif span.name.startswith(BACKWARD_NODE):
            span.module = self._last.get(span.thread, span.module)
        elif number is not None:
            self._made_in[number] = span.module  # several operators may carry a number; the last one makes the node


def _place_threads(spans: Sequence[Span]) -> None:
    """Give spans of threads without phases of their own, such as autograd's and gloo's, the phase that runs at their start."""
    phases = [s for s in spans if s.kind == "range" and s.name in PHASES and s.phase == s.name]
    at = 0
    for span in spans:
        if span.phase or not phases:
            continue
        while at + 1 < len(phases) and phases[at + 1].start <= span.start:
            at += 1
        if phases[at].start <= span.start < phases[at].stop and span.thread != phases[at].thread:
            span.phase, span.step = phases[at].phase, phases[at].step


def _kernels(events: Iterable[Mapping[str, Any]], spans: Sequence[Span]) -> Iterator[Span]:
    """Yield the kernels, each with the owners of the operator that launched it."""
    launched_by = {span.external: span for span in spans if span.kind == "op" and span.external}
    for event in events:
        by = launched_by.get(event.get("args", {}).get("External id", 0))
        kernel = Span(event["name"], "kernel", event["ts"], event["ts"] + event["dur"], event["tid"], by)
        if by is not None:
            kernel.step, kernel.phase, kernel.module, kernel.external = by.step, by.phase, by.module, by.external
        yield kernel


def backward_lanes(trace: Trace) -> list[tuple[str, float, float]]:
    """
    Return (module, start, stop) of each module's turn in backward, nested: "blocks.3" around "blocks.3.ffn".

    Consecutive nodes of one module are one turn.
    """
    nodes = [s for s in trace.spans if s.name.startswith(BACKWARD_NODE) and s.module]
    lanes: list[tuple[str, float, float]] = []
    open_: list[tuple[str, float]] = []
    last_stop, last_phase = 0.0, None
    for node in nodes:
        phase = next((s for s in node.above() if s.name in PHASES), None)
        names = ancestors(node.module, trace.modules) if phase is last_phase else []
        while open_ and (len(open_) > len(names) or open_[-1][0] != names[len(open_) - 1]):
            name, start = open_.pop()
            lanes.append((name, start, last_stop))
        names = ancestors(node.module, trace.modules)
        open_ += [(name, node.start) for name in names[len(open_) :]]
        last_stop, last_phase = node.stop, phase
    lanes += [(name, start, last_stop) for name, start in reversed(open_)]
    return lanes


def ancestors(module: str, modules: Collection[str]) -> list[str]:
    """Return the modules with a range around `module`, outermost first, and itself."""
    parts = module.split(".")
    found = [".".join(parts[: n + 1]) for n in range(len(parts))]
    known = frozenset(modules)
    return [name for name in found if name in known or name == module]


def enrich(events: dict[str, Any], trace: Trace, rank: int) -> None:
    """Name the rank and its threads in the trace, and add a lane of modules in backward, in place."""
    listed: list[dict[str, Any]] = events["traceEvents"]
    steps = trace.steps
    if not steps:
        return
    pid = next(e["pid"] for e in listed if e.get("name") == steps[0].name)
    threads = {s.thread: "transfers" for s in trace.spans if s.is_communication and s.kind == "range"}
    threads[steps[0].thread] = "steps"
    for event in listed:
        if event.get("ph") == "M" and event.get("pid") == pid:
            if event["name"] == "process_name":
                event["args"]["name"] = f"rank {rank}"
            elif event["name"] == "thread_name" and event.get("tid") in threads:
                event["args"]["name"] = f"{threads[event['tid']]} ({event['tid']})"
    if lanes := backward_lanes(trace):
        lane = _free_lane(listed)
        listed += _lane_names(next(e for e in listed if e.get("name") == steps[0].name), lane, LANE)
        listed += [
            {
                "ph": "X",
                "cat": "backward",
                "name": name,
                "pid": pid,
                "tid": lane,
                "ts": start,
                "dur": stop - start,
                "args": {},
            }
            for name, start, stop in lanes
        ]


def write_events(path: Path, events: Mapping[str, Any]) -> int:
    """Write a compressed trace; return its size in bytes. Raises `OSError`."""
    packed = gzip.compress(json.dumps(events).encode(), compresslevel=6)
    write_whole(path, [packed])
    return len(packed)
