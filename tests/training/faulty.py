"""A run with planned faults on the ranks of a world, and its events."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal.config.options import Config
from shoal.fault.inject import PLAN
from shoal.mesh.mesh import Mesh
from shoal.run.events import read_json_lines
from shoal.training.loop import complete
from shoal.training.run import Run
from tests.parallel.layouts import NeverStop, mesh_for


def train_with(mesh: Mesh, config: Config, faults: list[dict[str, Any]]) -> Run:
    """Train to the end with these planned faults; return the closed run."""
    with planned(faults):
        run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
        try:
            complete(run)
        finally:
            run.close()
    return run


@contextlib.contextmanager
def planned(faults: list[dict[str, Any]]) -> Iterator[None]:
    """Let runs that are opened meanwhile have these faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLAN, json.dumps(faults))
        yield


def events(config: Config, kind: str) -> list[dict[str, Any]]:
    lines = read_json_lines(Path(config.launch.runs) / str(config.launch.name) / "events.jsonl")
    return [line for line in lines if line["event"] == kind]
