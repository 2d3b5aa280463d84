"""The ballot of a step: named votes of each rank, each a few numbers that are summed over the world."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch


def _ignore(sums: Sequence[float]) -> None:
    """Ignore the sums: the caller of `Ballot.count` reads this vote's sums by name."""


@dataclass(frozen=True)
class Vote:
    """
    The numbers that one module contributes, and the function that gets their sums over the world.

    The count of numbers is the same on every rank. The sums may arrive a step later, so `hear` must hold the state that it
    needs then.
    """

    numbers: Sequence[float]
    hear: Callable[[Sequence[float]], None] = _ignore


class Ballot:
    """
    This rank's votes in one step, by name; all ranks give the same names in the same order.

    The votes are summed over the world as one vector, in the same all-reduce as a step's losses.
    """

    def __init__(self, votes: Mapping[str, Vote]) -> None:
        self._votes = votes

    def numbers(self) -> torch.Tensor:
        """Return the numbers of all votes, [numbers] float64, on the CPU."""
        return torch.tensor([n for vote in self._votes.values() for n in vote.numbers], dtype=torch.float64)

    def count(self, sums: Sequence[float]) -> dict[str, Sequence[float]]:
        """
        Pass each module the sums of its vote; return them by name. `sums`: the sums of `numbers()` over the world.

        Raises ValueError if the number of sums differs from this ballot's number of numbers.
        """
        said, first = {}, 0
        for name, vote in self._votes.items():
            said[name] = sums[first : first + len(vote.numbers)]
            first += len(vote.numbers)
        if first != len(sums):
            raise ValueError(f"the ballot has {first} numbers, and {len(sums)} sums came back")
        for name, vote in self._votes.items():
            vote.hear(said[name])
        return said


EMPTY: Final = Ballot({})
