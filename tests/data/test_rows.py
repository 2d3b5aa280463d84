"""Another implementation of `Rows`: arrays in memory with a loss mask, through the real loader and a real run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Optim, Train
from shoal.config.run_options import Launch, Metrics
from shoal.data.dataset import Dataset
from shoal.data.loader import Loader, evaluation_batches
from shoal.data.order.audit import audit
from shoal.data.order.blend import Blend
from shoal.data.order.order import sample_at
from shoal.data.packing.pack import IGNORED_LABEL, RowArrays, Rows, count_rows
from shoal.run.folder import RunFolder
from shoal.run.jsonl import whole_lines
from shoal.training.loop import train
from tests.parallel.layouts import NeverStop

SEQ_LEN = 16


class Counting:
    """Row i counts up from i; only its second half is predicted, like an answer to an instruction."""

    seq_len = SEQ_LEN
    sizes = (40,)

    def __len__(self) -> int:
        return 40

    def read(self, row_ids: npt.ArrayLike) -> RowArrays:
        at = np.arange(SEQ_LEN)
        tokens = (np.asarray(row_ids)[:, None] + at) % 256
        labels = np.where(at < SEQ_LEN // 2, IGNORED_LABEL, (tokens + 1) % 256)
        return RowArrays(tokens, labels, np.broadcast_to(at, tokens.shape).copy(), None)


def test_the_loader_asks_for_nothing_else() -> None:
    rows: Rows = Counting()
    loader = Loader(rows, Blend(3, [len(rows)]), global_batch=8, micro_batch=4, dp_rank=0, dp_size=1)
    batches = loader.next_step()
    loader.close()
    assert [s for b in batches for s in b.sample_ids] == sample_at(3, np.arange(8), 40).tolist()
    for batch in batches:
        assert batch.tokens[:, 0].tolist() == list(batch.sample_ids)
        assert batch.valid_tokens == int((batch.labels != IGNORED_LABEL).sum()) == 4 * SEQ_LEN // 2
        assert batch.document_ids is None
    held_out = list(evaluation_batches(rows, 16, 0, 1))
    assert [len(b.sample_ids) for b in held_out] == [16, 16, 8]
    assert sum(b.valid_tokens for b in held_out) == 40 * SEQ_LEN // 2


def test_a_run_trains_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "rows", lambda *_: Counting())
    monkeypatch.setattr(Dataset, "held_out_rows", lambda *_: {"": Counting()})
    config = Config(
        model=Model(dim=32, num_layers=1, num_heads=2, max_seq_len=SEQ_LEN),
        data=Data(
            corpus="dummy", dummy_documents=20, tokenizer="bytes", seq_len=SEQ_LEN, folder=str(tmp_path / "data")
        ),
        optim=Optim(lr=1e-2, warmup_steps=2),
        train=Train(steps=20, global_batch=8, micro_batch=4, dtype="float32"),
        metrics=Metrics(peak_tflops=1.0),
        launch=Launch(runs=str(tmp_path / "runs"), name="rows"),
    )
    threads = torch.get_num_threads()
    train(config, NeverStop())
    torch.set_num_threads(threads)
    folder = RunFolder.of(config)
    losses = [line["loss"] for line in whole_lines(folder.path / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] / 2
    found = audit(folder.path / "ledger.jsonl", rows=40)
    assert found.passed
    assert found.samples == 160


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_a_row_needs_the_token_after_it(tokens: int, rows: int) -> None:
    assert count_rows(tokens, 4) == rows
