"""The arguments and help of `shoal launch`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.commands import launch, launch_hosts, launch_jobs, launch_logs, launch_table
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
    named = "[RECIPE] --hosts-file FILE [--processes N]"
    hosts = make("hosts", launch_hosts.hosts, "train a recipe on the hosts of a file, which are reached by ssh", named)
    launch_hosts.add_arguments(hosts)
    placed = "show which device of which node gets which rank, and which axes stay inside a node"
    table = make("table", launch_table.table, placed, "[RECIPE] --nodes N [--gpus-per-node G]")
    launch_table.add_arguments(table)
    if action in ("hosts", "table"):
        add_options(hosts if action == "hosts" else table)
    shown = "show the jobs of a run: their states, nodes and steps, and why the run continues or does not"
    status = make("status", launch_jobs.status, shown)
    _add_run(status)
    status.add_argument("--json", action="store_true", help="print one JSON object instead")
    read = "say which process of a failed job failed first and why, or print the log of a rank"
    launch_logs.add_arguments(make("logs", launch_logs.logs, read))
    _add_run(make("stop", launch_jobs.stop, "let the running job of a run save and end, and cancel those that wait"))
    again = "let the running job of a run save and start again, or submit a stopped run again"
    _add_run(make("requeue", launch_jobs.requeue, again))
    begin = make(
        "began", launch_jobs.began, "called by the batch script at its start: record it, and print where nodes meet"
    )
    _add_script(begin)
    waiting = (
        "called by the batch script beside srun: end it if it waits for a node although nothing trains the run any more"
    )
    watch = make("watch", launch_jobs.watch, waiting)
    watch.add_argument("target", metavar="RUN", help="folder of the run")
    watch.add_argument("--srun", type=int, required=True, metavar="PID", help="process id of srun")
    finish = make(
        "ended", launch_jobs.ended, "called by the batch script at its end: requeue the job if the run is to continue"
    )
    _add_script(finish)
    finish.add_argument("--code", type=int, required=True, metavar="C", help="exit code of srun")
    received = "signal that the script has received (default: none)"
    finish.add_argument("--signal", choices=["none", "USR2", "TERM"], default="none", help=received)
    finish.add_argument(
        "--no-requeue", dest="requeue", action="store_false", help="submit another job instead of requeuing this one"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="name or folder of a run")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds all runs (default: runs)")


def _add_script(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="folder of the run")
    bound = "how often the run may start again (default: 50)"
    parser.add_argument("--max-requeues", metavar="N", type=_number, default=50, help=bound)


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, help: str, **how: Any) -> None:
        parser.add_argument(flag, help=help, **how)

    add("--submit", "submit the job with sbatch", action="store_true")
    add("--time", "time limit of the job, in Slurm's form; sets launch.time_limit_minutes", metavar="D-HH:MM:SS")
    add(
        "--site",
        "the cluster's facts (default: cluster.yaml, else ~/.config/shoal/cluster.yaml)",
        metavar="FILE",
        type=Path,
    )
    add("--partition", "partition of the job", metavar="NAME")
    add("--account", "account that pays for the job", metavar="NAME")
    add("--qos", "quality of service of the job", metavar="NAME")
    add("--constraint", "features that the nodes must have", metavar="FEATURES")
    add("--exclude", "nodes not to use, such as n7,n9", metavar="NODES")
    cores = "CPU cores of each node to ask for (default: whole nodes)"
    add("--cpus-per-node", cores, metavar="N", type=_count)
    spares = "further nodes of the job, which wait to replace one that fails (default: 0)"
    add("--spare-nodes", spares, metavar="N", type=_number, default=0)
    bound = "how often the job may start again (default: 50)"
    add("--max-requeues", bound, metavar="N", type=_number, default=50)
    array = "start one run for each index, such as 0-3; {task} in an option's value is the index: --seed {task}"
    add("--array", array, metavar="INDEXES")
    ahead = "submit N jobs at once, each of which continues the one before; for clusters that forbid requeue"
    add("--chain", ahead, metavar="N", type=_count)
    add("--stage", "copy data.folder, the prepared tokens, to each node's own disk first", action="store_true")
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
