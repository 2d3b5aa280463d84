"""How long a run is."""

from __future__ import annotations

import math

from shoal.config.options import Train


def count_steps(train: Train, seq_len: int, rows: int) -> int:
    """The run's length in steps, from whichever of steps, tokens or epochs is given."""
    match length_of(train):
        case "steps", steps:
            return int(steps)
        case "tokens", tokens:
            return math.ceil(tokens / (train.global_batch * seq_len))
        case _, epochs:
            return math.ceil(epochs * rows / train.global_batch)


def length_of(train: Train) -> tuple[str, float]:
    """Which of steps, tokens or epochs says how long the run is, and how much of it."""
    return next((k, v) for k in ("steps", "tokens", "epochs") if (v := getattr(train, k)) is not None)
