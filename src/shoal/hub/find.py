"""Where a model is on this machine, by folder or by name."""

from __future__ import annotations

from pathlib import Path

from shoal.errors import ModelError

MODELS = Path("models")  # where `shoal fetch model NAME` puts NAME


def find_model(name: str) -> Path:
    """The folder of a model: `name` itself, or where `shoal fetch` put it. Raises `ModelError`."""
    for folder in (Path(name).expanduser(), MODELS / name):
        if folder.is_dir():
            return folder
    raise ModelError(f"there is no folder {name}, and no {MODELS / name}; shoal fetch model {name} gets it")
