"""`shoal launch`: start a run on the nodes of a cluster, and follow its jobs."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.commands.flags import Override
from shoal.commands.recipes import recipe_asked, resolve_run
from shoal.errors import LaunchError
from shoal.system.output import on_one_line

if TYPE_CHECKING:
    from shoal.config.options import Config
    from shoal.launch.site import Site
    from shoal.launch.slurm import Job

# The script sets these options itself.
_OF_THE_SCRIPT: Final = (
    "launch.name", "launch.runs", "launch.nodes", "launch.processes", "launch.rendezvous", "launch.time_limit_minutes"
)  # fmt: skip
_TIMES: Final = (  # the forms of a time in Slurm, with the minutes of each part
    (r"(\d+)", (1,)), (r"(\d+):(\d+)", (1, 1 / 60)), (r"(\d+):(\d+):(\d+)", (60, 1, 1 / 60)),
    (r"(\d+)-(\d+)", (1440, 60)), (r"(\d+)-(\d+):(\d+)", (1440, 60, 1)), (r"(\d+)-(\d+):(\d+):(\d+)", (1440, 60, 1, 1 / 60)),
)  # fmt: skip


def slurm(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.launch.site import Site
    from shoal.launch.slurm import RECIPE, SCRIPT, script

    site, site_file = Site.read(args.site)
    site = _with_flags(site, args)
    recipe = recipe_asked(args, overrides)
    config = _resolve(args, recipe, overrides, site)
    job = _plan(args, config, overrides, site, argv)
    text = script(job, site)
    folder = job.run / "jobs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(recipe, folder / RECIPE)
        (folder / SCRIPT).write_text(text, encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"{on_one_line(folder)} cannot be written: {error.strerror}; set launch.runs to a shared folder") from None
    print(text, end="")
    return 0


def minutes_of(text: str) -> float:
    """Return the minutes of a time in one of Slurm's forms, such as 90, 24:00:00 or 2-12. Raises `LaunchError`."""
    for form, units in _TIMES:
        if found := re.fullmatch(form, text):
            minutes = sum(int(part) * unit for part, unit in zip(found.groups(), units, strict=True))
            if minutes > 0:
                return minutes
    raise LaunchError(f"--time {text!r} is not a time; write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 24:00:00 or 2-12")


def _with_flags(site: Site, args: argparse.Namespace) -> Site:
    """Return the site's facts with those given as flags in their place."""
    import dataclasses

    given = {n: v for n in ("partition", "account", "qos", "constraint", "cpus_per_node") if (v := getattr(args, n)) is not None}
    return dataclasses.replace(site, **given)


def _resolve(args: argparse.Namespace, recipe: Path, overrides: list[Override], site: Site) -> Config:
    """Return the config of the run on the job's nodes. Raises `LaunchError` if its layout does not fit them."""
    from shoal.resolve.layout_checks import refusals_of_machines
    from shoal.resolve.resolve import peek

    asked = list(overrides)
    if args.time is not None:
        asked.append(("launch.time_limit_minutes", str(minutes_of(args.time)), "--time"))
    given = peek(recipe, asked, ("launch.nodes", "launch.processes", "train.device"))
    if given["launch.nodes"] > 1 and not any(key == "launch.rendezvous" for key, _, _ in overrides):
        asked.append(("launch.rendezvous", "first-node:10000", "shoal launch slurm"))
    if given["train.device"] != "cpu" and given["launch.processes"] is None and site.gpus_per_node:
        asked.append(("launch.processes", str(site.gpus_per_node), "gpus_per_node of cluster.yaml"))
    config = resolve_run(recipe, asked, named=args.recipe is not None, on_stderr=True)
    if config.train.device != "cpu" and config.launch.processes is None:
        raise LaunchError(
            "the job needs to know how many GPUs each node has: give --gpus-per-node 8, or gpus_per_node in cluster.yaml; or "
            "--train.device cpu to train without GPUs"
        )
    if config.launch.processes and (wrong := list(refusals_of_machines(config, config.launch.processes))):
        raise LaunchError("\n".join(wrong))
    return config


def _plan(args: argparse.Namespace, config: Config, overrides: list[Override], site: Site, argv: list[str]) -> Job:
    """Return the job that trains `config`."""
    from shoal.launch.slurm import Job

    launch = config.launch
    if args.spare_nodes and launch.nodes == 1:
        raise LaunchError("--spare-nodes needs a run of several nodes: set --nodes")
    flags = [f"--{key}={text}" for key, text, _ in overrides if key not in _OF_THE_SCRIPT]
    if launch.time_limit_minutes is not None:
        flags.append("--launch.time_limit_minutes=null")  # the job's limit holds, which began when the job did
    on_gpus = config.train.device != "cpu"
    return Job(
        name=launch.name or "run",
        run=Path(launch.runs).absolute() / (launch.name or "run"),
        directory=Path.cwd(),
        shoal=_shoal(),
        command=shlex.join(["shoal", *argv]),
        flags=flags,
        nodes=launch.nodes,
        spare_nodes=args.spare_nodes,
        min_nodes=launch.min_nodes,
        processes=launch.processes,
        gpus=(launch.processes or 0) if on_gpus else 0,
        minutes=launch.time_limit_minutes,
        max_requeues=args.max_requeues,
        array=args.array,
        dependency=args.dependency,
        rendezvous=next((text for key, text, _ in reversed(overrides) if key == "launch.rendezvous"), None),
    )


def _shoal() -> str:
    """Return the path of the shoal command of this environment. Raises `LaunchError` if it is not installed."""
    beside = Path(sys.executable).with_name("shoal")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("shoal")
    if found is None:
        raise LaunchError("the shoal command is not on PATH; install shoal in an environment that the nodes share")
    return str(Path(found).absolute())
