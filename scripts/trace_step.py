"""
Count the files and lines of shoal that one FSDP2 optimizer step goes through.

    python scripts/trace_step.py [--most-files 8] [--most-lines 1100]

Two gloo processes train the quickstart's model. On rank 0, one `train_step` after the warmup runs under `sys.settrace`.
The table lists each file of shoal in which this step executes a line: the lines of the file, and the lines executed.

The count includes the files that a reader opens to follow the step's control flow: the caller of `train_step`, and the files
of `training`, `parallel`, `optim` and `mesh` in which the step executes more than one line. It excludes the model's
arithmetic (`models`), and code that observes or stores values, each behind one call (`data`, `metrics`, `elastic`, `fault`).
Exits with 1 if there are more files or lines than the options allow.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import shoal

SOURCE = Path(shoal.__file__).parent
RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
PROCESSES, STEP = 2, 4  # number of workers, and the traced step: not the first, in which FSDP2 sets itself up
ROOMS = ("training", "parallel", "optim", "mesh")
FEW = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-files", type=int, default=8)
    parser.add_argument("--most-lines", type=int, default=1100)
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Path(options.worker))
    caller, executed = run()
    lines = {name: len((SOURCE / name).read_text(encoding="utf-8").splitlines()) for name in executed}
    followed = [name for name, n in executed.items() if name == caller or (name.split("/")[0] in ROOMS and n > FEW)]
    show("followed", followed, executed, lines)
    show("not counted", [name for name in executed if name not in followed], executed, lines)
    total = sum(lines[name] for name in followed)
    print(
        f"one FSDP2 step: {len(followed)} files, at most {options.most_files}; {total} lines, at most {options.most_lines}"
    )
    sys.exit(len(followed) > options.most_files or total > options.most_lines)


def show(title: str, names: list[str], executed: dict[str, int], lines: dict[str, int]) -> None:
    print(f"{title}: {len(names)} files")
    for name in sorted(names, key=lambda name: -executed[name]):
        print(f"  {name:32} {lines[name]:5} lines, {executed[name]:4} executed")


def run() -> tuple[str, dict[str, int]]:
    """Start the workers; return the file that calls `train_step`, and the number of lines that the step executes in each file."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "executed.json"
        workers = []
        for rank in range(PROCESSES):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
            env = os.environ | {name: str(value) for name, value in place.items()}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            command = [sys.executable, __file__, "--worker", str(answer)]
            workers.append(subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL))
        codes = [worker.wait() for worker in workers]
        if any(codes):
            sys.exit(f"workers ended with {codes}")
        found: dict[str, Any] = json.loads(answer.read_text())
    return found["caller"], {found["caller"]: 0, **found["executed"]}


def work(answer: Path) -> NoReturn:
    """Train as one of the workers, and end after the traced step. Rank 0 writes the counts of executed lines to `answer`."""
    from shoal.training import step

    step.train_step = traced(step.train_step, answer)  # before the loop imports it
    from shoal.cli import main as shoal_main

    options = {
        "train.dtype": "float32",
        "train.steps": STEP + 1,
        "optim.warmup_steps": 1,
        "parallel.dp_shard": PROCESSES,
    }
    options |= {"launch.runs": answer.parent / "runs", "launch.threads": 1, "metrics.every": 1}
    shoal_main(["train", str(RECIPE), *(f"--{key}={value}" for key, value in options.items())])


def traced(train_step: Callable[..., Any], answer: Path) -> Callable[..., Any]:
    """Return a replacement for `train_step` that traces its call at step `STEP`, and then ends the process."""
    executed: defaultdict[str, set[int]] = defaultdict(set)

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = Path(frame.f_code.co_filename)
        if not file.is_relative_to(SOURCE):
            return None
        if event == "line":
            executed[file.relative_to(SOURCE).as_posix()].add(frame.f_lineno)
        return trace

    def one_step(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] < STEP:
            return train_step(*args, **kwargs)
        caller = Path(sys._getframe(1).f_code.co_filename).relative_to(SOURCE).as_posix()
        sys.settrace(trace)
        train_step(*args, **kwargs)
        sys.settrace(None)
        if os.environ["RANK"] == "0":
            counts = {name: len(lines) for name, lines in executed.items()}
            answer.write_text(json.dumps({"caller": caller, "executed": counts}))
        os._exit(0)

    return one_step


if __name__ == "__main__":
    main()
