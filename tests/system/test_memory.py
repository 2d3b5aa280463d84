"""The memory that new processes may take, by the machine and by cgroups of both versions."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from shoal.system.memory import available_bytes, left_in

VERSIONS = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_cgroup_leaves(version: str, tmp_path: Path) -> None:
    limit, usage, cache = VERSIONS[version]
    (tmp_path / limit).write_text("1000\n")
    (tmp_path / usage).write_text("700\n")
    (tmp_path / "memory.stat").write_text(f"anon 600\n{cache} 100\n")
    assert left_in(tmp_path) == 400  # the kernel gives file caches back
    (tmp_path / usage).write_text("1200\n")
    assert left_in(tmp_path) == 0


def test_a_cgroup_without_a_limit(tmp_path: Path) -> None:
    assert left_in(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert left_in(tmp_path) is None


def test_this_machine() -> None:
    assert 0 < available_bytes() <= psutil.virtual_memory().total
