"""`shoal launch`: start a run on the nodes of a cluster, and follow its jobs."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.commands.flags import Override
from shoal.commands.recipes import decided, recipe_asked, resolve_with_auto
from shoal.errors import LaunchError
from shoal.launch.jobs import RunJobs
from shoal.launch.slurm import RECIPE
from shoal.system.disk import write_whole
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
    from shoal.launch.slurm import script
    from shoal.run.folder import RunFolder

    site = _with_flags(Site.read(args.site), args)
    recipe = recipe_asked(args, overrides)
    indexes = _indexes(args, overrides)
    config = _resolve(args, recipe, _for_task(overrides, indexes), site)
    if len(indexes) > 1:
        _resolve(args, recipe, _for_task(overrides, indexes[-1:]), site)
    job = _plan(args, config, overrides, site, argv, indexes)
    runs = [RunJobs(_run_of(job, index)) for index in indexes] if indexes else [RunJobs(job.run)]
    RunFolder(runs[0].run).agree(config)
    if args.submit and not args.dependency:
        for run in runs:
            _reject_live(run)
    text = script(job, site)
    for run in runs:
        _write(run, recipe, text)
    if args.submit:
        return _submit(runs, indexes, args.chain)
    print(text, end="")
    where = shlex.quote(str(runs[0].script))
    print(f"shoal: wrote {where}; sbatch {where} submits it, as --submit does", file=sys.stderr)
    return 0


def _write(run: RunJobs, recipe: Path, text: str) -> None:
    """Write the batch script and a copy of the recipe, so that later changes of the recipe do not reach a queued job."""
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_whole(run.folder / RECIPE, [recipe.read_bytes()])
        write_whole(run.script, [text.encode()])
    except OSError as error:
        raise LaunchError(
            f"{on_one_line(run.folder)} cannot be written: {error.strerror}; set launch.runs to a folder that the nodes share"
        ) from None
    run.allow()
    run.add("written", by="user")


def _submit(runs: Sequence[RunJobs], indexes: Sequence[int], chain: int | None) -> int:
    """Submit the script of `runs`, which share one job if they are an array; print the job's id."""
    from shoal.launch.chain import AFTER
    from shoal.launch.scheduler import submit

    job = submit(runs[0].script)
    tasks = [{"array": f"{job}_{index}"} for index in indexes] or [{}]
    for run, task in zip(runs, tasks, strict=True):
        run.add("submitted", job=task.get("array", job), by="user", **task)
    print(f"submitted job {job}")
    last = job
    for _ in range(1, chain or 1):
        following = submit(runs[0].script, [f"--dependency=afternotok:{last}", *AFTER])
        runs[0].add("submitted", job=following, after=last, by="chain")
        print(f"submitted job {following}, which starts if job {last} does not finish the run")
        last = following
    for run in runs:
        name = shlex.quote(on_one_line(run.run))
        print(f"shoal launch status {name} follows it; its output: {on_one_line(run.folder)}/JOB.log")
    return 0


def _reject_live(run: RunJobs) -> None:
    """Raise `LaunchError` if a job of the run is in the queue: two jobs cannot train one run."""
    from shoal.launch.job_table import ids_of
    from shoal.launch.scheduler import queue

    ids = ids_of(run.records())
    live = next((job for job in queue() if job.is_one_of(ids) and job.state != "COMPLETING"), None) if ids else None
    if live:
        raise LaunchError(
            f"job {live.array or live.job} of {on_one_line(run.run)} is {live.state.lower()}; stop it with shoal launch stop, choose "
            f"another --name, or give --dependency afterany:{live.job}"
        )


def _indexes(args: argparse.Namespace, overrides: list[Override]) -> list[int]:
    """Return the indexes of --array; [] without it. Raises `LaunchError` if they are invalid, or if all tasks would be one run."""
    from shoal.launch.slurm import TASK

    if args.array is None:
        if any(TASK in text for _, text, _ in overrides):
            raise LaunchError(f"{TASK} in an option needs --array, which gives the indexes, such as --array 0-3")
        return []
    parts = [
        re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part) for part in args.array.partition("%")[0].split(",")
    ]
    if not all(parts):
        raise LaunchError(
            f"--array {args.array!r} is not a list of indexes; examples are 0-3, 1,3,5 and 0-15%4 (4 at a time)"
        )
    found = [n for p in parts if p for n in range(int(p[1]), int(p[2] or p[1]) + 1, int(p[3] or 1))]
    if not any(TASK in text for _, text, _ in overrides):
        raise LaunchError(
            f"all tasks of --array would train the same run; use {TASK} in an option, such as --seed {TASK}"
        )
    if args.chain is not None:
        raise LaunchError("--chain continues one run, not an array; submit the runs one by one")
    return sorted(set(found))


