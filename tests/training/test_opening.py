"""What would end a run at its last step is rejected before its first."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config.data_options import Data
from shoal.errors import DataError
from shoal.training.run import Run
from tests.data.chats import write_lines
from tests.parallel.layouts import ALONE, NeverStop, config_of


def test_a_held_out_split_without_a_row(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "a.jsonl", [{"text": f"story {n}"} for n in range(90)])
    data = Data(
        corpus="jsonl", paths=(str(lines),), tokenizer="bytes", seq_len=48, val_fraction=0.01, folder=str(tmp_path / "data")
    )  # fmt: skip
    config = config_of(tmp_path, "small").replace("data", **vars(data))
    with pytest.raises(
        DataError, match=r"the val split has 9 tokens, too few for one row of data\.seq_len 48 \(\+ 1\)"
    ):
        Run.open(config, ALONE, NeverStop())
    assert not list((tmp_path / "runs" / "small").rglob("checkpoints/*"))


def test_held_out_conversations_whose_answers_are_beyond_the_last_row(tmp_path: Path) -> None:
    """The loss of no label would be 0."""
    records = [{"instruction": f"What {n}? " + "So? " * 9, "output": f"{n}."} for n in range(90)]
    lines = write_lines(tmp_path / "a.jsonl", records)
    data = Data(
        corpus="jsonl", paths=(str(lines),), tokenizer="bytes", seq_len=180, val_fraction=0.001, format="alpaca",
        template="alpaca", document_mask=True, folder=str(tmp_path / "data"),
    )  # fmt: skip
    config = config_of(tmp_path, "answers", model__max_seq_len=180).replace("data", **vars(data))
    with pytest.raises(DataError, match=r"no learned token of the val split is in its rows of data\.seq_len 180"):
        Run.open(config, ALONE, NeverStop())


def test_a_prompt_that_fills_the_context(tmp_path: Path) -> None:
    config = config_of(tmp_path, "long", train__sample_prompt="a" * 64)
    with pytest.raises(DataError, match=r"sample_prompt has 64 tokens, which leaves no room in model\.max_seq_len 64"):
        Run.open(config, ALONE, NeverStop())
    Run.open(config.replace("train", sample_prompt="a" * 63), ALONE, NeverStop()).close()
