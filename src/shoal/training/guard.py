"""Whether a step counts: no number, or a loss that jumps, and all processes leave the step out together."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

RECENT: Final = 128  # losses that a spike is measured against
FEW: Final = 32  # below it nothing is a spike
_SIGMAS_PER_MAD: Final = 1.4826  # of a normal distribution
_LEAST_SPREAD: Final = 0.01  # of the median: a loss that hardly moves is not to make a small step up a spike


class Guard:
    """
    Judges a step on its device, from numbers that are the same on every process; nothing waits for the host.

    A spike is a loss that is `zscore` robust deviations (median and MAD: Iglewicz and Hoaglin 1993) above the median of the
    recent ones. The limit of a step is from the losses up to the one but last, which the host knows by then on any
    device, so that a run that goes on from a checkpoint judges alike.
    """

    def __init__(self, device: torch.device, zscore: float | None) -> None:
        self._zscore = zscore
        self._limit = torch.full((), math.inf, dtype=torch.float64, device=device)
        self.losses: deque[tuple[int, float]] = deque(maxlen=RECENT)
        """(step, loss), of steps that counted."""

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step of mean `loss` and gradient norm `norm` is to be left out; 0-d bool."""
        return ~(torch.isfinite(loss) & torch.isfinite(norm) & (loss <= self._limit))

    def learn(self, step: int, loss: float) -> None:
        """A step counted."""
        if self._zscore is not None:
            self.losses.append((step, loss))

    def prepare(self, step: int) -> None:
        """The limit of `step`, which is about to be taken."""
        if self._zscore is not None:
            self._limit.fill_(limit([loss for s, loss in self.losses if s < step - 1], self._zscore))


def limit(losses: Sequence[float], zscore: float) -> float:
    """The largest loss that is no spike after `losses`."""
    if len(losses) < FEW:
        return math.inf
    median = statistics.median(losses)
    spread = _SIGMAS_PER_MAD * statistics.median(abs(x - median) for x in losses)
    return median + zscore * max(spread, _LEAST_SPREAD * abs(median))
