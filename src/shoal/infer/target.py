"""Finds the run and checkpoint that a command names."""

from __future__ import annotations

from pathlib import Path

from shoal.checkpoint.saved import Saved, listed
from shoal.errors import CheckpointError
from shoal.run.folder import RunFolder


def find_checkpoint(runs: Path, target: str, step: int | None) -> tuple[RunFolder, Saved]:
    """
    Return run `target` (a name under `runs`, or a folder) and its checkpoint of `step` (None: the last).

    Raises `RunError` if there is no such run, `CheckpointError` if there is no such checkpoint.
    """
    folder = RunFolder.named(target, runs)
    folder.load_config()
    there = listed(folder.checkpoints)
    chosen = [s for s in there if step is None or s.step == step]
    if not chosen:
        steps = ", ".join(str(s.step) for s in there)
        what = f"no checkpoint of step {step}; it has steps {steps}" if there else "no checkpoint yet"
        raise CheckpointError(f"{folder.path} has {what}")
    return folder, chosen[-1]
