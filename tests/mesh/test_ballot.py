"""The ballot: numbers that ranks sum in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from shoal.mesh.ballot import EMPTY, Ballot, Vote
from shoal.mesh.mesh import Mesh
from tests.world import World


def counted(mesh: Mesh, with_losses: bool) -> tuple[dict[str, Sequence[float]], list[Sequence[float]]]:
    """Return the sums by vote, and those passed to the callback of `saves`. with_losses: whether to sum losses with the votes."""
    heard: list[Sequence[float]] = []
    ballot = Ballot({"stop": Vote([mesh.place.rank]), "saves": Vote([1.0, 10.0 * mesh.place.rank], heard.append)})
    losses = torch.ones(3 if with_losses else 0, dtype=torch.float64)
    sums = mesh.sum(torch.cat([losses, ballot.numbers()]))[len(losses) :]
    return ballot.count(sums.tolist()), heard


@pytest.mark.parametrize("with_losses", [True, False])
def test_each_room_hears_the_sum_of_its_own_vote(world: Callable[[int], World], with_losses: bool) -> None:
    for said, heard in world(2).run(counted, with_losses):
        assert said == {"stop": [1.0], "saves": [2.0, 10.0]}
        assert heard == [[2.0, 10.0]]


def test_sums_of_another_ballot_are_rejected_before_any_room_hears() -> None:
    heard: list[Sequence[float]] = []
    with pytest.raises(ValueError, match="1 numbers, and 2 sums"):
        Ballot({"one": Vote([1.0], heard.append)}).count([1.0, 2.0])
    assert heard == []
    assert EMPTY.count([]) == {}
