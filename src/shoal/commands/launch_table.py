"""`shoal launch table`: a layout's ranks by node and device, before any job starts."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from shoal.commands.flags import Override
from shoal.commands.recipes import recipe_asked, resolve_run, tell_once
from shoal.commands.seeing_parser import add_recipe
from shoal.errors import LaunchError, ShoalError

if TYPE_CHECKING:
    from shoal.config.layout import Layout
    from shoal.config.options import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `shoal launch table`, which also takes the options of all config sections."""
    add_recipe(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def table(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    """Print which rank each device gets, and which axes communicate inside a node. Raises `LaunchError` if it does not fit."""
    from shoal.config.layout import find_layout
    from shoal.plan.topology import layout_record, layout_table, node_notes
    from shoal.resolve.layout_checks import refusals_of_machines

    config = _resolve(args, overrides)
    nodes, processes = config.launch.nodes, config.launch.processes
    if processes is None:
        raise LaunchError("the table needs the number of processes of a node; set launch.processes, such as 8")
    if wrong := list(refusals_of_machines(config, processes)):
        raise LaunchError("\n".join(wrong))
    layout = find_layout(config.parallel, nodes * processes)
    assert not isinstance(layout, str), "refusals_of_machines rejects these"
    hosts = [f"node{number}" for number in range(nodes)]
    if args.json:
        print(json.dumps(layout_record(layout, processes, hosts) | {"notes": node_notes(layout, processes)}, indent=2))
        return 0
    for line in [*layout_table(layout, processes, hosts, most=None), *_memory(config, layout)]:
        print(line)
    tell_once(node_notes(layout, processes))
    return 0


def _resolve(args: argparse.Namespace, overrides: list[Override]) -> Config:
    """Return the config. A table needs no address where nodes meet, so an unset `launch.rendezvous` gets an example."""
    from shoal.resolve.resolve import peek

    recipe = recipe_asked(args, overrides)
    given = peek(recipe, overrides, ("launch.nodes", "launch.rendezvous"))
    asked = list(overrides)
    if given["launch.nodes"] > 1 and given["launch.rendezvous"] is None:
        asked.append(("launch.rendezvous", "node0:29400", "shoal launch table"))
    return resolve_run(recipe, asked, named=args.recipe is not None, needs_length=False)


def _memory(config: Config, layout: Layout) -> list[str]:
    """Return a line with the memory that each process always holds; none if it is unknown."""
    from shoal.plan.fit import held_bytes
    from shoal.system.disk import gigabytes

    try:
        held = held_bytes(config, layout)
    except (ShoalError, ValueError):  # the vocabulary is the tokenizer's, which is not made yet
        return []
    return [f"each process holds {gigabytes(int(held))} of weights, gradients and optimizer state"]
