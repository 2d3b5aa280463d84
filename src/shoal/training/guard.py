"""
Decides whether a step counts: all ranks skip a step whose loss or gradient is NaN or Inf, or whose loss is a spike.

Every step has a spike score, also if no limit is set and no spike is skipped.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

RECENT: Final = 128  # number of recent losses that a new loss is compared with
FEW: Final = 32  # with fewer losses nothing counts as a spike
_SIGMAS_PER_MAD: Final = 1.4826  # 1 / the 75th percentile of a standard normal distribution
_LEAST_SPREAD: Final = 0.01  # fraction of the median: with a nearly constant loss, a small rise is not a spike


class Guard:
    """
    Judges a step on its device, from numbers that are identical on every rank. The host does not wait for the device.

    A spike is a loss more than `zscore` robust deviations above the median of recent losses (median and MAD: Iglewicz and
    Hoaglin 1993). The limit and the score of step n use the losses up to step n - 2: by then the host has read these
    losses, even from a GPU, so a resumed run judges the same.
    """

    def __init__(self, device: torch.device, zscore: float | None) -> None:
        self._zscore = zscore
        self._limit = torch.full((), math.inf, dtype=torch.float64, device=device)
        # One more than is compared: the last step's loss may be known, and is not used
        self.losses: deque[tuple[int, float]] = deque(maxlen=RECENT + 1)
        """(step, loss) of steps that counted."""

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return whether to skip a step with mean `loss` and gradient norm `norm`; 0-d bool, on the device."""
        return ~(torch.isfinite(loss) & torch.isfinite(norm) & (loss <= self._limit))

    def learn(self, step: int, loss: float) -> None:
        """Remember the loss of a step that counted."""
        self.losses.append((step, loss))

    def prepare(self, step: int) -> None:
        """Set the limit for `step`, which comes next."""
        if self._zscore is not None:
            self._limit.fill_(limit(self._before(step), self._zscore))

    def score(self, step: int, loss: float) -> float | None:
        """Return the spike score of `loss`, the loss of `step`; None if too few losses are known. Call it before `learn`."""
        return score(loss, self._before(step))

    def _before(self, step: int) -> list[float]:
        """Return the recent losses that `step` is compared with."""
        return [loss for s, loss in self.losses if s < step - 1][-RECENT:]


def limit(losses: Sequence[float], zscore: float) -> float:
    """Return the largest loss after `losses` that is not a spike."""
    if len(losses) < FEW:
        return math.inf
    median, spread = _center(losses)
    return median + zscore * spread


def score(loss: float, losses: Sequence[float]) -> float | None:
    """
    Return by how many robust standard deviations `loss` is above the median of `losses`; negative below it.

    None if there are too few losses, or if the loss or the score is not a number.
    """
    if len(losses) < FEW or not math.isfinite(loss):
        return None
    median, spread = _center(losses)
    return (loss - median) / spread if spread else None


def _center(losses: Sequence[float]) -> tuple[float, float]:
    """Return the median, and a robust standard deviation that is at least a hundredth of it."""
    median = statistics.median(losses)
    spread = _SIGMAS_PER_MAD * statistics.median([abs(x - median) for x in losses])
    return median, max(spread, _LEAST_SPREAD * abs(median))
