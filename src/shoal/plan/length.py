"""The length of a run."""

from __future__ import annotations

import math

from shoal.config.options import Train


def count_steps(train: Train, seq_len: int, rows: int) -> int:
    """Return the run's length in steps, from steps, tokens or epochs, whichever is set. rows: number of training rows."""
    match length_of(train):
        case "steps", steps:
            return int(steps)
        case "tokens", tokens:
            return math.ceil(tokens / (train.global_batch * seq_len))
        case _, epochs:
            return math.ceil(epochs * rows / train.global_batch)


def given_steps(train: Train, seq_len: int) -> int | None:
    """Return the run's length in steps, if it does not depend on the corpus."""
    return None if train.steps is None and train.tokens is None else count_steps(train, seq_len, 0)


def length_of(train: Train) -> tuple[str, float]:
    """Return the name and value of the option that sets the run's length: steps, tokens or epochs."""
    return next((k, v) for k in ("steps", "tokens", "epochs") if (v := getattr(train, k)) is not None)
