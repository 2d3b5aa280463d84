"""Trackers in their own processes, beside a trainer: down, slow, wrong or fine, the trainer continues."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.config.track_options import Track
from shoal.run.events import Events
from shoal.trackers.beside import Trackers
from tests.trackers.test_tensorboard import curve, read_back, single
from tests.trackers.written import Written


class Heard:
    """A console that keeps its lines, and a thread that waits for one."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._came = threading.Condition()

    def note(self, text: str) -> None:
        with self._came:
            self.lines.append(text)
            self._came.notify_all()

    warn = note

    def wait_for(self, words: str) -> None:
        with self._came:
            assert self._came.wait_for(lambda: any(words in line for line in self.lines), 120), self.lines


class BlackHole:
    """A port that accepts connections and never answers."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.accepted: list[socket.socket] = []
        self.called = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                self.accepted.append(self._server.accept()[0])
                self.called.set()
            except OSError:
                return

    def close(self) -> None:
        for each in (*self.accepted, self._server):
            each.close()


@pytest.fixture
def black_hole() -> Iterator[BlackHole]:
    hole = BlackHole()
    yield hole
    hole.close()


def opened(run: Written, heard: Heard, track: Track, patience: float = 30.0) -> tuple[Trackers, Events]:
    events = Events(run.folder.events_file)
    return Trackers(run.folder, track, heard, events.say, patience), events


def told(run: Written, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.folder.events_file.read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_a_tracker_gets_what_is_written_until_the_end(tmp_path: Path) -> None:
    track, heard = Track(to=("tensorboard",), close_seconds=120), Heard()
    run = Written(tmp_path / "gpt", to=track.to)
    run.start()
    trackers, events = opened(run, heard, track)
    run.steps(1, 20)
    heard.wait_for("TensorBoard: tensorboard --logdir")
    run.steps(21, 40)
    trackers.close()
    trackers.close()
    events.close()
    assert curve(read_back(run.folder.path / "tensorboard"), "train/loss") == single(run.curve())
    assert [each["tracker"] for each in told(run, "tracker opened")] == ["tensorboard"]
    assert len(heard.lines) == 1


@pytest.mark.ci
def test_a_black_hole_holds_nothing_up_and_is_told_once(
    tmp_path: Path, black_hole: BlackHole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All lines are written and the other tracker has them while MLflow's server has not said a word."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", black_hole.url)
    track, heard = Track(to=("mlflow", "tensorboard"), close_seconds=120), Heard()
    run = Written(tmp_path / "gpt", to=track.to)
    run.start()
    trackers, events = opened(run, heard, track, patience=3)
    run.steps(1, 40)
    assert black_hole.called.wait(120)
    heard.wait_for("MLflow does not take this run's records: ")
    heard.wait_for("TensorBoard: ")
    trackers.close()
    events.close()
    assert curve(read_back(run.folder.path / "tensorboard"), "train/loss") == single(run.curve())
    assert sum("MLflow" in line for line in heard.lines) == 1
    assert "training continues" in next(line for line in heard.lines if "MLflow" in line)
    assert [each["tracker"] for each in told(run, "tracker down")] == ["mlflow"]


@pytest.mark.ci
def test_a_server_that_comes_back_gets_what_it_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that cannot write, here because its folder is a file, is told once; then it has everything."""
    track, heard = Track(to=("tensorboard",), close_seconds=120), Heard()
    run = Written(tmp_path / "gpt", to=track.to)
    (run.folder.path / "tensorboard").write_text("in the way")
    run.start()
    trackers, events = opened(run, heard, track)
    run.steps(1, 20)
    heard.wait_for("TensorBoard does not take this run's records: ")
    (run.folder.path / "tensorboard").unlink()
    heard.wait_for("TensorBoard takes this run's records again")
    run.steps(21, 30)
    trackers.close()
    events.close()
    assert curve(read_back(run.folder.path / "tensorboard"), "train/loss") == single(run.curve())
    assert len(told(run, "tracker down")) == 1
