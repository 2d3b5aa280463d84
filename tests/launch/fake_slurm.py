"""Slurm's commands as small shell scripts on PATH, which note how they were called and answer what a test asks for."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shoal.checkpoint.saved import FORMAT, folder_of
from shoal.commands.flags import read_overrides
from shoal.commands.parser import build_parser

RECIPE = """
model: {dim: 32, num_layers: 1, num_heads: 2, max_seq_len: 64}
data: {corpus: dummy, dummy_documents: 60, tokenizer: bytes, seq_len: 32}
train: {steps: 40, global_batch: 16, micro_batch: 2, dtype: float32, device: cpu}
"""
# Each command appends its arguments to `calls`, then runs its own lines. `$here` is the folder of the answers.
_COMMANDS = {
    "sbatch": 'n=$(cat "$here/next"); echo $((n + 1)) > "$here/next"; echo "$n"',
    "squeue": 'cat "$here/queue"',
    "scontrol": '[ "$1" = show ] && cat "$here/job" || [ "$1" != show ]',
    "scancel": "",
}


class FakeSlurm:
    """A folder with these commands, first on PATH, and a working folder with a recipe."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.bin, self.here = folder, folder / "bin", folder / "answers"
        for path in (self.bin, self.here):
            path.mkdir()
        (folder / "recipe.yaml").write_text(RECIPE)
        self.answer("next", "100\n")
        self.answer("queue", "")
        self.answer("job", "JobId=100 JobState=RUNNING Reason=None BatchFlag=1\n")
        for name, lines in _COMMANDS.items():
            self.command(name, lines)
        monkeypatch.setenv("PATH", f"{self.bin}{os.pathsep}{os.environ['PATH']}")
        for name in [name for name in os.environ if name.startswith("SLURM")]:
            monkeypatch.delenv(name)
        monkeypatch.chdir(folder)

    def command(self, name: str, lines: str) -> None:
        """Make a command that runs these shell lines."""
        path = self.bin / name
        log = f'printf "%s\\n" "{name} $*" >> "{self.folder}/calls"'
        path.write_text(f'#!/bin/bash\nhere="{self.here}"\n{log}\n{lines}\n')
        path.chmod(0o755)

    def fails(self, name: str, message: str) -> None:
        self.command(name, f"echo '{name}: error: {message}' >&2; exit 1")

    def remove(self, *names: str) -> None:
        """Hide commands: none of Slurm's own may be found either."""
        for name in names:
            (self.bin / name).unlink()

    def answer(self, name: str, text: str) -> None:
        (self.here / name).write_text(text)

    def calls(self, name: str = "") -> list[str]:
        path = self.folder / "calls"
        return [line for line in path.read_text().splitlines() if line.startswith(name)] if path.is_file() else []

    def run(self, *arguments: str) -> int:
        """Run `shoal launch ARGUMENTS` in this process; return its exit code."""
        argv = ["launch", *arguments]
        args, rest = build_parser("launch", arguments[0]).parse_known_args(argv)
        overrides, stray = read_overrides(args, rest)
        assert not stray
        code: int = args.run(args, overrides, argv) or 0
        return code

    def batch(self, run: str, srun: str, job: str = "100", **environment: str) -> subprocess.Popen[str]:
        """Start a run's batch script as Slurm does, on two nodes; `srun` runs these shell lines."""
        self.command("srun", srun)
        slurm = {
            "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": os.uname().nodename, "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_CPUS_PER_NODE": "3(x2)", "SLURMD_NODENAME": os.uname().nodename,
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", f"runs/{run}/jobs/job.sbatch"], env=os.environ | slurm | environment, text=True, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def save(run: Path, step: int) -> None:
    """Leave a complete checkpoint, as far as its listing goes."""
    folder = folder_of(run / "checkpoints", step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"format": FORMAT, "step": step}))
    (folder / "manifest.json").write_text("{}")


def event(run: Path, name: str, **facts: Any) -> None:
    """Append an event to the run's log."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 0.0, "event": name, **facts}) + "\n")
