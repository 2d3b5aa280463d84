"""Deaths of workers: which came first, how, and whether it makes sense to start again."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any, Final

from shoal.errors import EXIT_LOST_PEER

# How a worker ends that lost a peer; the larger, the surer. NCCL's watchdog aborts its process (SIGABRT) when a peer has gone
# or a collective takes longer than its timeout; so does much else.
FOLLOWS: Final = {EXIT_LOST_PEER: 2, -signal.SIGABRT: 1}


class Crashes:
    """Counts the crashes of a run that came no step further in between, whatever their cause."""

    def __init__(self, most: int) -> None:
        """most: so many are too many."""
        self.most = most
        self.count = 0
        self.step = -1  # the farthest at which the run crashed

    def add(self, step: int) -> bool:
        """A crash at `step`; True where it is not worth starting again."""
        self.count = 1 if step > self.step else self.count + 1
        self.step = max(step, self.step)
        return self.count >= self.most


def first_death(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """(rank, torch's ProcessFailure) of the one that the others followed."""
    return min(failures.items(), key=lambda item: (FOLLOWS.get(item[1].exitcode, 0), item[1].timestamp))


def how_it_died(code: int) -> str:
    """An exit code in words; negative: minus a signal."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
