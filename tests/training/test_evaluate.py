"""A long evaluation that makes progress is not a hang."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from shoal.data.loader import Batch
from shoal.elastic.heartbeat import Heartbeat, Page, Patience, Sign
from shoal.training.evaluate import BATCHES_AT_A_TIME
from shoal.training.loop import complete
from shoal.training.run import Run
from tests.parallel.layouts import ALONE, NeverStop, config_of


def test_each_few_batches_get_the_whole_time_again(tmp_path: Path) -> None:
    config = config_of(tmp_path, "long", train__steps=1, train__micro_batch=1)
    run = Run.open(config, ALONE, NeverStop())
    page = Page(tmp_path, 0)
    run.watch.heartbeat = Heartbeat(page, Patience(600.0), outside_seconds=600.0)
    loss_of, signs = run.runnable.evaluate, list[Sign]()

    def seen(batches: Sequence[Batch]) -> torch.Tensor:
        signs.append(page.read())
        return loss_of(batches)

    run.runnable.evaluate = seen  # type: ignore[method-assign]
    try:
        complete(run)
    finally:
        run.close()
    rows = len(run.dataset.rows("val"))
    assert len(signs) == -(-rows // BATCHES_AT_A_TIME) > 1
    assert {sign.phase for sign in signs} == {"evaluation"}
    deadlines = [sign.until for sign in signs]
    assert all(earlier < later for earlier, later in itertools.pairwise(deadlines))
    assert page.read().phase == "end"
    assert page.read().until > deadlines[-1]
