"""The memory of this process: on its GPU as torch's allocator counts it, or resident in main memory on a CPU."""

from __future__ import annotations

import os
import resource
import sys
from typing import NamedTuple

import psutil
import torch


class Memory(NamedTuple):
    """Bytes in use and held, now and at most since the process started. On a CPU nothing is held beyond what is in use."""

    used: int
    peak_used: int
    reserved: int = 0
    peak_reserved: int = 0


def memory_of(device: torch.device) -> Memory:
    """Return this process's memory. The host does not wait for the device: these are counts of torch's allocator."""
    if device.type == "cuda":
        counts = torch.cuda.memory_stats_as_nested_dict(device)  # a few microseconds; `memory_stats` sorts all counts
        if not counts:  # nothing was allocated yet
            return Memory(0, 0)
        used, held = (counts[name]["all"] for name in ("allocated_bytes", "reserved_bytes"))
        return Memory(used["current"], used["peak"], held["current"], held["peak"])
    used = _resident()
    return Memory(used, max(used, peak_bytes(device)))  # the kernel updates the peak a little later


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: on the device, or resident memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _resident() -> int:
    """Return the bytes of this process in main memory."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return int(psutil.Process().memory_info().rss)
