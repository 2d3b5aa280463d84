"""Runs a case for real, and judges it: the same weights as without the fault, every sample once, nothing left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from shoal.checkpoint.saved import listed, verify
from shoal.data.ledger import audit
from shoal.fault.inject import PLAN
from tests.chaos.case import SAVE_EVERY, STEPS, Case
from tests.cli.commands import clean_environment

RECIPE = f"""
model: {{dim: 32, num_layers: 2, num_heads: 2, max_seq_len: 32}}
data: {{corpus: dummy, dummy_documents: 60, tokenizer: bytes, seq_len: 32}}
optim: {{lr: 1e-2, warmup_steps: 2, schedule: constant}}
train: {{steps: {STEPS}, global_batch: 24, micro_batch: 2, dtype: float32, device: cpu, repro: bitwise, eval_every: 0}}
checkpoint: {{every: {SAVE_EVERY}, keep: 3}}
fault: {{check_replicas_every: 1}}
metrics: {{peak_tflops: 1}}
launch: {{hang_seconds: 4, timeout_seconds: 30, threads: 1}}
"""


@dataclass(frozen=True)
class Verdict:
    """`problems` is empty where the run lived through it. `events`: their names, in order."""

    problems: tuple[str, ...]
    events: tuple[str, ...]
    output: str


class Laboratory:
    """A folder for runs; what a run comes to without faults is computed once for each number of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        self._clean: dict[str, dict[str, str]] = {}

    def run(self, name: str, processes: int, plan: list[dict[str, object]]) -> tuple[int, str, set[int]]:
        """(exit code, output, processes that are left over)"""
        command = [sys.executable, "-m", "shoal", "train", "recipe.yaml", "--name", name, "--processes", str(processes)]
        environment = clean_environment() | {PLAN: json.dumps(plan), "SHOAL_CHAOS": name}
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output, _ = process.communicate(timeout=180)
        return process.returncode, output, _still_there(name)

    def try_out(self, case: Case, name: str) -> Verdict:
        """Run the case, and judge it."""
        code, output, left = self.run(name, case.processes, case.plan)
        folder = self.folder / "runs" / name
        problems = [] if code == 0 else [f"it ended with {code}"]
        problems += [f"process {pid} is left over" for pid in sorted(left)]
        problems += [] if code else self._judge(case, folder)
        return Verdict(tuple(problems), tuple(e["event"] for e in _lines(folder / "events.jsonl")), output)

    def _judge(self, case: Case, folder: Path) -> list[str]:
        saved = listed(folder / "checkpoints")
        if not saved or saved[-1].step != STEPS:
            return [f"the last checkpoint is {saved[-1].step if saved else 'none'}, not {STEPS}"]
        for each in saved:
            verify(each.folder)
        problems = []
        if weights(saved[-1].folder) != self._expected(case):
            problems.append("other weights than without the fault")
        found = audit(folder / "ledger.jsonl")
        if not found.passed:
            problems.append(f"the ledger fails: {found.problems[:1]}")
        known = {"step-", "latest", "damaged-"}
        strange = [p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith(tuple(known))]
        problems += [f"{name} is left over" for name in strange]
        return problems

    def _expected(self, case: Case) -> dict[str, str]:
        """What a run comes to that nothing disturbed; for a step that is left out, one process that leaves it out too."""
        plan = case.plan[:1] if case.fault == "nan" else []
        key = f"left-out-{case.step}" if plan else "clean"
        if key not in self._clean:
            code, output, _ = self.run(key, 1, [plan[0] | {"rank": 0}] if plan else [])
            assert code == 0, output
            self._clean[key] = weights(listed(self.folder / "runs" / key / "checkpoints")[-1].folder)
        return self._clean[key]


def weights(folder: Path) -> dict[str, str]:
    """Of every tensor of a checkpoint, a digest of its bytes; written by any number of processes."""
    import hashlib

    from safetensors import safe_open

    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = hashlib.sha256(file.get_tensor(name).tobytes()).hexdigest()
    return found


def _still_there(name: str) -> set[int]:
    """Processes of the run, by the mark in their environment."""
    left = set()
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("SHOAL_CHAOS") == name:
                left.add(process.pid)
        except psutil.Error:
            continue
    return left


def _lines(path: Path) -> list[dict[str, Any]]:
    from shoal.metrics.trackers import read_json_lines

    return read_json_lines(path)
