"""Counts skipped steps and rollbacks, and decides when a run rolls back or gives up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.config.run_options import Fault
from shoal.errors import DivergedError
from shoal.parallel.replicas import Mismatch
from shoal.run.console import Console

MOST_SAID: Final = 3  # steps without a label that the console names; events.jsonl has all
MOST_NAMED: Final = 4  # rows whose documents such a message names


@dataclass
class GoBack(Exception):
    """Asks for a rollback to the last checkpoint. `passed_over`: sample positions [first, stop) to skip afterwards."""

    why: str
    passed_over: tuple[int, int] | None = None


class Recovery:
    """
    Counts skipped steps in a row, and rollbacks since training last passed the farthest step it rolled back from.

    All ranks see the same numbers and decide the same.
    """

    def __init__(self, fault: Fault, console: Console, event: Callable[..., None]) -> None:
        self._fault, self._console, self._event = fault, console, event
        self._in_row = 0  # steps skipped in a row
        self._first = 0  # sample position where the first of these steps began
        self._empty = 0  # steps without a label since this start
        self._rollbacks = 0
        self._farthest = 0  # largest step at which the run rolled back

    @property
    def is_sound(self) -> bool:
        """
        Return whether the last step counted; steps skipped for a float16 overflow are ignored.

        Otherwise the state itself may be the cause, and is not worth saving.
        """
        return self._in_row == 0

    def went_well(self, step: int) -> None:
        """Note that a step counted."""
        self._in_row = 0
        if step > self._farthest:
            self._rollbacks = 0

    def left_out(
        self,
        step: int,
        *,
        loss: float,
        norm: float,
        score: float | None = None,
        first: int,
        stop: int,
        samples: list[int],
        documents: Sequence[tuple[str, int, int]],
        origin: str,
    ) -> None:
        """
        Report a skipped step on sample positions [first, stop). Raises `GoBack` after too many skipped steps in a row.

        score: its spike score, if known. documents: (source, first document, last document) of each row.
        """
        self._in_row += 1
        if self._in_row == 1:
            self._first = first
        spike = math.isfinite(loss) and math.isfinite(norm)
        why = f"its loss {loss:.4f} is a spike" if spike else f"loss {loss}, gradient norm {norm}"
        where = f"; it first appeared in {origin}" if origin else ""
        self._console.warn(f"step {step} was skipped: {why}{where}")
        facts: dict[str, float | str] = {
            "loss": loss if math.isfinite(loss) else str(loss),
            "norm": norm if math.isfinite(norm) else str(norm),
        }
        if score is not None:
            facts["spike_score"] = score
        self._event("left out", step=step, **facts, origin=origin, samples=samples, documents=documents)
        if self._in_row > self._fault.max_skipped:
            self._in_row = 0
            raise GoBack(f"{self._fault.max_skipped + 1} steps in a row were skipped", (self._first, stop))

    def no_label(self, step: int, samples: Sequence[int], documents: Sequence[tuple[str, int, int]]) -> None:
        """
        Report a step that was skipped because none of its labels is learned. It does not count as a fault.

        samples: its rows. documents: (source, first document, last document) of each row; empty if they are unknown.
        """
        self._event("no label", step=step, samples=samples, documents=documents)
        self._empty += 1
        if self._empty > MOST_SAID:
            return
        named = [_in_words(*each) for each in documents] or [f"row {row:,}" for row in samples]
        which = "; ".join(named[:MOST_NAMED]) + "; ..." * (len(named) > MOST_NAMED)
        last = ". Further such steps are only recorded in events.jsonl" * (self._empty == MOST_SAID)
        self._console.warn(
            f"step {step} was skipped: none of its labels is learned, because all lie in prompts or padding ({which}){last}"
        )

    def compared(self, step: int, differing: Sequence[Mismatch]) -> None:
        """Report a comparison of replicas. Raises `GoBack` if they differ."""
        if not differing:
            return
        ranks = sorted({rank for each in differing for rank in each.ranks})
        names = ", ".join(each.name for each in differing[:3]) + (", ..." if len(differing) > 3 else "")
        self._event("corrupted", step=step, ranks=ranks, tensors=[each.name for each in differing])
        which = f"rank {ranks[0]} holds" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} hold"
        raise GoBack(f"{which} bits that differ from the other replicas, in {names}: memory or arithmetic failed there")

    def may_go_back(self, step: int, why: str) -> None:
        """Count a rollback. Raises `DivergedError` after more than `fault.max_rollbacks` without progress."""
        self._rollbacks += 1
        self._farthest = max(self._farthest, step)
        if self._rollbacks > self._fault.max_rollbacks:
            raise DivergedError(
                f"step {step}: {why}, and {self._fault.max_rollbacks} rollbacks did not help. Try a lower optim.lr, a "
                "longer optim.warmup_steps or another train.seed"
            )


def _in_words(source: str, first: int, last: int) -> str:
    documents = f"document {first:,}" if first == last else f"documents {first:,} to {last:,}"
    return f"{documents} of {source}" if source else documents
