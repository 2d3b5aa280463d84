"""The memory that a piece of work takes, as torch's CPU allocator sees it."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated_bytes(work: Callable[[], object]) -> int:
    """Return the peak memory during `work()`, minus the memory held before it. CPU tensors only."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    grown = most = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        grown += event.nbytes()
        most = max(most, grown)
    return most
