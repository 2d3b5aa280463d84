"""Runs what a benchmark measures: a module in new processes, alone or under torchrun, that writes its answer as JSON. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shoal.config.options import Config
from shoal.errors import EXIT_BAD_INPUT, LaunchError, ShoalError
from shoal.launch.torchrun import worker_environment
from shoal.plan.fit import what_ran_out
from shoal.resolve.resolve import to_yaml
from shoal.system.disk import write_whole

if TYPE_CHECKING:
    import psutil

PROBLEM: Final = "problem"  # key of an answer that says what a user can fix, and nothing else
OUT_OF_MEMORY: Final = "out of memory: "  # begins such a problem
ANSWER: Final = "answer.json"
SHOWN: Final = 2000  # characters of a worker's output that an error shows, if no line of it names an exception
DYING_SECONDS: Final = 10.0  # a killed process first gives back its memory; one that waits for a disk may take longer


def run_worker(
    module: str,
    config: Config,
    folder: Path,
    *,
    arguments: Sequence[str] = (),
    as_shoal: bool = True,
    limit_seconds: float | None = None,
    what: str = "the benchmark",
) -> dict[str, Any]:
    """
    Run `python -m MODULE CONFIG ANSWER ARGUMENTS...` in the processes of `config`; return the answer.

    folder: takes both files. as_shoal: whether the processes get the environment that `shoal train` gives its workers. what: the
    name of the work in errors. Raises `ShoalError` for a problem that the worker has reported, and `LaunchError` if a process
    died or `limit_seconds` passed.
    """
    recipe = folder / "timed.yaml"
    recipe.write_text(to_yaml(config), encoding="utf-8")
    return run_module(
        module, [str(recipe), str(folder / ANSWER), *arguments], folder / ANSWER, processes=config.launch.processes or 1,
        threads=config.launch.threads or 1, as_shoal=as_shoal, limit_seconds=limit_seconds, what=what,
    )  # fmt: skip


def run_module(
    module: str,
    arguments: Sequence[str],
    answer: Path,
    *,
    processes: int,
    threads: int,
    as_shoal: bool = True,
    limit_seconds: float | None = None,
    what: str = "the benchmark",
) -> dict[str, Any]:
    """Run `python -m MODULE ARGUMENTS...` in `processes` processes, one of which writes `answer`; see `run_worker`."""
    answer.unlink(missing_ok=True)
    command = command_of(module, arguments, processes)
    ours = worker_environment(threads) if as_shoal else {}
    environment = ours | os.environ | {"OMP_NUM_THREADS": str(threads)}
    code, errors = _finished(command, environment, limit_seconds, what)
    read: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    if PROBLEM in read:
        raise ShoalError(str(read[PROBLEM]))
    if code or not read:
        raise LaunchError(f"{what} ended with code {code}: {_cause(errors)}")
    return read


def command_of(module: str, arguments: Sequence[str], processes: int) -> list[str]:
    """Return the command that runs a module, under torchrun if it has several processes."""
    alone = [sys.executable, "-m", module, *arguments]
    if processes == 1:
        return alone
    several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", module]
    return [sys.executable, "-m", *several, *arguments]


def _finished(
    command: Sequence[str], environment: dict[str, str], limit_seconds: float | None, what: str
) -> tuple[int, str]:
    """Run a command in a process group of its own, which ends with this function; return its exit code and standard error."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{what} did not end within {limit_seconds:g} s") from None
    finally:  # the limit, or a signal to this process
        end(process)
    return process.returncode, errors


def end(process: subprocess.Popen[Any]) -> None:
    """End a process that still runs, with all that it started, and wait until each has given back its memory."""
    import psutil

    if process.poll() is not None:
        return
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for worker in started:  # torchrun's workers would outlive it while they import torch
        with contextlib.suppress(psutil.Error):
            worker.kill()
    process.wait()
    deadline = time.monotonic() + DYING_SECONDS
    while any(_runs(worker) for worker in started) and time.monotonic() < deadline:
        time.sleep(0.01)  # not our children: nothing tells when they are dead


def _runs(worker: psutil.Process) -> bool:
    """
    Return whether a process still has memory.

    A killed process is a zombie when its first thread has ended; its last thread gives back its memory. The zombie may stay
    until the machine's first process takes its exit code.
    """
    import psutil

    try:
        return worker.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) or worker.num_threads() > 1
    except psutil.Error:
        return False


def _cause(errors: str) -> str:
    """Return the first exception that a worker's output names, or the end of the output."""
    named = re.search(r"^(?:\[[^\]]*\]:)?([\w.]*(?:Error|Exception)\b.*)$", errors, re.MULTILINE)
    return named[1] if named else f"\n{errors[-SHOWN:]}"


@contextlib.contextmanager
def answering(answer: Path) -> Iterator[None]:
    """In a worker: report a problem of the block inside that a user can fix as the answer, and end the process with code 2."""
    try:
        yield
    except (ShoalError, RuntimeError, MemoryError, OSError) as error:
        reason = (
            str(error) if isinstance(error, ShoalError) else (what := what_ran_out(error)) and f"{OUT_OF_MEMORY}{what}"
        )
        if not reason:
            raise
        write_whole(answer, [json.dumps({PROBLEM: reason}).encode()])
        os._exit(EXIT_BAD_INPUT)
