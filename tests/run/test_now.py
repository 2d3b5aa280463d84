"""`now.json`: the newest phase is always written in the end, and nothing that a disk does is noticed by the caller."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from shoal.run.console import Console
from shoal.run.folder import RunFolder
from shoal.run.now import Doing, Now, read_now


def doing(folder: Path) -> tuple[str, int | None, int | None]:
    found = read_now(RunFolder(folder))
    assert found is not None
    assert (found.pid, found.host) == (os.getpid(), socket.gethostname())
    assert abs(found.time - time.time()) < 60
    return found.phase, found.done, found.total


def wait_until(folder: Path, phase: str) -> None:
    end = time.monotonic() + 30
    while (found := read_now(RunFolder(folder))) is None or found.phase != phase:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_newest_phase_is_written_whatever_is_said_meanwhile(tmp_path: Path) -> None:
    now = Now(RunFolder(tmp_path).now_file)
    assert read_now(RunFolder(tmp_path)) is None
    for done in range(1000):
        now.progress("reading", done, 1000)
    now.say("save")
    wait_until(tmp_path, "saving")
    assert doing(tmp_path) == ("saving", None, None)
    now.progress("evaluation", 3, 10)
    now.say("evaluation")  # as a heartbeat names it, without its progress
    wait_until(tmp_path, "evaluation")
    assert doing(tmp_path) == ("evaluation", 3, 10)
    now.say("between steps", 5)
    now.close("end")
    now.close()
    now.say("late")
    assert doing(tmp_path) == ("end", None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["now.json"]


def test_a_folder_that_cannot_be_written_is_no_problem(tmp_path: Path) -> None:
    nowhere = Now(RunFolder(tmp_path / "gone").now_file)
    nowhere.say("reading")
    nowhere.close("end")
    assert list(tmp_path.iterdir()) == []
    Now(None).close("end")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"time": 1}', '{"time": "x", "phase": "a"}'])
def test_a_damaged_file_is_unknown(tmp_path: Path, text: str) -> None:
    RunFolder(tmp_path).now_file.write_text(text)
    assert read_now(RunFolder(tmp_path)) is None


def test_fields_that_a_file_lacks_are_unknown(tmp_path: Path) -> None:
    RunFolder(tmp_path).now_file.write_text(json.dumps({"time": 5, "phase": "training", "done": 7, "new": True}))
    assert read_now(RunFolder(tmp_path)) == Doing(5.0, "training", 7)


@pytest.mark.parametrize("speaks", [True, False])
def test_a_progress_bar_is_told_too(speaks: bool) -> None:
    console, told = Console(speaks), list[tuple[str, int, int]]()
    console.on_progress = lambda phase, done, total: told.append((phase, done, total))
    with console.progress("preparing") as progress:
        progress("reading", 1, 2)
    assert told == [("reading", 1, 2)]


def test_a_run_that_did_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    folder.lock()
    now = Now(folder.now_file)
    now.say("reading")
    now.close()
    assert folder.now_file.is_file()
    folder.remove_unused()
    folder.release()
    assert not folder.path.exists()
