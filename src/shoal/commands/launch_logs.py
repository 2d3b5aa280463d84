"""`shoal launch logs`: why a job failed, and the log of a rank."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.commands.flags import Override
from shoal.errors import RunError
from shoal.system.output import visible

if TYPE_CHECKING:
    from shoal.report.causes.logs import Attempt
    from shoal.run.folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `shoal launch logs`."""
    parser.add_argument("target", metavar="RUN", help="name or folder of a run")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds all runs (default: runs)")
    parser.add_argument("--job", default=None, metavar="JOB", help="Slurm job to explain (default: the run's last one)")
    parser.add_argument("--rank", type=int, default=None, metavar="N", help="print the log of rank N")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def logs(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    """Print the first cause of the last failure, or a rank's log; return 0. Raises `RunError` if there are no such logs."""
    from shoal.report.causes.cause import cause_of, last_job
    from shoal.report.causes.logs import attempts, job_logs
    from shoal.run.folder import RunFolder

    folder = RunFolder.named(args.target, Path(args.runs))
    if not folder.path.is_dir():
        folder.load_config()  # raises an error that names similar runs
    job, restart = (args.job, None) if args.job is not None else last_job(folder)
    every = attempts(folder.logs)
    ours = [each for each in every if each.job == job]
    printed = job_logs(folder.path / "jobs", job, restart) if job is not None else []
    if args.job is not None and not ours and not printed:
        known = sorted({each.job for each in every if each.job}, key=int)
        raise RunError(
            f"{folder.path} has no logs of job {args.job}" + (f"; there are {', '.join(known)}" if known else "")
        )
    if args.rank is not None:
        return _print_rank(folder, ours, args.rank)
    cause = cause_of(folder, job, restart)
    paths = [*printed, *(sorted(ours[-1].folder.glob("*.log")) if ours else ())]
    if args.json:
        found = {"job": job, "restart": restart, "logs": list(map(str, paths)), "cause": cause and cause.as_json()}
        print(json.dumps(found, indent=2))
    else:
        lines = cause.lines() if cause else [f"{folder.path}: no failure found" + (f" in job {job}" if job else "")]
        print(visible("\n".join([*lines, *_places(folder, paths)])))
    return 0


def _places(folder: RunFolder, paths: Sequence[Path]) -> list[str]:
    """Say where the logs are: one line a folder."""
    if not paths:
        return [f"logs: none; a run on several nodes or under Slurm writes them to {folder.logs}"]
    counts: dict[Path, int] = {}
    for path in paths:
        counts[path.parent] = counts.get(path.parent, 0) + 1
    return [f"logs: {where} ({count} file{'s' * (count > 1)})" for where, count in counts.items()]


def _print_rank(folder: RunFolder, ours: Sequence[Attempt], rank: int) -> int:
    """Print the log of a rank in the last of these attempts. Raises `RunError` if there is none."""
    if not ours:
        raise RunError(
            f"{folder.path} has no logs of ranks: a run on several nodes or under Slurm writes them to {folder.logs}"
        )
    path = ours[-1].folder / f"rank-{rank}.log"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                print(visible(line.rstrip("\n")))
    except FileNotFoundError:
        count = len(list(ours[-1].folder.glob("rank-*.log")))
        raise RunError(f"{ours[-1].folder} has no log of rank {rank}; it has {count} ranks") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    return 0
