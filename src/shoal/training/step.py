"""One optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shoal.data.loader import Batch
from shoal.mesh.ballot import EMPTY, Ballot
from shoal.metrics.moment import Moment
from shoal.parallel.runnable import Runnable
from shoal.run.phases import NO_PHASES, Phases
from shoal.training.clip import clip, gradient_norm
from shoal.training.guard import Guard
from shoal.training.state import TrainState


class Result(NamedTuple):
    """The numbers of a step, on the host."""

    loss_sum: float  # summed over valid tokens, nats
    tokens: float  # valid tokens
    norm: float  # of the gradient, before clipping
    skipped: bool
    said: Sequence[float]  # the ballot's sums
    source_loss_sums: Sequence[float] = ()  # loss_sum by source of a blend

    @property
    def is_empty(self) -> bool:
        """Whether no label of the step is learned: all lie in prompts or padding. NaN and Inf are another matter."""
        return self.tokens == 0 and math.isfinite(self.loss_sum) and math.isfinite(self.norm)


@dataclass(frozen=True)
class Stats:
    """
    A step's numbers, on their way from the device.

    copied: the numbers' copy on the host, complete when the step is `over`. On a GPU the copy is queued
    right behind the step, so that reading it does not wait for the next step.
    """

    step: int
    lr: float
    over: Moment
    copied: torch.Tensor
    ballot: Ballot = EMPTY
    num_sources: int = 0  # of a blend, whose losses come first in the numbers after the step's own
    first: int = 0  # position of its first sample
    loss_scale: torch.Tensor | None = None  # float16's loss scale after this step; copied to the host too

    def read(self) -> Result:
        """Wait until the step is over; return its numbers."""
        self.over.wait()
        loss_sum, tokens, norm, skipped, *said = self.copied.tolist()
        by_source, said = said[: self.num_sources], said[self.num_sources :]
        return Result(loss_sum, tokens, norm, bool(skipped), said, [share * tokens for share in by_source])


def train_step(
    runnable: Runnable,
    state: TrainState,
    batches: Sequence[Batch],
    *,
    step: int,
    lr: float,
    clip_norm: float,
    guard: Guard | None = None,
    ballot: Ballot = EMPTY,
    phases: Phases = NO_PHASES,
) -> Stats:
    """
    Run forward, backward, the sums over ranks, the guard, clipping and the update. Collectives over all axes.

    guard: decides whether to skip the update; without a guard, only a gradient norm of NaN or Inf skips it. A step without
    a valid token has no gradient, and always skips it: momentum and weight decay would move the weights.
    ballot: this rank's votes, summed over the world in the same all-reduce as the losses.
    """
    optimizer, scaler = state.optimizer, state.scaler
    losses, tokens = runnable.forward_backward(batches, step, phases, scaler.scale if scaler else 1.0)
    with phases("reduce"):
        by_source = runnable.source_losses
        own = [losses] if by_source is None else [losses, by_source]
        said = ballot.numbers().to(losses.device, non_blocking=True)
        summed = runnable.mesh.sum(torch.cat([*(each.double() for each in own), said]))
        loss, said = summed[: len(losses)].sum(), summed[len(losses) :]
    with phases("optimizer"):
        norm = gradient_norm(runnable.shards, runnable.shapes, runnable.mesh, bitwise=runnable.bitwise)
        bad = guard.judge(loss, norm.to(loss.device)) if guard else ~torch.isfinite(norm)
        empty = tokens == 0
        skip = bad | empty
        if scaler is not None:
            norm = scaler.judge(norm, empty)
        clip(runnable.shards, norm, clip_norm, scaler.divisor if scaler else None)
        optimizer.set_learning_rate(lr)
        optimizer.step(skip)
    numbers = torch.stack(
        [loss * tokens, tokens.double(), norm.double().to(loss.device), skip.double().to(loss.device)]
    )
    # No wait: a non-blocking `to` copies into pinned memory, which it allocates itself.
    copied = torch.cat([numbers, said]).to("cpu", non_blocking=True)
    scale = scaler.scale.to("cpu", non_blocking=True, copy=True) if scaler else None
    num_sources = 0 if by_source is None else len(by_source)
    return Stats(step, lr, Moment(losses.device), copied, ballot, num_sources, loss_scale=scale)
