"""`shoal launch hosts`: start a run on hosts without a scheduler, over ssh."""

from __future__ import annotations

import argparse
import os
import signal
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shoal.commands.flags import Override
from shoal.commands.recipes import decided, recipe_asked, resolve_with_auto, tell_once
from shoal.commands.seeing_parser import add_recipe
from shoal.errors import LaunchError, ShoalError

if TYPE_CHECKING:
    from shoal.config.options import Config
    from shoal.launch.hosts import Host

PORT: Final = 29400
# Variables that the user sets for the libraries of a run. Each node's login shell sets the others.
_HANDED_ON: Final = ("NCCL_", "GLOO_", "TORCH", "OMP_", "CUDA_", "HF_", "WANDB_", "MLFLOW_", "COMET_", "PYTHONPATH")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `shoal launch hosts`, which also takes the options of all config sections."""
    from shoal.launch.hosts import SSH

    add_recipe(parser)
    parser.add_argument(
        "--hosts-file",
        type=Path,
        required=True,
        metavar="FILE",
        help="hosts to train on, one a line: [USER@]HOST [slots=N] [port=P]",
    )
    parser.add_argument("--ssh", default=SSH, metavar="COMMAND", help=f"command that reaches a host (default: {SSH})")
    parser.add_argument(
        "--python", metavar="PATH", help="Python with shoal on the hosts (default: the same path as here)"
    )
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME[=VALUE]",
        help=f"also set this environment variable there; those that begin with {', '.join(_HANDED_ON)} are handed on",
    )  # fmt: skip


def hosts(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    """Run `shoal train` on all hosts, print their output, and hand on signals; return the run's exit code, see `Hosts.wait`."""
    from shoal.launch.hosts import Hosts, read_hosts

    found = read_hosts(args.hosts_file)
    flags, config = _plan(args, overrides, found)
    if len(found) > config.launch.nodes:
        tell_once(
            [
                f"{len(found) - config.launch.nodes} of {len(found)} hosts wait as spares: launch.nodes is {config.launch.nodes}"
            ]
        )
    group = Hosts(found, args.ssh, args.python)
    _hand_on_signals(group)
    recipe = [str(args.recipe)] if args.recipe is not None else []
    group.start(["-m", "shoal", "train", *recipe, *flags], os.getcwd(), _environment(args.env, len(found)))
    return group.wait(config.launch.fewest_nodes)


def _plan(args: argparse.Namespace, overrides: list[Override], found: list[Host]) -> tuple[list[str], Config]:
    """Return the flags of `shoal train` on each host, and the config that they give. Raises `ShoalError` if it is invalid."""
    from shoal.launch.hosts import common_slots
    from shoal.resolve.layout_checks import refusals_of_machines
    from shoal.resolve.resolve import peek

    given = {key for key, _, _ in overrides}
    asked = list(overrides)
    if "launch.nodes" not in given:
        asked.append(("launch.nodes", str(len(found)), "--hosts-file"))
    recipe = recipe_asked(args, overrides)
    looked = peek(recipe, asked, ("launch.nodes", "launch.rendezvous"))
    nodes = looked["launch.nodes"]
    if nodes > len(found):
        raise LaunchError(
            f"launch.nodes is {nodes}, but {args.hosts_file} has {len(found)} hosts; add hosts or set launch.nodes to less"
        )
    if nodes > 1 and looked["launch.rendezvous"] is None:
        asked.append(("launch.rendezvous", _meeting_place(found[0], args.hosts_file), "--hosts-file"))
    if (slots := common_slots(found)) is not None and "launch.processes" not in given:
        asked.append(("launch.processes", str(slots), "--hosts-file"))
    resolved = resolve_with_auto(recipe, asked, named=args.recipe is not None)
    waits = bool(resolved.undecided) and resolved.config.launch.nodes == 1  # for the host, where shoal train chooses
    config = resolved.config if waits else decided(resolved)
    if not waits and config.launch.processes and (wrong := list(refusals_of_machines(config, config.launch.processes))):
        raise LaunchError("\n".join(wrong))
    return [f"--{key}={text}" for key, text, _ in asked], config


def _meeting_place(first: Host, file: Path) -> str:
    """Return the address of the first host. Raises `LaunchError` if other nodes cannot reach it by that name."""
    from shoal.system.network import address_of

    try:
        address_of(first.name, PORT, option="launch.rendezvous", from_afar=True)
    except LaunchError as error:
        raise LaunchError(
            f"{error}. The nodes meet at the first host of {file}: write a name there that all nodes resolve, or set "
            "launch.rendezvous"
        ) from None
    return f"[{first.name}]:{PORT}" if ":" in first.name else f"{first.name}:{PORT}"


def _environment(asked: list[str], count: int) -> dict[str, str]:
    """Return the environment variables to set on the `count` hosts. Raises `ShoalError` for one that is not set here."""
    from shoal.run.starts import START

    found = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
    for word in asked:
        name, has_value, value = word.partition("=")
        if not has_value and name not in os.environ:
            raise ShoalError(f"--env {name}: it is not set here; write --env {name}=VALUE")
        found[name] = value if has_value else os.environ[name]
    return found | {START: f"hosts-{uuid.uuid4().hex}-{count}"}


def _hand_on_signals(group: Any) -> None:
    """Send each signal that asks this process to stop to the launchers on all hosts, which save and end."""

    def hand_on(number: int, frame: object) -> None:
        group.signal("SIGINT" if number == signal.SIGINT else "SIGTERM")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, hand_on)
