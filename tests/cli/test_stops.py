"""Ctrl-C and SIGTERM before the first step: a command names its phase, ends, and leaves no process behind."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest

from shoal.config.options import Config
from shoal.elastic import supervise
from shoal.errors import EXIT_REQUEUE
from shoal.system.signals import GRACE_SECONDS, STOPPING_SAID, stopping_said
from tests.cli.commands import Place, gone, wait_for, workers_of

# Python runs this at startup: the process hangs when it imports the module in BLOCKED, or when it measures the device.
BLOCKED = """
import importlib.abc, os, sys
who, _, module = os.environ.get("BLOCKED", "").partition(":")
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            print("BLOCKED", flush=True)
            os.read(os.pipe()[0], 1)
if who == ("worker" if "RANK" in os.environ else "launcher"):
    if module == "measuring":
        from shoal.training import finish_config as settle
        settle.choose_dtype = lambda wanted, mesh: os.read(os.pipe()[0], 1)
    sys.meta_path.insert(0, Block())
"""
TRAIN = ["train", "recipe.yaml", "--name"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a folder with prepared data and a fake run."""
    place = Place(tmp_path_factory.mktemp("stops"))
    (place.folder / "sitecustomize.py").write_text(BLOCKED, encoding="utf-8")
    place.good("prepare", "recipe.yaml")
    pretend(place.folder / "runs" / "done")
    return place


def pretend(run: Path) -> None:
    """Make a run with a listed checkpoint, which is never read."""
    checkpoint = run / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text((run.parents[1] / "recipe.yaml").read_text(), encoding="utf-8")
    (checkpoint / "state.json").write_text('{"format": 1}')
    (checkpoint / "manifest.json").write_text("{}")


def stop(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Signal a command; return its output, after checking that its workers ended too."""
    workers = workers_of(process)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert gone(workers)
    assert STOPPING_SAID in output or stopping_said(number) in output
    assert "Traceback" not in output
    return output


@pytest.mark.parametrize(
    ("arguments", "where", "number", "code"),
    [
        ([*TRAIN, "a"], "launcher:shoal.data.prepare", signal.SIGTERM, EXIT_REQUEUE),
        pytest.param([*TRAIN, "b"], "launcher:torch", signal.SIGINT, 130, marks=pytest.mark.ci),
        ([*TRAIN, "c"], "worker:torch", signal.SIGTERM, EXIT_REQUEUE),
        pytest.param(
            ["prepare", "recipe.yaml"],
            "launcher:shoal.data.prepare",
            signal.SIGTERM,
            EXIT_REQUEUE,
            marks=pytest.mark.ci,
        ),
        (["eval", "done"], "launcher:torch", signal.SIGTERM, 143),
        (["generate", "done", "--prompt", "a"], "launcher:torch", signal.SIGINT, 130),
        pytest.param(["export", "done", "--out", "out"], "launcher:torch", signal.SIGINT, 130, marks=pytest.mark.ci),
        pytest.param(
            ["bench", "speed", "recipe.yaml"], "launcher:shoal.data.prepare", signal.SIGTERM, 143, marks=pytest.mark.ci
        ),
        pytest.param(["verify", "recipe.yaml"], "worker:torch", signal.SIGINT, EXIT_REQUEUE, marks=pytest.mark.ci),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_while_something_is_imported_or_prepared(
    place: Place, arguments: list[str], where: str, number: signal.Signals, code: int
) -> None:
    process = place.start(*arguments, PYTHONPATH=str(place.folder), BLOCKED=where)
    wait_for(process, "BLOCKED")
    stop(process, number)
    assert process.returncode == code


@pytest.mark.ci
def test_while_the_device_is_measured(place: Place) -> None:
    """A matrix product in C takes minutes, during which Python cannot handle the signal."""
    process = place.start(*TRAIN, "measured", PYTHONPATH=str(place.folder), BLOCKED="worker:measuring")
    wait_for(process, "measuring the device ...")
    output = stop(process, signal.SIGTERM)
    assert process.returncode == EXIT_REQUEUE
    assert "before the first step" in output


def test_what_has_nothing_to_save_has_less_than_two_seconds() -> None:
    """The grace period plus the launcher's polling interval is below two seconds."""
    pause = supervise._workers(Config().replace("launch", processes=2), [], Mock()).monitor_interval
    assert GRACE_SECONDS + pause < 2


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        pytest.param("rendezvous", "meeting the other processes ...", marks=pytest.mark.ci),
        ("load", "looking for checkpoints ..."),
        pytest.param("forward", "first step ...", marks=pytest.mark.ci),
    ],
)
def test_while_the_workers_start(place: Place, phase: str, said: str) -> None:
    """One worker hangs; the other waits for it in a collective and cannot handle a signal before the timeout."""
    fault = [{"step": int(phase == "forward"), "phase": phase, "rank": 1, "fault": "hang"}]
    process = place.start(*TRAIN, phase, SHOAL_FAULTS=json.dumps(fault))
    wait_for(process, said)
    output = stop(process, signal.SIGTERM)
    assert process.returncode == EXIT_REQUEUE
    assert "before the first step" in output
    assert "from the beginning" in output
    assert not (place.folder / "runs" / phase / "metrics.jsonl").is_file() or not place.metrics(phase)
