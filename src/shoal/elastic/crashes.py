"""Worker deaths: which came first, how, and whether to restart. No torch."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any, Final

from shoal.errors import EXIT_LOST_PEER

# Exit codes of a worker that lost a peer; a larger value means more certainty. NCCL's watchdog aborts its process (SIGABRT)
# if a peer died or a collective timed out, but SIGABRT has many other causes.
FOLLOWS: Final = {EXIT_LOST_PEER: 2, -signal.SIGABRT: 1}


class Crashes:
    """Counts crashes without progress, whatever their cause. A crash at a later step than all before sets the count back to 1."""

    def __init__(self, most: int) -> None:
        """most: the number of such crashes after which the run gives up."""
        self.most = most
        self.count = 0
        self.step = -1  # the latest step at which the run crashed

    def add(self, step: int) -> bool:
        """Count a crash at `step`; return True if the run should give up."""
        self.count = 1 if step > self.step else self.count + 1
        self.step = max(step, self.step)
        return self.count >= self.most


def first_death(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """Return (rank, torch's ProcessFailure) of the death that caused the others."""
    return min(failures.items(), key=lambda item: (FOLLOWS.get(item[1].exitcode, 0), item[1].timestamp))


def how_it_died(code: int) -> str:
    """Describe an exit code; a negative code is minus the signal's number."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
