"""How much memory new processes may take. No torch."""

from __future__ import annotations

from pathlib import Path

from shoal.system.cpu import cgroups

# A cgroup's files: its limit, what it uses, and in memory.stat the part that the kernel would give back (file caches)
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes() -> int:
    """Return the memory of this machine that is available now, within the limits of this process's cgroups."""
    import psutil

    return min(
        [int(psutil.virtual_memory().available), *(left for g in cgroups("memory") if (left := left_in(g)) is not None)]
    )


def left_in(group: Path) -> int | None:
    """Return the bytes that a cgroup's limit leaves; None without one."""
    for limit, usage, cache in _FILES:
        try:
            most, used = (int((group / name).read_text()) for name in (limit, usage))
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # another cgroup version, or "max"
            continue
        return max(0, most - used + int(stat.get(cache, 0)))
    return None
