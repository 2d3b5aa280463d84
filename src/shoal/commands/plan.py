"""`shoal plan`: which layouts of a recipe fit into the memory of given devices, without torch and without a GPU."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from shoal.commands.flags import Override
from shoal.commands.models import narrated
from shoal.commands.recipes import recipe_asked, resolve_run
from shoal.commands.seeing_parser import add_recipe
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from shoal.config.options import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `shoal plan`, which also takes the options of all config sections."""
    add_recipe(parser)
    devices = "devices of each node: 8xH100-80GB, 8x40GB by memory alone, or 2xcpu-12GB for processes on CPUs"
    parser.add_argument("--devices", required=True, metavar="NxDEVICE", help=devices)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead, with all layouts")


def plan(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    """Print the layouts of a recipe, ordered; return 1 if none fits."""
    from shoal.plan.choose import choose, lines, record
    from shoal.plan.machine import find_machine

    machine = find_machine(args.devices, args.nodes)
    asked = [*overrides, ("launch.processes", "null", "shoal plan"), ("launch.nodes", "1", "shoal plan")]
    config = resolve_run(
        recipe_asked(args, overrides), asked, named=args.recipe is not None, needs_length=False, needs_files=False,
        on_stderr=True,
    )  # fmt: skip
    with narrated() as narrator, narrator.phase("rehearsing a step in every layout"):
        choices = choose(_finished(config, cuda=machine.cuda), machine)
        text = json.dumps(record(choices), indent=2) if args.json else "\n".join(lines(choices))
    print(text)
    return 0 if choices.fitting else 1


def _finished(config: Config, *, cuda: bool) -> Config:
    """Return the config with its vocabulary size and dtype, which a run knows from its data and its device."""
    from shoal.config.data_options import known_vocabulary

    if config.train.dtype == "auto":
        config = config.replace("train", dtype="bfloat16" if cuda else "float32")
    if config.model.vocab_size is not None:
        return config
    size = known_vocabulary(config.data)
    if size is None:
        raise ShoalError(
            f"the vocabulary of data.tokenizer {config.data.tokenizer} is not known here; set model.vocab_size"
        )
    return config.replace("model", vocab_size=size)
