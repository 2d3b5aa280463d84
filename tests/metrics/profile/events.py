"""Events of traces for tests, and a check of the trace-event format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

MAIN, GLOO, STREAM = 1, 2, 7


def op(name: str, start: float, dur: float, tid: int = MAIN, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 9, "tid": tid, "ts": start, "dur": dur, "args": args}


def span(name: str, start: float, dur: float, tid: int = MAIN) -> dict[str, Any]:
    return {**op(name, start, dur, tid), "cat": "user_annotation"}


def kernel(name: str, start: float, dur: float, external: int = 0, tid: int = STREAM) -> dict[str, Any]:
    return {**op(name, start, dur, tid), "cat": "kernel", "pid": 0, "args": {"External id": external}}


def memory(at: float, size: int, address: int, device: int = 0) -> dict[str, Any]:
    args = {"Bytes": size, "Addr": address, "Device Type": device}
    return {
        "ph": "i",
        "cat": "cpu_instant_event",
        "name": "[memory]",
        "s": "t",
        "pid": 9,
        "tid": MAIN,
        "ts": at,
        "args": args,
    }


def problems_of(trace: dict[str, Any]) -> list[str]:
    """
    Return what violates the trace-event format: a wrong type, or complete events of a thread that overlap without nesting.

    Written from the format's description, not from the code under test.
    """
    found = []
    threads: dict[tuple[Any, Any], list[tuple[float, float, str]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        phase, name = event.get("ph"), event.get("name")
        if phase not in ("X", "i", "M", "s", "f", "t", "C"):
            found.append(f"{name}: ph {phase}")
        if not isinstance(name, str) or "pid" not in event or "tid" not in event:
            found.append(f"{name}: no name, pid or tid")
        if not isinstance(event.get("ts"), int | float):
            found.append(f"{name}: ts {event.get('ts')}")
        if phase == "X":
            if not isinstance(event.get("dur"), int | float) or event["dur"] < 0:
                found.append(f"{name}: dur {event.get('dur')}")
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"], name))
        if phase == "i" and event.get("s") not in ("g", "p", "t"):
            found.append(f"{name}: scope {event.get('s')}")
        if phase == "M" and not isinstance(event.get("args"), dict):
            found.append(f"{name}: metadata without args")
    for events in threads.values():
        found += _crossings(sorted(events, key=lambda e: (e[0], -e[1])))
    return found


def _crossings(events: Sequence[tuple[float, float, str]]) -> list[str]:
    found: list[str] = []
    open_: list[tuple[float, str]] = []
    for start, stop, name in events:
        while (
            open_ and open_[-1][0] <= start + 0.002
        ):  # the file has nanoseconds, as a double of microseconds since the start
            open_.pop()
        if open_ and stop > open_[-1][0] + 0.002:
            found.append(f"{name} begins in {open_[-1][1]} and ends after it")
        open_.append((stop, name))
    return found
