"""One optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.data.loader import Batch
from shoal.metrics.meter import Phases, no_phases
from shoal.parallel.apply import Runnable
from shoal.train.clip import clip, gradient_norm
from shoal.train.state import TrainState


@dataclass(frozen=True)
class Stats:
    """What a step says of itself. `numbers` stays on the device until somebody needs it."""

    step: int
    lr: float
    numbers: torch.Tensor  # [4] float64: loss summed over tokens, valid tokens, gradient norm, ranks asked to stop


def train_step(
    runnable: Runnable,
    state: TrainState,
    batches: Sequence[Batch],
    *,
    step: int,
    lr: float,
    clip_norm: float,
    stop_asked: bool = False,
    phases: Phases = no_phases,
) -> Stats:
    """Forward, backward, sum over processes, clip, update. Collectives over all axes."""
    optimizer, scaler = state.optimizer, state.scaler
    losses, tokens = runnable.forward_backward(batches, step, phases, scaler.scale if scaler else 1.0)
    with phases("optimizer"):
        norm = gradient_norm(runnable.shards, runnable.shapes, runnable.mesh, bitwise=runnable.bitwise)
        if scaler is not None:
            norm = scaler.judge(norm, optimizer)
        clip(runnable.shards, norm, clip_norm, scaler.divisor if scaler else None)
        optimizer.set_learning_rate(lr)
        optimizer.step()
    with phases("reduce"):
        asked = losses.new_full((1,), float(stop_asked))
        summed = runnable.mesh.sum(torch.cat([losses, asked]).double())
    return Stats(step, lr, torch.stack([summed[:-1].sum() * tokens, tokens.double(), norm.double(), summed[-1]]))
