"""A small corpus of text files, and the `data` section that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.config.data_options import Data
from shoal.config.options import Config
from shoal.data.dataset import new_order, prepare_dataset
from shoal.data.order.ledger import Header, Ledger
from shoal.run.folder import RunFolder

MakeData = Callable[..., Data]


def begin_ledger(run: RunFolder, config: Config) -> None:
    """Write the ledger of a run that has begun its first step. Prepares its data."""
    dataset = prepare_dataset(config.data)
    order = new_order(config.data, dataset.rows("train").sizes, 0, config.train.global_batch)
    ledger = Ledger(run.ledger_file)
    ledger.begin(Header(order.num_rows, 0, config.train.global_batch, 1, dataset.data_id, (), ()), 0, 0)
    ledger.close()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Write 40 files of different lengths, words and scripts."""
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
    """Return a function that makes `Data` for the small corpus, with changed options."""

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
