"""A run's length, whichever way it is given."""

from __future__ import annotations

import pytest

from shoal.config import Train
from shoal.errors import DivergedError
from shoal.fault.health import check_finite
from shoal.train.loop import count_steps


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


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_numbers_that_are_none_end_the_run_in_words(loss: float, norm: float) -> None:
    with pytest.raises(DivergedError, match=r"step 3: loss .*the last checkpoint stands"):
        check_finite(3, loss, norm)
    check_finite(3, 1.0, 1.0)
