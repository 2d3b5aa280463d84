"""One optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.data.loader import Batch
from shoal.metrics.meter import Phases, no_phases
from shoal.metrics.moment import Moment
from shoal.parallel.runnable import Runnable
from shoal.training.clip import clip, gradient_norm
from shoal.training.guard import Guard
from shoal.training.state import TrainState


@dataclass(frozen=True)
class Stats:
    """
    What a step says of itself.

    copied: the host's copy of its numbers, that is there when the step is `over`. On a GPU the copy is queued right behind
    the step, so that reading it waits for no later one.
    """

    step: int
    lr: float
    over: Moment
    copied: torch.Tensor
    first: int = 0  # the position of its first sample
    serials: Sequence[int] = ()  # the saves that the votes are about
    loss_scale: torch.Tensor | None = None  # float16's for the next step, as this one left it: copied, too

    @property
    def numbers(self) -> torch.Tensor:
        """
        [4 + votes] float64, on the CPU: loss summed over tokens, valid tokens, gradient norm, left out?, votes. Waits until
        the step is over.
        """
        self.over.wait()
        return self.copied


def train_step(
    runnable: Runnable,
    state: TrainState,
    batches: Sequence[Batch],
    *,
    step: int,
    lr: float,
    clip_norm: float,
    guard: Guard | None = None,
    votes: Sequence[float] = (),
    phases: Phases = no_phases,
) -> Stats:
    """
    Forward, backward, sum over processes, judge, clip, update. Collectives over all axes.

    guard: leaves steps out that are not sound, and the state as it was; None: those alone whose norm is no number.
    votes: what this process has to say to the others; they come back summed over the world.
    """
    optimizer, scaler = state.optimizer, state.scaler
    losses, tokens = runnable.forward_backward(batches, step, phases, scaler.scale if scaler else 1.0)
    with phases("reduce"):
        said = torch.tensor(votes, dtype=torch.float64).to(losses.device, non_blocking=True)
        summed = runnable.mesh.sum(torch.cat([losses.double(), said]))
        loss, said = summed[: len(losses)].sum(), summed[len(losses) :]
    with phases("optimizer"):
        norm = gradient_norm(runnable.shards, runnable.shapes, runnable.mesh, bitwise=runnable.bitwise)
        skip = guard.judge(loss, norm.to(loss.device)) if guard else ~torch.isfinite(norm)
        if scaler is not None:
            norm = scaler.judge(norm)
        clip(runnable.shards, norm, clip_norm, scaler.divisor if scaler else None)
        optimizer.set_learning_rate(lr)
        optimizer.step(skip)
    numbers = torch.stack(
        [loss * tokens, tokens.double(), norm.double().to(loss.device), skip.double().to(loss.device)]
    )
    # without waiting, and into pinned memory: `to` asks for it where a copy is non-blocking
    copied = torch.cat([numbers, said]).to("cpu", non_blocking=True)
    scale = scaler.scale.to("cpu", non_blocking=True, copy=True) if scaler else None
    return Stats(step, lr, Moment(losses.device), copied, loss_scale=scale)
