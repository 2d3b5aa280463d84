"""`shoal doctor`: what is wrong with which node."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from shoal.commands.flags import Override
from shoal.doctor.findings import Report
from shoal.errors import LaunchError, RunError

PORTS: Final = "29400,29500"  # the rendezvous of launch.rendezvous in the documentation, and MASTER_PORT's default
EXIT_FAULT: Final = 1
SSH: Final = "ssh -o BatchMode=yes -o ConnectTimeout=5 {host}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `shoal doctor`."""
    add_hosts(parser)
    parser.add_argument(
        "--shared", type=Path, metavar="DIR",
        help="folder that all nodes should share (default: the working folder if there are several nodes)",
    )  # fmt: skip
    parser.add_argument("--nodes", type=int, metavar="N", help="number of nodes that the Slurm job should have")
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="N",
        help="GPUs that each node should have (default: as many as Slurm gave the job, else as many as the other nodes)",
    )  # fmt: skip
    parser.add_argument(
        "--ports", default=PORTS, metavar="P,...", help=f"ports that runs use, such as 29400-29409 (default: {PORTS})"
    )
    parser.add_argument(
        "--run", dest="of_run", metavar="RUN", help="name or folder of a run: compare the job's time with its saves"
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds all runs (default: runs)")
    parser.add_argument(
        "--quick", action="store_true", help="skip what needs torch: matrix products and all-reduces in pairs"
    )
    parser.add_argument(
        "--leave-out", action="store_true",
        help="print the healthy nodes alone, with commas, for --hosts or srun --nodelist; the report goes to stderr. Exit "
        "code 0 if --min-nodes of them remain",
    )  # fmt: skip
    parser.add_argument("--min-nodes", type=int, default=1, metavar="N", help="with --leave-out (default: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose nodes, and how they are reached."""
    hosts = "nodes, reached by ssh (default: those of the Slurm job, or this machine)"
    parser.add_argument("--hosts", metavar="A,B,...", help=hosts)
    parser.add_argument(
        "--hosts-file", type=Path, metavar="FILE", help="file with a node on each line; further words and # are ignored"
    )
    parser.add_argument(
        "--ssh", metavar="COMMAND",
        help=f"command that runs its last argument, a line for the shell, on {{host}} (default: {SSH})",
    )  # fmt: skip


def doctor(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    """Run `shoal doctor`; return 0 if there are no faults, else 1."""
    from shoal.doctor.examine import Plan, examine
    from shoal.doctor.slurm import judge_job, this_job, wanted_of

    job = None if args.hosts or args.hosts_file else this_job()
    commands = commands_of(args, job.nodes if job else None)
    save_seconds = _slowest_save(args)
    shared = args.shared or (Path.cwd() if len(commands) > 1 else None)
    report = Report(list(commands))
    start = time.monotonic()
    if job:
        report.add(judge_job(job, nodes=args.nodes, save_seconds=save_seconds))
        if job.unknown:
            report.unchecked.append(f"whether the job may be requeued: scontrol: {job.unknown}")
    plan = Plan(
        commands,
        shared.absolute() if shared else None,
        read_ports(args.ports),
        wanted_of(job, args.gpus_per_node),
        args.quick,
    )
    examine(plan, report)
    report.seconds = time.monotonic() - start
    return _print(report, args)


def _print(report: Report, args: argparse.Namespace) -> int:
    """Print the report as `args` ask; return the exit code."""
    from shoal.system.output import on_one_line, visible

    where = sys.stderr if args.leave_out else sys.stdout
    if args.json:
        print(json.dumps(report.as_json(), indent=2), file=where)
    else:
        print("\n".join(map(on_one_line, report.lines())), file=where)
    if not args.leave_out:
        return EXIT_FAULT if report.faults else 0
    healthy = report.healthy()
    print(visible(",".join(healthy)))
    return 0 if len(healthy) >= args.min_nodes and not report.concerns_all() else EXIT_FAULT


def commands_of(
    args: argparse.Namespace, of_job: Sequence[str] | None, python: str = sys.executable
) -> Mapping[str, Sequence[str]]:
    """
    Return by node the command that starts a probe there.

    of_job: the nodes of the Slurm job, if there is one. python: the Python to start there. Raises `LaunchError` for hosts that cannot be names, or no ssh.
    """
    from shoal.doctor.reach import by_srun, by_ssh, here

    hosts = read_hosts(args.hosts, args.hosts_file)
    if not hosts:
        if of_job is None:
            return {socket.gethostname(): here(python)}
        if shutil.which("srun") is None:
            raise LaunchError("this is a Slurm job, but srun is not in PATH; name the nodes with --hosts to use ssh")
        return {name: by_srun(name, python) for name in of_job}
    template = args.ssh or SSH
    if "{host}" not in template:
        raise LaunchError(f"--ssh {template!r} has no {{host}}; an example: {SSH!r}")
    if shutil.which(template.split()[0]) is None:
        raise LaunchError(
            f"{template.split()[0]} is not installed here, so nodes cannot be reached; give --ssh COMMAND"
        )
    local = () if args.ssh else (socket.gethostname(), "localhost")
    return {host: here(python) if host in local else by_ssh(host, template, python) for host in hosts}


def read_hosts(text: str | None, file: Path | None) -> list[str]:
    """
    Return the nodes of --hosts or --hosts-file; none if neither was given.

    Raises `LaunchError` for an unreadable or empty file, names that ssh would read as options, and names given twice.
    """
    if text and file:
        raise LaunchError("--hosts and --hosts-file both name nodes; give one of them")
    if file:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LaunchError(f"--hosts-file {file}: {getattr(error, 'strerror', None) or error}") from None
        found = [words[0] for line in lines if (words := line.partition("#")[0].split())]
        if not found:
            raise LaunchError(f"--hosts-file {file} names no node; write one on each line")
    else:
        found = [name.strip() for name in (text or "").split(",") if name.strip()]
        if text and not found:
            raise LaunchError(f"--hosts {text!r} names no node; give names with commas between them")
    if wrong := [name for name in found if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*", name)]:
        raise LaunchError(f"{wrong[0]!r} is not a host's name")
    if twice := next((name for name in found if found.count(name) > 1), None):
        raise LaunchError(f"{twice} is named twice; name each node once")
    return found


def read_ports(text: str) -> list[int]:
    """Return the ports of "29400,29500-29503". Raises `LaunchError` for anything else, or more than 64 ports."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 0 < first <= last < 65536:
            raise LaunchError(f"--ports {text!r}: {part!r} is not a port or a range of ports, such as 29400-29409")
        found += range(first, last + 1)
    if len(found) > 64:
        raise LaunchError(f"--ports names {len(found)} ports; 64 at most are tried")
    return sorted(set(found))


def _slowest_save(args: argparse.Namespace) -> float | None:
    """Return the seconds of the slowest save of --run; None without one. Raises `RunError` if there is no such run."""
    from shoal.run.events import read_json_lines
    from shoal.run.folder import RunFolder

    if args.of_run is None:
        return None
    folder = RunFolder.named(args.of_run, Path(args.runs))
    if not folder.events_file.is_file():
        raise RunError(f"{folder.path} has no events.jsonl: it has not started yet, so no save was timed")
    saves = [e["seconds"] for e in read_json_lines(folder.events_file) if e.get("event") == "saved" and "seconds" in e]
    return max(saves, default=None)
