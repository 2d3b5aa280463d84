"""Ranks by node and device, and the axes that span nodes."""

from __future__ import annotations

import itertools

import pytest

from shoal.config.layout import AXES, Layout
from shoal.plan.topology import crosses_nodes, describe_spread, layout_record, layout_table, node_notes


def spans(layout: Layout, axis: str, processes: int) -> bool:
    """Return whether a group has ranks on two nodes, by looking at each group."""
    return any(len({rank // processes for rank in group}) > 1 for group in layout.groups(axis))


def test_axes_cross_nodes_as_their_groups_do() -> None:
    for sizes in itertools.product((1, 2, 3), (1, 2), (1, 2, 4), (1, 2), (1, 2, 3)):
        layout = Layout(*sizes)
        for processes in (n for n in range(1, layout.world_size + 1) if layout.world_size % n == 0):
            for axis in AXES:
                assert crosses_nodes(layout, axis, processes) == spans(layout, axis, processes), (
                    layout,
                    axis,
                    processes,
                )


def test_a_table_has_a_row_per_node_and_a_column_per_device() -> None:
    layout = Layout(pp=2, dp_shard=2, tp=2)
    assert layout_table(layout, 4, ["alpha", "b"]) == [
        "layout pp 2 x dp_shard 2 x tp 2 on 2 nodes of 4 processes; cells are rank:pp.dp_shard.tp",
        "node   device 0  device 1  device 2  device 3",
        "alpha  0:0.0.0   1:0.0.1   2:0.1.0   3:0.1.1",
        "b      4:1.0.0   5:1.0.1   6:1.1.0   7:1.1.1",
        "tp inside a node, dp_shard inside a node, pp across nodes",
    ]


def test_a_table_of_many_nodes_shows_the_first_and_the_last() -> None:
    lines = layout_table(Layout(dp_replicate=40), 1, [f"n{i}" for i in range(40)], most=4)
    assert [line.split()[0] for line in lines[1:-1]] == ["node", "n0", "n1", "n2", "...", "n39"]
    assert lines[5] == "... 36 more"
    assert len(layout_table(Layout(dp_replicate=40), 1, [f"n{i}" for i in range(40)], most=None)) == 43


def test_one_process_has_a_table_too() -> None:
    assert layout_table(Layout(), 1, ["a"]) == [
        "layout one process on 1 node of 1 process",
        "node  device 0",
        "a     0",
    ]


def test_the_record_agrees_with_the_layout() -> None:
    layout = Layout(dp_replicate=2, cp=2, tp=2)
    found = layout_record(layout, 4, ["a", "b"])
    nodes = found["nodes"]
    assert isinstance(nodes, list)
    devices = [device for node in nodes for device in node["devices"]]
    assert [d["rank"] for d in devices] == list(range(8))
    assert [d["device"] for d in devices] == [0, 1, 2, 3] * 2
    assert all({name: d[name] for name in AXES} == layout.coordinates(d["rank"]) for d in devices)
    assert found["across_nodes"] == {
        "pp": False,
        "dp_replicate": True,
        "dp_shard": False,
        "cp": False,
        "tp": False,
    }
    assert describe_spread(layout, 4) == "tp inside a node, cp inside a node, dp_replicate across nodes"


@pytest.mark.parametrize(
    ("layout", "processes", "words"),
    [
        (Layout(tp=16), 8, ["parallel.tp 16 spans nodes of 8 processes", "set parallel.tp to 8"]),
        (Layout(dp_replicate=3, tp=4), 6, ["parallel.tp 4 spans nodes of 6 processes", "set parallel.tp to 2"]),
        (Layout(tp=2), 1, ["parallel.tp 2 spans nodes of 1 process,", "; use parallel.dp_shard"]),
        (Layout(cp=4, tp=4), 8, ["parallel.cp 4 spans nodes of 8", "set parallel.cp to 2"]),
        (Layout(cp=2, tp=8), 8, ["parallel.cp 2 spans nodes of 8", "; use parallel.dp_shard"]),
        (Layout(pp=2, dp_replicate=2, dp_shard=4, tp=2), 8, []),
        (Layout(dp_shard=64), 8, []),
        (Layout(tp=8), 8, []),
    ],
    ids=str,
)
def test_axes_that_belong_inside_a_node_are_named_if_they_are_not(
    layout: Layout, processes: int, words: list[str]
) -> None:
    notes = node_notes(layout, processes)
    assert len(notes) == bool(words)
    assert all(word in notes[0] for word in words)
