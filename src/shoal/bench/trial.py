"""A few real steps of a config in new processes, within a time limit: what `parallel: auto` compares candidates by."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shoal.config.options import Config
from shoal.elastic.oom import kernel_kills
from shoal.launch.torchrun import worker_environment
from shoal.plan.choice.candidates import Timing
from shoal.resolve.resolve import to_yaml
from shoal.run.folder import RunFolder
from shoal.run.records import read_metrics
from shoal.system.output import on_one_line

WARMUP_STEPS: Final = 3
FAULTS: Final = "SHOAL_FAULTS"  # faults planned for the run (fault/inject.py, which imports torch), not for its trials
FAILURES: Final = "failures.jsonl"  # beside the answer; a line from each worker that failed


def time_steps(config: Config, steps: int, folder: Path, limit_seconds: float, *, cuda: bool) -> Timing:
    """
    Time `steps` steps of `config`, with its processes and threads planned, after a few others.

    folder: an empty one, for the trial's files. cuda: whether it trains on GPUs. A signal that ends this process ends the trial too.
    """
    config = trial_config(config, WARMUP_STEPS + steps, folder)
    recipe, answer = folder / "trial.yaml", folder / "answer.json"
    recipe.write_text(to_yaml(config), encoding="utf-8")
    kills = kernel_kills()
    code, errors = _run(_command(config, recipe, answer), config, folder, limit_seconds)
    run = RunFolder.of(config)
    taken = read_metrics(run.metrics_file).steps
    if answer.is_file():
        read = json.loads(answer.read_text(encoding="utf-8"))
        memory = int(read["memory_bytes"]) if cuda else None
        return Timing(float(read["step_seconds"]), WARMUP_STEPS + steps, memory, _dtype(run))
    if code is not None:
        if kernel_kills() > kills:
            return Timing(None, why="the kernel killed a process: out of memory", out_of_memory=True)
        why, out_of_memory = _reason(folder, errors, code)
        return Timing(None, why=why, out_of_memory=out_of_memory)
    if not taken:
        return Timing(None, why=f"no step in {limit_seconds:.0f} s", too_slow=True)
    seconds = [record.step_seconds for record in taken]
    later = seconds[min(WARMUP_STEPS, len(seconds) - 1) :]  # the first step is the slowest
    memory = max(record.memory_bytes for record in taken) if cuda else None
    return Timing(sorted(later)[len(later) // 2], len(taken), memory, _dtype(run))


def trial_config(config: Config, steps: int, folder: Path) -> Config:
    """Return the config of a trial: a few steps in a temporary run folder, without evaluations, saves, trackers and alerts."""
    config = config.replace("train", steps=steps, tokens=None, epochs=None, eval_every=0, sample_prompt="")
    config = config.replace("optim", warmup_steps=0).replace("metrics", every=1, report=False)
    config = config.replace("checkpoint", every=0, fast=None).replace("track", to=())
    return config.replace("launch", runs=str(folder / "runs"), name="trial", time_limit_minutes=None)


def _command(config: Config, recipe: Path, answer: Path) -> list[str]:
    module, processes = "shoal.bench.step_worker", config.launch.processes or 1
    command = [sys.executable, "-m", module, str(recipe), str(answer)]
    if processes > 1:
        command[2:3] = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", module]
    return command


def _run(command: Sequence[str], config: Config, folder: Path, limit_seconds: float) -> tuple[int | None, str]:
    """Run a command until its end or the limit; return its exit code, None at the limit, and what it wrote to stderr."""
    threads = config.launch.threads or 1
    environment = worker_environment(threads) | os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment.pop(FAULTS, None)
    errors = folder / "errors.txt"
    with errors.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=file,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=limit_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    return code, errors.read_text(encoding="utf-8", errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a trial that still runs, with its workers: those that still import torch would outlive it."""
    import psutil

    if process.poll() is not None:
        return
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for worker in started:
        with contextlib.suppress(psutil.Error):
            worker.kill()
    process.wait()


def _reason(folder: Path, errors: str, code: int) -> tuple[str, bool]:
    """Return why a trial failed, and whether it ran out of memory: what a worker has written, or the last line of stderr."""
    told = [json.loads(line) for line in _lines(folder / FAILURES)]
    for each in sorted(told, key=lambda failure: (not failure["out_of_memory"], failure["lost_peer"])):
        return str(each["why"]), bool(each["out_of_memory"])
    last = errors.strip().splitlines()[-1:]
    return (on_one_line(last[0])[:200] if last else f"ended with code {code}"), False


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _dtype(run: RunFolder) -> str:
    """Return the dtype that the trial's processes chose."""
    return run.load_config().train.dtype
