"""One optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.data.loader import Batch
from shoal.metrics.meter import Phases
from shoal.optim.build import set_learning_rate
from shoal.parallel.apply import Runnable


@dataclass(frozen=True)
class Stats:
    """What a step says of itself. `numbers` stays on the device until somebody needs it."""

    step: int
    lr: float
    numbers: torch.Tensor  # [4] float64: loss summed over tokens, valid tokens, gradient norm, ranks asked to stop


def train_step(
    runnable: Runnable,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    step: int,
    lr: float,
    clip_norm: float,
    stop_asked: bool,
    phases: Phases,
) -> Stats:
    """Forward, backward, sum over replicas, clip, update. Collectives over `dp_replicate`."""
    loss_sum, tokens = runnable.forward_backward(batches, step, phases)
    with phases("optimizer"):
        norm = clip_gradients(runnable.reducer.flat_gradients(), clip_norm)
        set_learning_rate(optimizer, lr)
        optimizer.step()
    with phases("reduce"):
        asked = torch.full((), float(stop_asked), device=loss_sum.device)
        summed = runnable.mesh.sum(torch.stack([loss_sum, asked]).double())
    return Stats(step, lr, torch.stack([summed[0], tokens.double(), norm.double(), summed[1]]))


def clip_gradients(gradients: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """
    Scale `gradients` in place to a norm of at most `max_norm` (0: leave them); the norm before, 0-d.

    Pascanu et al. 2013, algorithm 1. No host sync: the factor stays on the device.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in gradients:
            g.mul_(factor)
    return norm
