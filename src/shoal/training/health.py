"""Counts what went wrong with a run, and says when it goes back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.config.options import Fault
from shoal.errors import DivergedError
from shoal.parallel.replicas import Difference
from shoal.run.console import Console


@dataclass
class GoBack(Exception):
    """The run is to go on from its last checkpoint; `passed_over` are positions [first, stop) to leave out then."""

    why: str
    passed_over: tuple[int, int] | None = None


class Recovery:
    """Counts what went wrong since it last went well. All processes see the same, and decide alike."""

    def __init__(self, fault: Fault, console: Console, event: Callable[..., None]) -> None:
        self._fault, self._console, self._event = fault, console, event
        self._in_row = 0  # steps left out
        self._first = 0  # the position where the first of them began
        self._rollbacks = 0
        self._farthest = 0  # the step at which it went back last

    @property
    def is_sound(self) -> bool:
        """Whether the last step counted: else what is there may be the reason, and is not worth saving."""
        return self._in_row == 0

    def went_well(self, step: int) -> None:
        """A step counted."""
        self._in_row = 0
        if step > self._farthest:
            self._rollbacks = 0

    def left_out(
        self, step: int, *, loss: float, norm: float, first: int, stop: int, samples: list[int], origin: str
    ) -> None:
        """A step of positions [first, stop) was left out. Raises `GoBack` where it is one too many in a row."""
        self._in_row += 1
        if self._in_row == 1:
            self._first = first
        spike = math.isfinite(loss) and math.isfinite(norm)
        why = f"its loss {loss:.4f} is a spike" if spike else f"loss {loss}, gradient norm {norm}"
        where = f"; it began in {origin}" if origin else ""
        self._console.warn(f"step {step} was left out: {why}{where}")
        facts = {"loss": loss if math.isfinite(loss) else str(loss), "norm": norm if math.isfinite(norm) else str(norm)}
        self._event("left out", step=step, **facts, origin=origin, samples=samples)
        if self._in_row > self._fault.max_skipped:
            self._in_row = 0
            raise GoBack(f"{self._fault.max_skipped + 1} steps in a row were left out", (self._first, stop))

    def compared(self, step: int, differing: Sequence[Difference]) -> None:
        """Replicas were compared. Raises `GoBack` where they differ."""
        if not differing:
            return
        ranks = sorted({rank for each in differing for rank in each.ranks})
        names = ", ".join(each.name for each in differing[:3]) + (", ..." if len(differing) > 3 else "")
        self._event("corrupted", step=step, ranks=ranks, tensors=[each.name for each in differing])
        which = f"rank {ranks[0]} holds" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} hold"
        raise GoBack(f"{which} other bits than its replicas, of {names}: memory or arithmetic failed there")

    def may_go_back(self, step: int, why: str) -> None:
        """Raises `DivergedError` where going back has not helped so often."""
        self._rollbacks += 1
        self._farthest = max(self._farthest, step)
        if self._rollbacks > self._fault.max_rollbacks:
            raise DivergedError(
                f"step {step}: {why}, and going back {self._fault.max_rollbacks} times did not help. A lower optim.lr, a "
                "longer optim.warmup_steps or another train.seed may"
            )
