"""`shoal fetch` as processes: killed, run twice at once, and its output."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.cli.commands import Place, clean_environment, wait_for
from tests.hub.conftest import NAME, Scene

FETCH = ("fetch", "model", NAME)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_killed_in_the_middle_it_goes_on_where_it_stopped(scene: Scene, place: Place) -> None:
    tick = threading.Event()

    def kill(file: str) -> None:
        """Wait until some of the weights are on disk, then kill the fetch."""
        if file == "model.safetensors":
            while not any(part.stat().st_size for part in scene.partial.glob(".*.part")):
                tick.wait(0.01)
            process.kill()

    scene.repository.on_body = kill
    process = place.start(*FETCH, **scene.environment())
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert not scene.folder.exists()
    scene.repository.on_body = lambda file: None
    scene.hub.asked.clear()
    code, output = place.run(*FETCH, **scene.environment())
    assert code == 0, output
    first, *rest = scene.hub.asked  # earlier files are not fetched again
    assert re.fullmatch("model.safetensors from [1-9][0-9]*", first)
    assert rest == ["tokenizer.json from 0"]
    assert scene.there()["model.safetensors"] == scene.repository.files["model.safetensors"]


def test_of_two_at_once_one_fetches(scene: Scene, place: Place) -> None:
    others: list[subprocess.Popen[str]] = []

    def start_another(file: str) -> None:
        if file == "model.safetensors":
            others.append(place.start(*FETCH, **scene.environment()))
            wait_for(others[0], "waiting for another process, which fetches org/tiny")

    scene.repository.on_body = start_another
    code, output = place.run(*FETCH, **scene.environment())
    assert code == 0, output
    assert "models/org/tiny is complete" in others[0].communicate(timeout=60)[0]
    assert others[0].returncode == 0
    assert len(scene.hub.asked) == 6


def test_what_a_person_sees(scene: Scene, place: Place) -> None:
    """Expect two lines in a log, and a progress bar on a terminal."""
    code, output = place.run(*FETCH, "--to", "elsewhere/tiny", **scene.environment())
    assert code == 0
    assert output.splitlines() == [
        "fetching org/tiny at c0ffee000000: 6 files, 0.3 MB to elsewhere/tiny",
        "elsewhere/tiny is complete: org/tiny at c0ffee000000",
    ]
    shown = on_a_terminal(place, scene)
    assert "━" in shown
    assert "100%" in shown


def test_a_home_is_meant_where_no_shell_says_so(scene: Scene, place: Place) -> None:
    (place.folder / "person").mkdir()
    environment = scene.environment() | {"HOME": str(place.folder / "person")}
    code, output = place.run(*FETCH, "--to=~/tiny", **environment)
    assert code == 0, output
    assert (place.folder / "person" / "tiny" / "config.json").is_file()
    assert not (place.folder / "~").exists()
    message = place.refused(*FETCH, "--to=~nosuchuser/tiny", **environment)
    assert "cannot find ~nosuchuser/tiny" in message
    assert "Set --to to a writable folder" in message


def on_a_terminal(place: Place, scene: Scene) -> str:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "shoal", *FETCH]
    environment = clean_environment() | scene.environment() | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, cwd=place.folder, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # reading a closed terminal raises it
        pass
    os.close(ours)
    assert process.wait(60) == 0, shown
    return shown.decode()


def test_one_message_and_no_traceback(scene: Scene, place: Place) -> None:
    environment = scene.environment() | {"HF_TOKEN": "hf_secret"}
    assert "the hub has no model org/none" in place.refused("fetch", "model", "org/none", **environment)
    scene.repository.gated = True
    message = place.refused(*FETCH, **environment)
    assert "HF_TOKEN" in message
    assert "hf_secret" not in message
    assert "HF_HUB_OFFLINE is set" in place.refused(*FETCH, **environment | {"HF_HUB_OFFLINE": "1"})
    nowhere = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "put org/tiny's config.json" in place.refused(*FETCH, **nowhere)
    assert "choose from" in place.refused("fetch", "dataset", NAME)
