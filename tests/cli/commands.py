"""Running `shoal` as a user does: in a real process, reading its output line by line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import warm

RECIPE = """
model: {dim: 32, num_layers: 1, num_heads: 2, max_seq_len: 64}
data: {corpus: dummy, dummy_documents: 60, tokenizer: bytes, seq_len: 32}
optim: {lr: 1e-2, warmup_steps: 3, schedule: constant}
train: {steps: 40, global_batch: 16, micro_batch: 2, dtype: float32, device: cpu, eval_every: 20, sample_prompt: "a", sample_tokens: 20}
checkpoint: {every: 5}
metrics: {peak_tflops: 1, console_every: 1, report: false}
launch: {processes: 2, threads: 1}
"""


class Place:
    """A working folder with a recipe, in which commands run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return warm.popen_of(arguments[0])(
            warm.shoal(*arguments),
            cwd=self.folder,
            env=clean_environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run a command; return (exit code, output)."""
        process = self.start(*arguments, **environment)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def answer(self, *arguments: str) -> str:
        """Return the standard output of a command that must succeed."""
        pipe = subprocess.PIPE
        process = warm.popen_of(arguments[0])(
            warm.shoal(*arguments), cwd=self.folder, env=clean_environment(), stdout=pipe, stderr=pipe, text=True
        )
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, output + errors
        return str(output)

    def good(self, *arguments: str, **environment: str) -> str:
        code, output = self.run(*arguments, **environment)
        assert code == 0, output
        return output

    def refused(self, *arguments: str, **environment: str) -> str:
        """Return the output of a command that must exit with code 2 and print no traceback."""
        code, output = self.run(*arguments, **environment)
        assert code == 2, output
        assert "Traceback" not in output
        return output

    def kill_in_step(self, step: int, run: str, *arguments: str, **environment: str) -> None:
        """Train; when rank 0 has reached this step and the run has a checkpoint, kill the launcher. Its workers must end too."""
        hang = [{"step": step, "phase": "forward", "rank": 0, "fault": "hang"}]
        process = self.start("train", *arguments, "--name", run, SHOAL_FAULTS=json.dumps(hang), **environment)
        wait_for(process, f"{step - 2}/")
        tick = threading.Event()
        while not any((self.folder / "runs" / run / "checkpoints").glob("step-*/manifest.json")):
            assert process.poll() is None
            tick.wait(0.01)
        workers = workers_of(process)
        process.kill()
        process.communicate()
        assert gone(workers)

    def metrics(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]

    def losses(self, run: str) -> list[tuple[int, float, float]]:
        """Return (step, loss, gradient norm) of each step, at full precision."""
        return [(r["step"], r["loss"], r["grad_norm"]) for r in self.metrics(run) if "loss" in r]

    def scores(self, run: str) -> list[tuple[int, float]]:
        """Return (step, spike score) of each step that has one, at full precision."""
        return [(r["step"], r["spike_score"]) for r in self.metrics(run) if "spike_score" in r]

    def event_lines(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs" / run / "events.jsonl").read_text().splitlines()]

    def events(self, run: str) -> list[str]:
        return [line["event"] for line in self.event_lines(run)]


def clean_environment() -> dict[str, str]:
    """Return the environment without a launcher's rank variables, and with one thread, whatever the machine's load."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1"}


def until(process: subprocess.Popen[str], words: str) -> Iterator[str]:
    """Yield a running command's output up to the line with `words`; fail if the command ends before."""
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if words in line:
            return
    pytest.fail(f"the command ended before it printed {words!r}")


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    return "".join(until(process, words))


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children() if p.name() != warm.NAME]


def gone(processes: list[psutil.Process]) -> bool:
    """Return whether all processes end (or become zombies) within ten seconds; kill the rest."""
    left = processes
    for _ in range(20):
        _, left = psutil.wait_procs(left, timeout=0.5)
        left = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not left:
            return True
    for p in left:
        p.send_signal(signal.SIGKILL)
    return False
