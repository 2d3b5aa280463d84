"""The kernel's count of out-of-memory kills, in the formats of cgroup v1, cgroup v2 and /proc/vmstat."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.elastic.oom import kernel_kills

VMSTAT = "nr_free_pages 1\noom_kill 7\nnuma_hit 2\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/user.slice/job\n", {"user.slice/job/memory.events": "low 0\noom 3\noom_kill 2\noom_group_kill 0\n"}, 2),
        ("0::/\n", {"memory.events": "oom_kill 1\n"}, 1),  # in a container
        (
            "4:cpu,memory:/job\n0::/\n",
            {"memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"},
            5,
        ),
        ("0::/\n", {}, 7),  # no cgroup: the whole machine's count
        ("0::/gone\n", {}, 7),
    ],
)
def test_the_count_is_of_the_group_that_the_workers_are_in(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    for name, text in {"proc/self/cgroup": groups, "proc/vmstat": VMSTAT}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert kernel_kills(tmp_path) == expected


def test_where_nothing_is_said_nobody_was_ended(tmp_path: Path) -> None:
    assert kernel_kills(tmp_path) == 0
    assert kernel_kills() >= 0
