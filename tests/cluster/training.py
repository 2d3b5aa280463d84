"""A small training run on the bed: its recipe, its folder on the shared disk, its jobs, and its weights."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psutil

from shoal.checkpoint.saved import listed
from shoal.data.order.audit import audit
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder
from tests.cluster.bed import LIMIT_SECONDS, OVER, Bed
from tests.cluster.host import environment
from tests.digests import weights

STEPS: Final = 200  # long enough for a fault in the middle
RATE: Final = "8mbit"  # of the network between nodes: a step of two nodes then takes about 0.1 s
ASK_SECONDS: Final = 1.0  # between two questions to the controller
SHOAL: Final = f"{sys.executable} -m shoal"
RECIPE: Final = f"""
model: {{dim: 32, num_layers: 1, num_heads: 2, max_seq_len: 16}}
data: {{corpus: dummy, dummy_documents: 60, tokenizer: bytes, seq_len: 16}}
optim: {{lr: 1e-2, warmup_steps: 2, schedule: constant}}
train: {{steps: {STEPS}, global_batch: 8, micro_batch: 2, dtype: float32, device: cpu, repro: bitwise, eval_every: 0}}
checkpoint: {{every: 10, keep: 3}}
metrics: {{peak_tflops: 1, report: false}}
launch: {{processes: 1, threads: 1, timeout_seconds: {LIMIT_SECONDS / 4:.0f}, join_seconds: 2}}
"""


class Training:
    """One run, called `run`, in `folder` on the shared disk."""

    def __init__(self, bed: Bed, folder: Path) -> None:
        self.bed, self.folder = bed, folder
        folder.mkdir(exist_ok=True)
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        self.run = RunFolder(folder / "runs" / "run")
        bed.set_rate(RATE)

    def submit(self, script: str, *options: str) -> str:
        return self.bed.submit(script, *options, cwd=self.folder)

    def shoal(self, *arguments: str) -> str:
        """Run a shoal command on the login node. Raises AssertionError, with its output, if it fails."""
        return self.bed.run(*SHOAL.split(), *arguments, cwd=self.folder)

    def launch(self, *options: str) -> str:
        """Submit the run with `shoal launch slurm`; return the job's number."""
        output = self.shoal("launch", "slurm", "recipe.yaml", "--name=run", "--submit", *options)
        return output.split("submitted job ")[1].split()[0]

    def printed(self, job: str) -> str:
        paths = (self.folder / f"slurm-{job}.out", self.run.path / "jobs" / f"{job}.log")
        return "".join(path.read_text("utf-8", "replace") for path in paths if path.exists())

    def until(self, true: Callable[[], bool], job: str, seconds: float = LIMIT_SECONDS) -> None:
        """Wait until `true()`. Raises AssertionError, with the job's output, after `seconds` or if the job ends before."""
        asked, over = time.monotonic(), False

        def now() -> bool:
            nonlocal asked, over
            if true():
                return True
            if time.monotonic() - asked < ASK_SECONDS:
                return False
            state, asked, was_over = self.bed.state(job), time.monotonic(), over
            over = state in OVER  # a job that Slurm requeues passes through such a state
            assert not (over and was_over) or true(), f"the job is {state}"
            return False

        try:
            self.bed.until(now, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- the job's output\n{self.printed(job)}") from None

    def until_step(self, step: int, job: str) -> None:
        self.until(lambda: self.run.last_step() >= step, job)

    def until_done(self, job: str) -> None:
        """Wait until the job has completed. Raises AssertionError, with its output, if it ended otherwise."""
        self.until(lambda: self.run.last_step() >= STEPS, job)
        self.until_over(job)

    def until_over(self, job: str) -> None:
        """Wait until the job has completed, whatever the run did."""
        self.until(lambda: self.bed.state(job) == "COMPLETED", job)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_json_lines(self.run.events_file) if event["event"] == name]

    def weights(self) -> dict[str, str]:
        """Return the digests of the last weights. Raises AssertionError if they are not those of step `STEPS`."""
        saved = listed(self.run.checkpoints)
        assert saved, "nothing was saved"
        assert saved[-1].step == STEPS
        assert audit(self.run.ledger_file).passed
        return weights(saved[-1].folder)


class Undisturbed:
    """The same training without Slurm and faults, in one process, beside what its creator does meanwhile."""

    def __init__(self, folder: Path) -> None:
        """Start to train in a new `folder`."""
        self._folder, self._found = folder, dict[str, str]()
        folder.mkdir()
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        with (folder / "output").open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [*SHOAL.split(), "train", "recipe.yaml", "--name", "run"], cwd=folder, env=environment(),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def weights(self) -> dict[str, str]:
        """Wait for the end, and return the digests of the last weights."""
        if not self._found:
            assert self._process.wait(LIMIT_SECONDS) == 0, (self._folder / "output").read_text()
            self._found = weights(listed(self._folder / "runs" / "run" / "checkpoints")[-1].folder)
        return self._found

    def close(self) -> None:
        """Stop it if it still trains."""
        self._process.terminate()
        self._process.wait()


def is_train(process: psutil.Process) -> bool:
    """Return whether a process is `shoal train`: a launcher or a worker."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    # the first word excludes srun, which has the launcher's command line as its own
    runs_python = bool(words) and Path(words[0]).name.startswith("python")
    return runs_python and "train" in words and any(Path(word).name == "shoal" for word in words)
