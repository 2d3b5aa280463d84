"""The notes that launchers on several nodes leave for each other in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.run.starts import RECENT_SECONDS, Starts, start_id, started_with


def test_a_node_that_ended_is_known_to_those_who_started_with_it(tmp_path: Path) -> None:
    file = tmp_path / "run" / "launchers.jsonl"
    early, failed, late = (Starts(file, host, "") for host in ("node0", "node1", "node2"))
    assert early.problems() == {}
    failed.begin()
    failed.fail("there is no GPU")
    assert early.problems() == {"node1": "there is no GPU"}
    assert late.problems() == {"node1": "there is no GPU"}
    assert Starts(file, "node3", "").problems() == {"node1": "there is no GPU"}  # it came a little later
    assert failed.problems() == {}  # its own


def test_a_node_that_starts_again_has_no_problem(tmp_path: Path) -> None:
    file = tmp_path / "launchers.jsonl"
    waiting = Starts(file, "node0", "")
    Starts(file, "node1", "").fail("wrong")
    Starts(file, "node1", "").begin()
    assert waiting.problems() == {}


def test_an_error_of_an_earlier_start_is_none_of_this_one(tmp_path: Path) -> None:
    file = tmp_path / "launchers.jsonl"
    Starts(file, "node1", "").fail("wrong")
    notes = json.loads(file.read_text())
    file.write_text(json.dumps(notes | {"time": notes["time"] - RECENT_SECONDS - 1}) + "\n")
    assert Starts(file, "node0", "").problems() == {}
    Starts(file, "node1", "slurm-7-0").fail("wrong")
    assert Starts(file, "node0", "slurm-7-1").problems() == {}
    assert Starts(file, "node0", "slurm-7-0").problems() == {"node1": "wrong"}


def test_a_clock_an_hour_off_hides_no_error_that_is_written_later(tmp_path: Path) -> None:
    file = tmp_path / "launchers.jsonl"
    waiting = Starts(file, "node0", "")
    Starts(file, "node1", "").fail("the clocks differ")
    note = json.loads(file.read_text())
    file.write_text(json.dumps(note | {"time": note["time"] - 3600}) + "\n")
    assert waiting.problems() == {"node1": "the clocks differ"}


def test_a_launcher_finds_its_own_beginning_again(tmp_path: Path) -> None:
    """Hours may pass between a launcher's beginning and its wait for the others, while it prepares data."""
    file = tmp_path / "launchers.jsonl"
    Starts(file, "node0", "").begin()
    Starts(file, "node1", "").fail("wrong")
    later = Starts(file, "node0", "")
    later._began += 3600
    assert later.problems() == {"node1": "wrong"}


def test_launchers_that_meet_elsewhere_are_named(tmp_path: Path) -> None:
    file = tmp_path / "launchers.jsonl"
    first, second, third = (Starts(file, f"node{number}", "") for number in range(3))
    first.meet("store one", "192.0.2.1:29400")
    second.meet("store two", "127.0.1.1:29400")
    third.meet("store one", "192.0.2.1:29400")
    assert first.elsewhere("store one") == {"node1": "127.0.1.1:29400"}
    assert second.elsewhere("store two") == {"node0": "192.0.2.1:29400", "node2": "192.0.2.1:29400"}


def test_a_damaged_file_tells_nothing(tmp_path: Path) -> None:
    file = tmp_path / "launchers.jsonl"
    waiting = Starts(file, "node0", "")
    file.write_bytes(b'\xff\x00\n[1]\n{"host": 3}\n{"what": "fails"')
    assert waiting.problems() == {}
    assert waiting.elsewhere("store") == {}
    assert Starts(tmp_path / "none" / "launchers.jsonl", "node0").problems() == {}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "7"}, "slurm-7-0"),
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}, "slurm-7-2"),
        ({"SHOAL_START": "x", "SLURM_JOB_ID": "7"}, "x"),
    ],
)
def test_a_start_has_one_name_on_all_its_nodes(environment: dict[str, str], expected: str) -> None:
    assert start_id(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, 0), ({"SLURM_STEP_NUM_TASKS": "3"}, 3), ({"SHOAL_START": "hosts-ab-5"}, 5), ({"SHOAL_START": "mine"}, 0)],
)
def test_how_many_launchers_were_started_is_known(environment: dict[str, str], expected: int) -> None:
    assert started_with(environment) == expected