def _for_task(overrides: list[Override], indexes: Sequence[int]) -> list[Override]:
    """Return the overrides of the first of `indexes`; unchanged if there are none."""
    from shoal.launch.slurm import TASK

    return [(key, text.replace(TASK, str(indexes[0])), flag) for key, text, flag in overrides] if indexes else overrides


def _run_of(job: Job, index: int) -> Path:
    from shoal.launch.slurm import TASK

    return Path(str(job.run).replace(TASK, str(index)))


def minutes_of(text: str) -> float:
    """Return the minutes of a time in one of Slurm's forms, such as 90, 24:00:00 or 2-12. Raises `LaunchError`."""
    for form, units in _TIMES:
        if found := re.fullmatch(form, text):
            minutes = sum(int(part) * unit for part, unit in zip(found.groups(), units, strict=True))
            if minutes > 0:
                return minutes
    raise LaunchError(
        f"--time {text!r} is not a time; write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, such as 24:00:00 or 2-12"
    )


def _with_flags(site: Site, args: argparse.Namespace) -> Site:
    """Return the site's facts with those given as flags in their place."""
    import dataclasses

    given = {
        n: v
        for n in ("partition", "account", "qos", "constraint", "cpus_per_node")
        if (v := getattr(args, n)) is not None
    }
    if args.exclude:
        given["sbatch"] = (*site.sbatch, f"--exclude={args.exclude}")
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
    resolved = resolve_with_auto(recipe, asked, named=args.recipe is not None, on_stderr=True)
    waits = bool(resolved.undecided) and resolved.config.launch.nodes == 1  # for the node, where shoal train chooses
    config = resolved.config if waits else decided(resolved)
    if config.train.device != "cpu" and config.launch.processes is None:
        raise LaunchError(
            "the job needs to know how many GPUs each node has: give --gpus-per-node 8, or gpus_per_node in cluster.yaml; or "
            "--train.device cpu to train without GPUs"
        )
    if not waits and config.launch.processes and (wrong := list(refusals_of_machines(config, config.launch.processes))):
        raise LaunchError("\n".join(wrong))
    return config


def _plan(
    args: argparse.Namespace,
    config: Config,
    overrides: list[Override],
    site: Site,
    argv: list[str],
    indexes: Sequence[int],
) -> Job:
    """Return the job that trains `config`, or its array with `indexes`."""
    from shoal.launch.slurm import TASK, Job, signal_lead

    launch = config.launch
    if args.spare_nodes and launch.nodes == 1:
        raise LaunchError("--spare-nodes needs a run of several nodes: set --nodes")
    flags = [f"--{key}={text}" for key, text, _ in overrides if key not in _OF_THE_SCRIPT]
    if launch.time_limit_minutes is not None:
        flags.append("--launch.time_limit_minutes=null")  # the job's limit holds, which began when the job did
    on_gpus = config.train.device != "cpu"
    name = launch.name or "run"
    if indexes:
        given = next((text for key, text, _ in reversed(overrides) if key == "launch.name"), name)
        name = given if TASK in given else f"{given}-{TASK}"
    run = Path(launch.runs).absolute() / name
    return Job(
        name=name,
        run=run,
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
        signal_seconds=signal_lead(run, launch.time_limit_minutes),
        max_requeues=args.max_requeues,
        requeue=args.chain is None,
        stage=_staged(config) if args.stage else None,
        array=args.array,
        dependency=args.dependency,
        rendezvous=next((text for key, text, _ in reversed(overrides) if key == "launch.rendezvous"), None),
    )


def _staged(config: Config) -> Path:
    """Return the folder to copy to the nodes. Raises `LaunchError` if it does not exist yet."""
    folder = Path(config.data.folder).absolute()
    if not folder.is_dir():
        raise LaunchError(
            f"--stage copies {on_one_line(folder)}, which does not exist yet; prepare the data first with shoal prepare"
        )
    return folder


def _shoal() -> str:
    """Return the path of the shoal command of this environment. Raises `LaunchError` if it is not installed."""
    beside = Path(sys.executable).with_name("shoal")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("shoal")
    if found is None:
        raise LaunchError("the shoal command is not on PATH; install shoal in an environment that the nodes share")
    return str(Path(found).absolute())
