"""The lines of metrics.jsonl: their kinds, their writer and reader, their table in the docs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from shoal.run.records import Evaluation, MetricsFile, StepRecord, forget_after, read_metrics

STEP = StepRecord(
    step=2, tokens=64, loss=3.5, lr=1e-3, grad_norm=None, tokens_per_second=10.0, step_seconds=3.2, mfu=None, memory_bytes=1
)  # fmt: skip
SPLIT = dataclasses.replace(STEP, step=3, split_seconds={"step": 2, "data": 0.5})
HELD_OUT = Evaluation(step=3, tokens=96, val_loss=3.0, val_bits_per_byte=1.2)


def written(path: Path) -> Path:
    file = MetricsFile(path)
    for record in (STEP, SPLIT, HELD_OUT):
        file.record(record)
    file.close()
    return path


def test_what_is_written_is_read_back_by_kind(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl")
    first, second, third = map(json.loads, path.read_text("utf-8").splitlines())
    assert list(first) == [
        "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "mfu", "memory_bytes",
    ]  # fmt: skip
    assert list(second) == [*first, "split_seconds"]
    assert third == {"step": 3, "tokens": 96, "val_loss": 3.0, "val_bits_per_byte": 1.2}
    found = read_metrics(path)
    assert (found.steps, found.evaluations, found.last_step) == ([STEP, SPLIT], [HELD_OUT], 3)
    assert read_metrics(tmp_path / "none").last_step == 0


def test_a_resume_forgets_what_it_takes_again(tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl")
    forget_after(path, 3)
    assert len(read_metrics(path).evaluations) == 1
    forget_after(path, 3, evaluation=True)
    assert read_metrics(path) == dataclasses.replace(read_metrics(path), steps=[STEP, SPLIT], evaluations=[])
    forget_after(path, 2)
    assert read_metrics(path).steps == [STEP]


def test_the_table_in_the_docs_is_of_these_fields() -> None:
    script = Path(__file__).parents[2] / "scripts" / "tables.py"
    assert subprocess.run([sys.executable, script, "--check"], check=False).returncode == 0
