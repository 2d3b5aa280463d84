"""`shoal launch logs`: what it prints, and what it rejects."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.commands.launch_logs import add_arguments, logs
from shoal.errors import RunError
from shoal.run.log_lines import ENDED, ERR, RUN
from tests.report.causes.made import KILL, LOST, Made


@pytest.fixture
def made(tmp_path: Path) -> Made:
    made = Made(tmp_path / "run")
    made.rank(0, "n0", (8.0, ERR, LOST), (8.1, RUN, ENDED + "ended with code 3"), attempt="42-0-20260921T140000Z")
    made.rank(1, "n1", (8.0, ERR, "\x1b[31mred"), (8.0, RUN, KILL), attempt="42-0-20260921T140000Z")
    made.job("42.log", "preparing: tokens 100%")
    return made


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return logs(parser.parse_args(words), [], list(words))


def test_the_cause_and_the_places_of_the_logs(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(made.folder.path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("first cause: rank 1 on n1 was killed by SIGKILL")
    assert lines[-2:] == [
        f"logs: {made.folder.path}/jobs (1 file)", f"logs: {made.folder.logs}/42-0-20260921T140000Z (2 files)",
    ]  # fmt: skip


def test_the_command_is_one_of_shoal_launch(made: Made, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shoal", "launch", "logs", "run", "--runs", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["job"], found["cause"]["first"]["rank"]) == ("42", 1)
    assert len(found["logs"]) == 3


def test_a_ranks_log_is_printed_with_visible_control_characters(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(made.folder.path), "--rank", "1") == 0
    assert "err \\x1b[31mred" in capsys.readouterr().out


def test_a_run_without_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(tmp_path / "run")
    assert run(str(made.folder.path), "--runs", str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{made.folder.path}: no failure found",
        f"logs: none; a run on several nodes or under Slurm writes them to {made.folder.logs}",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["other"], "is not a run"),
        (["run", "--job", "7"], "has no logs of job 7; there are 42"),
        (["run", "--rank", "9"], "has no log of rank 9; it has 2 ranks"),
    ],
)
def test_what_does_not_exist_is_named(made: Made, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        run(*words, "--runs", str(tmp_path))
