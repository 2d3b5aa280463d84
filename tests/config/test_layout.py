"""Axes, ranks and groups against their definitions, and the layout chosen for a number of processes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from shoal.config.layout import AXES, Layout, find_layout, split_slots
from shoal.config.options import Parallel

SIZES = list(itertools.product((1, 2), (1, 3), (1, 2), (1, 2), (1, 2)))


@pytest.mark.parametrize("sizes", SIZES)
def test_ranks_and_coordinates_are_each_others_inverse(sizes: tuple[int, ...]) -> None:
    layout = Layout(*sizes)
    places = [tuple(layout.coordinates(rank).values()) for rank in range(layout.world_size)]
    # neighbors along the last axis have adjacent ranks: coordinates are in lexicographic order
    assert places == list(itertools.product(*map(range, sizes)))
    assert [layout.rank(**layout.coordinates(rank)) for rank in range(layout.world_size)] == list(
        range(layout.world_size)
    )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("axes", [("tp",), ("dp_shard", "cp"), ("dp_replicate", "dp_shard", "cp"), ("pp",), AXES])
def test_groups_part_the_world_and_differ_along_their_axes_alone(sizes: tuple[int, ...], axes: tuple[str, ...]) -> None:
    layout = Layout(*sizes)
    groups = layout.groups(*axes)
    assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
    for group in groups:
        others = [{k: v for k, v in layout.coordinates(r).items() if k not in axes} for r in group]
        assert all(place == others[0] for place in others)
        along = [tuple(layout.coordinates(r)[a] for a in axes) for r in group]
        assert along == list(itertools.product(*(range(getattr(layout, a)) for a in axes)))


@pytest.mark.parametrize(
    ("parallel", "processes", "expected"),
    [
        ({}, 4, Layout(dp_replicate=4)),
        ({}, None, Layout()),
        ({"tp": 2}, None, Layout(tp=2)),
        ({"tp": 2}, 6, Layout(dp_replicate=3, tp=2)),
        ({"dp_shard": -1}, 4, Layout(dp_shard=4)),
        ({"dp_shard": -1, "dp_replicate": 2}, 8, Layout(dp_replicate=2, dp_shard=4)),
        ({"dp_shard": 2, "tp": 2, "pp": 2}, 8, Layout(pp=2, dp_shard=2, tp=2)),
        ({"cp": -1, "dp_shard": 2}, 8, Layout(dp_shard=2, cp=4)),
        ({"dp_replicate": 1, "cp": 2}, 2, Layout(cp=2)),
    ],
)
def test_the_layout_of_so_many_processes(parallel: dict[str, Any], processes: int | None, expected: Layout) -> None:
    assert find_layout(Parallel(**parallel), processes) == expected


@pytest.mark.parametrize(
    ("parallel", "processes", "words"),
    [
        ({"tp": 2}, 3, "parallel.tp 2 needs a multiple of 2 processes, but launch.processes is 3; set launch.processes to 2 or 4"),
        ({"dp_shard": 4}, 2, "set launch.processes to 4"),
        ({"dp_replicate": 1, "tp": 2}, 4, "needs 2 processes, but launch.processes is 4"),
        ({"dp_shard": -1, "tp": -1}, 4, "both -1"),
        ({"cp": 0}, None, "parallel.cp is 0"),
    ],
)  # fmt: skip
def test_why_there_is_none(parallel: dict[str, Any], processes: int | None, words: str) -> None:
    found = find_layout(Parallel(**parallel), processes)
    assert isinstance(found, str)
    assert words in found


@pytest.mark.parametrize("dp", range(1, 9))
@pytest.mark.parametrize("slots", range(8, 20))
def test_slots_are_dealt_in_order_and_evenly(slots: int, dp: int) -> None:
    hands = split_slots(slots, dp)
    assert list(itertools.chain(*hands)) == list(range(slots))
    lengths = [len(hand) for hand in hands]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


def test_a_layout_reads_as_its_axes() -> None:
    assert str(Layout(dp_shard=2, tp=4)) == "dp_shard 2 x tp 4"
    assert str(Layout()) == "one process"
