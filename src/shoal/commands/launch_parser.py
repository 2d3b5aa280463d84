"""The arguments and help of `shoal launch`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.commands import launch
from shoal.commands.flags import add_options
from shoal.commands.seeing_parser import add_recipe


def add_launch(make: Callable[..., argparse.ArgumentParser], action: str | None) -> None:
    """
    Add the actions of `shoal launch`.

    make: makes an action's parser from its name, its function and its help. action: the action asked for, which alone gets the
    options of all config sections, if it takes them.
    """
    written = "write a Slurm batch script that trains a recipe on several nodes, and submit it"
    sub = make("slurm", launch.slurm, written, "[RECIPE] [--nodes N] [--gpus-per-node G] [--time T] [--submit]")
    add_recipe(sub)
    _add_slurm(sub)
    if action == "slurm":
        add_options(sub, own=["time"])


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, help: str, **how: Any) -> None:
        parser.add_argument(flag, help=help, **how)

    add("--submit", "submit the job with sbatch", action="store_true")
    add("--time", "time limit of the job, in Slurm's form; sets launch.time_limit_minutes", metavar="D-HH:MM:SS")
    add("--site", "the cluster's facts (default: cluster.yaml, else ~/.config/shoal/cluster.yaml)", metavar="FILE", type=Path)
    add("--partition", "partition of the job", metavar="NAME")
    add("--account", "account that pays for the job", metavar="NAME")
    add("--qos", "quality of service of the job", metavar="NAME")
    add("--constraint", "features that the nodes must have", metavar="FEATURES")
    cores = "CPU cores of each node to ask for (default: whole nodes)"
    add("--cpus-per-node", cores, metavar="N", type=_count)
    spares = "further nodes of the job, which wait to replace one that fails (default: 0)"
    add("--spare-nodes", spares, metavar="N", type=_number, default=0)
    bound = "how often the job may start again (default: 50)"
    add("--max-requeues", bound, metavar="N", type=_number, default=50)
    array = "start one run for each index, such as 0-3; {task} in an option's value is the index: --seed {task}"
    add("--array", array, metavar="INDEXES")
    add("--dependency", "start only after other jobs, in Slurm's form, such as afterok:1234", metavar="SPEC")


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number
