"""`shoal setup`: a project's folder on the shared disk, then a look at every node."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from shoal.commands.doctor import add_hosts, commands_of, read_ports
from shoal.commands.flags import Override


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `shoal setup`."""
    parser.add_argument(
        "--shared", type=Path, required=True, metavar="DIR", help="folder on a disk that all nodes share"
    )
    parser.add_argument("--project", required=True, metavar="NAME", help="name of the project's folder in it")
    add_hosts(parser)


def setup(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    """Run `shoal setup`; return 0 if no node has a fault, else 1."""
    from shoal.commands.doctor import EXIT_FAULT, PORTS
    from shoal.doctor.examine import Plan, examine
    from shoal.doctor.findings import Report
    from shoal.doctor.judge_node import Wanted
    from shoal.doctor.slurm import this_job
    from shoal.launch.setup import make, plan_project
    from shoal.system.output import on_one_line

    project = plan_project(args.shared, args.project)
    job = None if args.hosts or args.hosts_file else this_job()
    commands_of(args, job.nodes if job else None)  # raises errors before anything is made
    make(project, lambda text: print(f"setup: {on_one_line(text)}", flush=True))
    commands = commands_of(args, job.nodes if job else None, python=str(project.python))
    report = Report(list(commands))
    start = time.monotonic()
    examine(Plan(commands, project.folder, read_ports(PORTS), Wanted(), quick=True), report)
    report.seconds = time.monotonic() - start
    print("\n".join(map(on_one_line, report.lines())))
    if not report.faults:
        print(f"setup: ready; next: cd {on_one_line(project.folder)} && . ./activate.sh")
    return EXIT_FAULT if report.faults else 0
