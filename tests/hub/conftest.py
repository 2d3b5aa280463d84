"""A local hub with a model, to which this process connects."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants

from tests.hub.server import Hub, Repository, running_hub

NAME = "org/tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def weights(name: str, count: int, fill: int = 0) -> bytes:
    """Return a safetensors file with one tensor of `count` bytes."""
    header = json.dumps({name: {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([fill]) * count


def one_file() -> dict[str, bytes]:
    """Return a model's files, and others that must not be fetched."""
    return {
        "config.json": b'{"model_type": "llama"}',
        "model.safetensors": weights("a", 300_000),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "LICENSE": b"MIT",
        "README.md": b"# tiny",
        "pytorch_model.bin": b"pickled",
        "modeling_tiny.py": b"print()",
        "consolidated.safetensors": weights("a", 10),
        "onnx/config.json": b"{}",
    }


def two_shards() -> dict[str, bytes]:
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
    return {
        "config.json": b'{"model_type": "llama"}',
        INDEX: json.dumps(index).encode(),
        SHARDS[0]: weights("a", 200_000, 1),
        SHARDS[1]: weights("b", 200_000, 2),
        "other.safetensors": b"not named by the index",
    }


class Scene(NamedTuple):
    """A hub with one model, and the working directory of the fetch."""

    hub: Hub
    repository: Repository
    folder: Path  # of the fetched model

    @property
    def partial(self) -> Path:
        return self.folder.with_name(".tiny.partial")

    def there(self) -> dict[str, bytes]:
        """Return the fetched files, without shoal's record of the fetch."""
        return {p.name: p.read_bytes() for p in sorted(self.folder.iterdir()) if p.name != "fetched.json"}

    def environment(self) -> dict[str, str]:
        """Return the environment of a process that fetches from this hub."""
        return {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder.parents[2] / "home"), "HF_HUB_OFFLINE": "0"}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    with running_hub() as hub:
        hub.repositories[NAME] = Repository(one_file())
        scene = Scene(hub, hub.repositories[NAME], tmp_path / "models" / "org" / "tiny")
        monkeypatch.chdir(tmp_path)
        for variable in [v for v in os.environ if v.startswith("HF_")]:
            monkeypatch.delenv(variable)
        for variable, value in scene.environment().items():
            monkeypatch.setenv(variable, value)
        # huggingface_hub reads the environment when it is imported, which in this process was long ago.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("shoal.hub.remote.PAUSE_SECONDS", 0.0)
        yield scene
