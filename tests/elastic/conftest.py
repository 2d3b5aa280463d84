"""A real launcher inside pytest, whose workers run a piece of code instead of training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.config.options import Config, Model, Train
from shoal.config.run_options import Launch
from shoal.elastic import supervise
from shoal.elastic.heartbeat import FOLDER
from shoal.elastic.stops import SignalForwarder
from shoal.elastic.supervise import run_workers
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder


class NoSignals(SignalForwarder):
    """A forwarder that installs no handlers, for a launcher inside pytest."""

    def __init__(self) -> None:
        self.signal, self._raises, self._reached = None, False, set()


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[int, list[dict[str, Any]]]]:
    """Return a function that runs code in two workers, and returns the launcher's exit code and the run's events."""
    monkeypatch.setenv(FOLDER, "")  # restored after the test
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGQUIT")

    def launch(code: str) -> tuple[int, list[dict[str, Any]]]:
        config = Config(
            model=Model(dim=64, num_layers=1, num_heads=2, vocab_size=256),
            train=Train(global_batch=8, micro_batch=4, dtype="float32", device="cpu"),
            launch=Launch(runs=str(tmp_path), name="run", processes=2, max_restarts=0),
        )
        folder = RunFolder.of(config)
        folder.lock()
        os.mkfifo(tmp_path / "pipe")
        make = supervise._workers

        def workers(*args: Any) -> Any:
            spec = make(*args)
            spec.args = ("-c", code, str(tmp_path / "pipe"))
            return spec

        monkeypatch.setattr(supervise, "_workers", workers)
        try:
            return run_workers(config, [], NoSignals()), read_json_lines(folder.events_file)
        finally:
            folder.release()

    return launch
