"""A few real steps of a config in new processes, within a time limit: what `parallel: auto` compares candidates by."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shoal.bench.trial import WARMUP_STEPS, short_run
from shoal.bench.worker_process import ANSWER, OUT_OF_MEMORY, PROBLEM, command_of, end
from shoal.config.options import Config
from shoal.elastic.oom import kernel_kills
from shoal.launch.torchrun import worker_environment
from shoal.plan.choice.candidates import Timing
from shoal.resolve.resolve import to_yaml
from shoal.run.folder import RunFolder
from shoal.run.records import read_metrics
from shoal.system.output import on_one_line

FAULTS: Final = "SHOAL_FAULTS"  # faults planned for the run (fault/inject.py, which imports torch), not for its trials


def time_steps(config: Config, steps: int, folder: Path, limit_seconds: float, *, cuda: bool) -> Timing:
    """
    Time `steps` steps of `config`, with its processes and threads planned, after a few others.

    folder: an empty one, for the trial's files. cuda: whether it trains on GPUs. A signal that ends this process ends the trial too.
    """
    config = trial_config(config, WARMUP_STEPS + steps, folder)
    recipe, answer = folder / "trial.yaml", folder / ANSWER
    recipe.write_text(to_yaml(config), encoding="utf-8")
    kills = kernel_kills()
    command = command_of("shoal.bench.step_worker", [str(recipe), str(answer)], config.launch.processes or 1)
    code, errors = _run(command, config, folder, limit_seconds)
    run = RunFolder.of(config)
    taken = read_metrics(run.metrics_file).steps
    read = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    if PROBLEM in read:
        why = str(read[PROBLEM])
        return Timing(None, why=why, out_of_memory=why.startswith(OUT_OF_MEMORY))
    if read:
        memory = int(read["memory_bytes"]) if cuda else None
        return Timing(float(read["step_seconds"]), WARMUP_STEPS + steps, memory, _dtype(run))
    if code is not None:
        if kernel_kills() > kills:
            return Timing(None, why="the kernel killed a process: out of memory", out_of_memory=True)
        last = errors.strip().splitlines()[-1:]
        return Timing(None, why=on_one_line(last[0])[:200] if last else f"ended with code {code}")
    if not taken:
        return Timing(None, why=f"no step in {limit_seconds:.0f} s", too_slow=True)
    seconds = [record.step_seconds for record in taken]
    later = seconds[min(WARMUP_STEPS, len(seconds) - 1) :]  # the first step is the slowest
    memory = max(record.memory_bytes for record in taken) if cuda else None
    return Timing(sorted(later)[len(later) // 2], len(taken), memory, _dtype(run))


def trial_config(config: Config, steps: int, folder: Path) -> Config:
    """Return the config of a trial: a short run without reports, copies in memory, trackers and alerts."""
    config = short_run(config, steps, folder).replace("metrics", report=False).replace("checkpoint", fast=None)
    return config.replace("track", to=()).replace("launch", name="trial", time_limit_minutes=None)


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
            end(process)
    return code, errors.read_text(encoding="utf-8", errors="replace")


def _dtype(run: RunFolder) -> str:
    """Return the dtype that the trial's processes chose."""
    return run.load_config().train.dtype
