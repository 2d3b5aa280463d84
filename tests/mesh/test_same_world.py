"""Ranks that other launchers started find in seconds that they do not belong to one world."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from shoal.errors import LaunchError
from shoal.mesh import same_world
from shoal.mesh.place import Place
from shoal.mesh.same_world import check_same_world

SETTINGS = {"torch": "2.13.0", "optim.lr": 0.1}


def check(ranks: Sequence[tuple[int, int, Mapping[str, Any]]], seconds: float = 60.0) -> list[str]:
    """Return each rank's error, "" for none; ranks are (rank, world size, settings that differ)."""
    store, found = HashStore(), [""] * len(ranks)

    def one(index: int, rank: int, world_size: int, settings: Mapping[str, Any]) -> None:
        try:
            check_same_world(store, Place(rank, world_size), {**SETTINGS, **settings}, seconds)
        except LaunchError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=one, args=(index, *each)) for index, each in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_agree_join() -> None:
    assert check([(rank, 5, {}) for rank in (3, 1, 0, 4, 2)]) == [""] * 5


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([(0, 4, {}), (1, 2, {})], "WORLD_SIZE is 2 for rank 1 on HOST but 4 for rank 0 on HOST"),
        ([(0, 2, {}), (1, 4, {}), (2, 4, {})], "WORLD_SIZE is 4 for rank"),
        ([(0, 3, {}), (1, 3, {}), (1, 3, {})], "two processes are rank 1, on HOST and HOST"),
        ([(0, 2, {}), (1, 2, {"torch": "2.11.0"})], "torch is 2.11.0 for rank 1 on HOST but 2.13.0 for rank 0 on HOST"),
        ([(2, 3, {"optim.lr": 0.2}), (0, 3, {}), (1, 3, {})], "optim.lr is 0.2 for rank 2"),
    ],
    ids=str,
)
def test_ranks_that_disagree_all_end_with_one_reason(
    monkeypatch: pytest.MonkeyPatch, ranks: list[tuple[int, int, Mapping[str, Any]]], words: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "HOST")
    found = check(ranks)
    assert words in found[0]
    assert set(found) == {found[0]}


def test_ranks_that_do_not_come_are_named() -> None:
    found = check([(0, 4, {}), (2, 4, {})], 0.3)
    assert "of WORLD_SIZE 4, 1, 3 did not" in found[0]
    assert found[1] == found[0]


def test_a_missing_rank_0_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_world, "READ_SECONDS", 0.1)
    assert all(words.startswith("rank 0 did not join") for words in check([(1, 3, {}), (2, 3, {})], 0.1))
