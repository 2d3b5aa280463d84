"""Locks of file systems that several nodes share: none at all, or one for each node."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from shoal.errors import RunError
from shoal.run.folder import RunFolder


def renew(file: Path, host: str) -> None:
    aside = file.with_name("aside")
    aside.write_text(json.dumps({"time": time.time(), "phase": "training", "host": host}))
    aside.replace(file)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Return the folder of a run that another host trains, whose lock is not seen here."""
    folder = tmp_path / "run"
    folder.mkdir()
    holder = {
        "pid": 7,
        "host": "node9",
        "since": "2026-01-01 00:00:00",
        "command": "train x",
        "meeting": None,
        "id": "a",
    }
    (folder / "lock").write_text(json.dumps(holder))
    renew(folder / "now.json", "node9")
    return folder


def test_a_run_that_another_host_renews_is_not_trained_here(elsewhere: Path) -> None:
    ended = threading.Event()

    def train() -> None:
        while not ended.wait(0.1):
            renew(elsewhere / "now.json", "node9")

    thread = threading.Thread(target=train)
    thread.start()
    try:
        with pytest.raises(
            RunError, match=r"by process 7 on node9 .*although its lock is free here: this file system keeps"
        ):
            RunFolder(elsewhere).lock()
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("age_seconds", [0, 3600])
def test_a_run_whose_other_host_is_gone_is_trained_here(elsewhere: Path, age_seconds: float) -> None:
    now = elsewhere / "now.json"
    os.utime(now, (now.stat().st_atime, now.stat().st_mtime - age_seconds))
    folder = RunFolder(elsewhere)
    folder.lock()
    assert folder.holder()["host"] == socket.gethostname()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(RunError, match=r"lock cannot be locked: Function not implemented; mount .*-o flock"):
        folder.lock()
    assert not folder.is_locked()


def test_a_process_that_renews_the_file_itself_is_not_another(elsewhere: Path) -> None:
    """Under torchrun, rank 0 writes what it does before it takes the lock."""
    ended = threading.Event()

    def start() -> None:
        while not ended.wait(0.1):
            renew(elsewhere / "now.json", socket.gethostname())

    thread = threading.Thread(target=start)
    thread.start()
    try:
        RunFolder(elsewhere).lock()
    finally:
        ended.set()
        thread.join()
