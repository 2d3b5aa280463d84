"""The memory that a piece of work takes, as torch's CPU allocator sees it."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "the work that is measured"


def allocated_bytes(work: Callable[[], object]) -> int:
    """Return the peak memory during `work()`, minus the memory held before it. CPU tensors only."""
    gc.collect()
    with _messages_freed_here(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    grown = most = 0
    for _, size in _events(profiler):
        grown += size
        most = max(most, grown)
    return most


def most_alive(before: Callable[[], object], work: Callable[[], object]) -> int:
    """Return the peak memory during `work()`, with what `before()` has allocated and not freed. CPU tensors only."""
    gc.collect()  # what an earlier run left must not be freed meanwhile: it would count as negative
    with _messages_freed_here(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        before()
        with record_function(_MARK):
            work()
    found = _found(profiler)
    [begun] = [e.start_ns() for e in found if e.name() == _MARK]
    alive = most = 0
    for at, size in _events(profiler):
        alive += size
        if at > begun:
            most = max(most, alive)
    return most


def _found(profiler: Any) -> list[Any]:
    """Return all that the profiler recorded."""
    events: list[Any] = profiler.profiler.kineto_results.events()
    return events


def _events(profiler: profile) -> list[tuple[int, int]]:
    """Return (time in ns, bytes allocated or, negative, freed) in order."""
    return sorted((e.start_ns(), e.nbytes()) for e in _found(profiler) if e.name() == "[memory]")


@contextlib.contextmanager
def _messages_freed_here() -> Iterator[None]:
    """
    Let gloo's thread drop a message before this thread does.

    Whichever is last frees its memory, and the profiler records only what this thread frees.
    """
    wait = dist.Work.wait

    def patient(work: dist.Work, *rest: object) -> bool:
        done: bool = wait(work, *rest)  # type: ignore[arg-type]
        time.sleep(0.002)
        return done

    dist.Work.wait = patient  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
