"""A run's length, given as steps, tokens or epochs."""

from __future__ import annotations

import pytest

from shoal.config.options import Train
from shoal.plan.length import count_steps


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        (Train(steps=7), 7),
        (Train(tokens=1_000_000, global_batch=10), 196),  # 5,120 tokens a step: 195.3 steps are not enough
        (Train(tokens=5120, global_batch=10), 1),
        (Train(epochs=2, global_batch=8), 25),  # 200 rows
        (Train(epochs=0.5, global_batch=64), 1),
    ],
)
def test_steps_tokens_and_epochs(train: Train, steps: int) -> None:
    assert count_steps(train, seq_len=512, rows=100) == steps
