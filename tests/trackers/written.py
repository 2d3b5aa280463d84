"""Run folders as a trainer writes them, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoal.config.options import Config
from shoal.run.events import Events
from shoal.run.folder import RunFolder
from shoal.run.records import Evaluation, MetricsFile, RanksRecord, StepRecord, forget_after

BEGUN = 1_700_000_000.0
GPUS = [{"name": "Made-up GPU", "memory_bytes": 1 << 34}] * 2
MODEL = "Llama(\n  (embed): Embedding(256, 32)\n)"


def step_record(step: int, take: int = 0) -> StepRecord:
    """Return the record of a step; its speed differs from one take to the next."""
    return StepRecord(
        step=step, tokens=512 * step, time=BEGUN + 1000 * take + step, loss=4 / step + 0.001 * take, lr=1e-3 / step,
        grad_norm=None if step % 7 == 0 else 1.5, tokens_per_second=5000.0 + step, step_seconds=0.1, mfu=0.25,
        memory_bytes=1 << 30, source_loss={"web": 2.0, "code": 1.0}, spike_score=0.5,
        split_seconds={"step": 0.1, "forward": 0.04},
    )  # fmt: skip


def evaluation(step: int, take: int = 0) -> Evaluation:
    return Evaluation(
        step=step, tokens=512 * step, time=BEGUN + 1000 * take + step + 0.5, val_loss=5 / step, val_bits_per_byte=1.5 / step,
        val_source_loss={"web": 2.5}, val_skipped_rows=3,
    )  # fmt: skip


def ranks_record(step: int, take: int = 0) -> RanksRecord:
    return RanksRecord(
        step=step, time=BEGUN + 1000 * take + step, memory_bytes=[100, 200], peak_memory_bytes=[300, 400],
        reserved_bytes=[500, 600], peak_reserved_bytes=[700, 800], busy_seconds={"forward": [0.1, 0.3]},
    )  # fmt: skip


class Written:
    """A run's folder and its writer."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.folder = RunFolder(path)
        path.mkdir(parents=True)
        config = Config().replace("launch", name=path.name, runs=str(path.parent)).replace("track", **options)
        self.folder.save_config(config)
        (path / "model.txt").write_text(MODEL, encoding="utf-8")
        self.take = -1

    def start(self, step: int = 0) -> None:
        """Begin a life that takes the steps after `step`."""
        self.take += 1
        self.event("started", step=step, processes=2, gpus=GPUS, versions={"torch": "9.9"}, parameters=1234)
        forget_after(self.folder.metrics_file, step)

    def event(self, event: str, **facts: Any) -> None:
        events = Events(self.folder.events_file)
        events.say(event, **facts)
        events.close()

    def steps(self, first: int, last: int, eval_every: int = 10, split_every: int = 5) -> None:
        """Take steps: write their lines."""
        metrics, ranks = MetricsFile(self.folder.metrics_file), MetricsFile(self.folder.ranks_file)
        for step in range(first, last + 1):
            metrics.record(step_record(step, self.take))
            if step % eval_every == 0:
                metrics.record(evaluation(step, self.take))
            if step % split_every == 0:
                ranks.add(ranks_record(step, self.take).as_line())
        metrics.close()
        ranks.close()

    def sample(self, name: str, text: str) -> None:
        self.folder.samples.mkdir(exist_ok=True)
        (self.folder.samples / f"{name}.txt").write_text(text, encoding="utf-8")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.folder.metrics_file.read_text().splitlines()]

    def curve(self, key: str = "loss") -> list[tuple[int, float]]:
        return [(line["step"], line[key]) for line in self.lines() if line.get(key) is not None]
