"""Limits of cgroups for what runs on a host, in both versions of cgroups."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.clinic import Clinic

ROOT = Path("/sys/fs/cgroup")


def memory_limit(clinic: Clinic, name: str, count: int) -> contextlib.AbstractContextManager[None]:
    """Limit the memory of a host's commands, in bytes."""
    return _limited(clinic, name, "memory", {"memory.limit_in_bytes": str(count)}, {"memory.max": str(count)})


def cpu_share(clinic: Clinic, name: str, share: float) -> contextlib.AbstractContextManager[None]:
    """Limit the CPU time of a host's commands to a share of one core."""
    quota = str(int(100_000 * share))
    first = {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": quota}
    return _limited(clinic, name, "cpu", first, {"cpu.max": f"{quota} 100000"})


@contextlib.contextmanager
def _limited(clinic: Clinic, name: str, kind: str, first: dict[str, str], second: dict[str, str]) -> Iterator[None]:
    """first, second: files and their contents in version 1 and 2. Skips the test if cgroups cannot be made."""
    old = (ROOT / kind).is_dir()
    group = (ROOT / kind if old else ROOT) / f"clinic-{os.getpid()}-{name}"
    try:
        if not old:
            (ROOT / "cgroup.subtree_control").write_text(f"+{kind}")
        group.mkdir()
        for file, text in (first if old else second).items():
            (group / file).write_text(text)
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"cgroups cannot be made here: {error}")
    try:
        with clinic.profile(name, f"echo $$ > {group}/cgroup.procs"):
            yield
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                group.rmdir()
                break
            os.sched_yield()
