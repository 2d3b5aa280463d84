"""The count of processes killed by the kernel's out-of-memory killer. No torch."""

from __future__ import annotations

import re
from pathlib import Path


def kernel_kills(root: Path = Path("/")) -> int:
    """
    Return how many processes the kernel's out-of-memory killer has killed so far.

    Counts this process's memory cgroup, which includes its children, or the whole machine if there is no such cgroup.
    Returns 0 if the kernel reports no count.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text("utf-8")
    except OSError:
        return 0
    files = [root / "proc/vmstat"]
    if found := re.search(r"^0::/(.*)$", groups, re.MULTILINE):
        files.insert(0, root / "sys/fs/cgroup" / found[1] / "memory.events")
    if found := re.search(r"^\d+:[\w,]*\bmemory\b[\w,]*:/(.*)$", groups, re.MULTILINE):
        files.insert(0, root / "sys/fs/cgroup/memory" / found[1] / "memory.oom_control")
    for file in files:
        try:
            count = re.search(r"^oom_kill (\d+)$", file.read_text("utf-8"), re.MULTILINE)
        except OSError:  # inside a container the paths may differ
            continue
        if count:
            return int(count[1])
    return 0
