"""Processes that the kernel ended for want of memory, as far as it can be seen from here. No torch."""

from __future__ import annotations

import re
from pathlib import Path


def kernel_kills(root: Path = Path("/")) -> int:
    """
    How many the kernel's out-of-memory killer has ended so far in this process's memory cgroup, where its children are
    too; on the whole machine where there is no such cgroup; 0 where it is not said.
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
        except OSError:  # a container's own view has other paths
            continue
        if count:
            return int(count[1])
    return 0
