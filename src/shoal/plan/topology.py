"""Which node and device each rank of a layout gets, and which axes communicate inside a node. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from shoal.config.layout import AXES, Layout
from shoal.system.output import aligned

MOST_NODES: Final = 8  # rows of a table; more would hide the lines around it
# What an axis sends over the network if it spans nodes, from the most to the least.
_SENDS: Final = {"tp": "activations several times per block", "cp": "keys and values of each block"}


def crosses_nodes(layout: Layout, axis: str, processes: int) -> bool:
    """Return whether some group along `axis` has ranks on several nodes of `processes` ranks each."""
    if layout.world_size <= processes:
        return False
    inner = AXES[AXES.index(axis) :]
    # Groups are inside aligned blocks of this many ranks. All groups stay inside nodes only if blocks do.
    return bool(getattr(layout, axis) > 1 and processes % math.prod(getattr(layout, name) for name in inner))


def describe_spread(layout: Layout, processes: int) -> str:
    """Return "tp inside a node, dp_shard across nodes": the axes of the layout, innermost first; empty for one process."""
    named = [name for name in reversed(AXES) if getattr(layout, name) > 1]
    return ", ".join(
        f"{name} {'across nodes' if crosses_nodes(layout, name, processes) else 'inside a node'}" for name in named
    )


def node_notes(layout: Layout, processes: int) -> list[str]:
    """Return a note for each axis that communicates much and spans nodes of `processes` ranks, with a suggested size."""
    notes = []
    for axis, sends in _SENDS.items():
        size = getattr(layout, axis)
        if not crosses_nodes(layout, axis, processes):
            continue
        room = processes // layout.tp if axis == "cp" and layout.tp <= processes else processes
        fits = max(d for d in range(1, room + 1) if room % d == 0 and size % d == 0)
        instead = "parallel.dp_shard or parallel.pp across the nodes instead"
        to = f"set parallel.{axis} to {fits}, and use {instead}" if fits > 1 else f"use {instead}"
        notes.append(
            f"parallel.{axis} {size} spans nodes of {processes} process{'es' * (processes > 1)}, so {sends} cross the "
            f"network; {to}"
        )
    return notes


def layout_table(layout: Layout, processes: int, hosts: Sequence[str], *, most: int | None = MOST_NODES) -> list[str]:
    """
    Return a table with a row per node and a column per device; a cell has the rank and its coordinates.

    processes: the number per node. hosts: the nodes' names in rank order. most: the maximum number of rows; None: all.
    """
    axes = [name for name in AXES if getattr(layout, name) > 1]
    head = ["node", *(f"device {local}" for local in range(processes))]
    rows = [
        [host, *(_cell(layout, axes, node * processes + local) for local in range(processes))]
        for node, host in enumerate(hosts)
    ]
    hidden = 0 if most is None else max(0, len(rows) - most)
    if hidden:
        rows = [*rows[: len(rows) - hidden - 1], rows[-1]]
    lines = aligned([head, *rows], left=range(len(head)))
    if hidden:
        lines.insert(len(lines) - 1, f"... {hidden} more")
    count = len(hosts)
    title = f"layout {layout} on {count} node{'s' * (count > 1)} of {processes} process{'es' * (processes > 1)}"
    cells = f"; cells are rank:{'.'.join(axes)}" if axes else ""
    spread = describe_spread(layout, processes)
    return [f"{title}{cells}", *lines, *([spread] if spread else [])]


def layout_record(layout: Layout, processes: int, hosts: Sequence[str]) -> dict[str, object]:
    """Return the same as `layout_table`, for JSON."""
    return {
        "layout": {name: getattr(layout, name) for name in AXES},
        "across_nodes": {name: crosses_nodes(layout, name, processes) for name in AXES},
        "nodes": [
            {
                "host": host,
                "devices": [
                    {"device": local, "rank": node * processes + local} | layout.coordinates(node * processes + local)
                    for local in range(processes)
                ],
            }
            for node, host in enumerate(hosts)
        ],
    }


def _cell(layout: Layout, axes: Sequence[str], rank: int) -> str:
    at = layout.coordinates(rank)
    return ":".join([str(rank), *[".".join(str(at[name]) for name in axes)][: len(axes)]])
