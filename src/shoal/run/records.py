"""
The lines of `metrics.jsonl` and `ranks.jsonl`: a dataclass for each kind, one writer, one reader. No torch.

`python scripts/tables.py` generates the tables of these fields in docs/TRAINING.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from shoal.run.events import read_json_lines
from shoal.run.jsonl import PatientLines
from shoal.system.disk import write_whole


def _field(unit: str, meaning: str, *, optional: bool = False) -> Any:
    """Return a field with its unit and meaning; an optional field is not written if it is None."""
    return field(default=None if optional else MISSING, metadata={"unit": unit, "meaning": meaning})


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A line of a file of records."""

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Self:
        """Return the record that a line holds; fields that the line lacks are None."""
        values: dict[str, Any] = {each.name: line.get(each.name) for each in fields(cls)}
        return cls(**values)

    def as_line(self) -> dict[str, Any]:
        """Return the record as a dict for JSON."""
        values = {each: getattr(self, each.name) for each in fields(self)}
        return {f.name: value for f, value in values.items() if f.default is MISSING or value is not None}


@dataclass(frozen=True, kw_only=True)
class _Record(_Line):
    """A line of `metrics.jsonl`."""

    step: int = _field("steps", "optimizer steps taken")
    tokens: int = _field("tokens", "valid tokens trained on so far")
    time: float | None = _field("s", "when the line was written, in seconds since 1970", optional=True)
    replica: int | None = _field("", "replica that wrote the line, if several train apart", optional=True)


@dataclass(frozen=True, kw_only=True)
class StepRecord(_Record):
    """A step: the first, the last, and every `metrics.every` steps."""

    loss: float = _field("nats per token", "mean training loss of this step")
    lr: float = _field("", "learning rate of this step")
    grad_norm: float | None = _field("", "gradient norm before clipping; null if float16 overflowed")
    tokens_per_second: float = _field("tokens/s", "throughput of all processes")
    step_seconds: float = _field("s", "mean time of a step since the last line")
    mfu: float | None = _field("", "model FLOPs utilization, 0 to 1; null if the peak is unknown")
    memory_bytes: int = _field("bytes", "peak memory of process 0: device memory, or resident memory on a CPU")
    source_loss: Mapping[str, float] | None = _field(
        "nats per token",
        "mean training loss of this step by source of a blend, of those with tokens in it",
        optional=True,
    )
    spike_score: float | None = _field(
        "",
        "robust z-score of the loss: distance from the median of recent losses in robust standard deviations",
        optional=True,
    )
    split_seconds: Mapping[str, float] | None = _field(
        "s",
        "time of one step on process 0: `step` (the measured step), `data`, `forward`, `backward`, `reduce`, `optimizer`. "
        "Measured at step 2 and every `metrics.split_every` steps; written with the next line",
        optional=True,
    )


@dataclass(frozen=True, kw_only=True)
class Evaluation(_Record):
    """An evaluation on held-out text: every `train.eval_every` steps and at the end."""

    val_loss: float = _field("nats per token", "validation loss")
    val_bits_per_byte: float = _field("bits per byte", "validation loss per byte of text")
    val_source_loss: Mapping[str, float] | None = _field(
        "nats per token", "validation loss of each source of a blend", optional=True
    )
    val_skipped_rows: int | None = _field(
        "rows", "held-out rows that cannot be read, and are not in the loss", optional=True
    )


@dataclass(frozen=True, kw_only=True)
class RanksRecord(_Line):
    """A line of `ranks.jsonl`: every list has one entry per rank, in the order of ranks."""

    step: int = _field("steps", "the measured step")
    time: float = _field("s", "when the line was written, in seconds since 1970")
    memory_bytes: Sequence[int] = _field("bytes", "memory in use: allocated on a GPU, resident on a CPU")
    peak_memory_bytes: Sequence[int] = _field("bytes", "peak of `memory_bytes` since the process started")
    reserved_bytes: Sequence[int] | None = _field("bytes", "GPU memory that torch holds", optional=True)
    peak_reserved_bytes: Sequence[int] | None = _field("bytes", "peak of `reserved_bytes`", optional=True)
    busy_seconds: Mapping[str, Sequence[float]] = _field(
        "s",
        "busy time of the measured step by phase (`data`, `forward`, `backward`, `reduce`, `optimizer`, `between`), "
        "without waits for other ranks; 0 if unknown",
    )


@dataclass(frozen=True)
class Metrics:
    """The whole lines of a `metrics.jsonl`, in order."""

    steps: Sequence[StepRecord]
    evaluations: Sequence[Evaluation]

    @property
    def last_step(self) -> int:
        """The last step recorded; 0 if there is none."""
        return max((r[-1].step for r in (self.steps, self.evaluations) if r), default=0)


def read_metrics(path: Path) -> Metrics:
    """Return the lines of `metrics.jsonl`; none if there is no file."""
    lines = read_json_lines(path)
    return Metrics(
        [StepRecord.of_line(line) for line in lines if "loss" in line],
        [Evaluation.of_line(line) for line in lines if "val_loss" in line],
    )


def read_ranks(path: Path) -> list[RanksRecord]:
    """Return the lines of `ranks.jsonl`; none if there is no file."""
    return [RanksRecord.of_line(line) for line in read_json_lines(path) if "busy_seconds" in line]


class MetricsFile(PatientLines):
    """The writer of `metrics.jsonl`."""

    def record(self, record: StepRecord | Evaluation) -> None:
        """Add a line."""
        self.add(record.as_line())


class RanksFile(PatientLines):
    """The writer of `ranks.jsonl`."""

    def record(self, record: RanksRecord) -> None:
        """Add a line."""
        self.add(record.as_line())


def forget_after(path: Path, step: int, *, evaluation: bool = False) -> None:
    """
    Remove the lines of steps after `step` from a file of records: a resume takes these steps again.

    evaluation: whether to remove the evaluation at `step` itself too. Raises `OSError` if the file cannot be rewritten.
    """
    if not path.is_file():
        return
    records = read_json_lines(path)
    kept = [r for r in records if r["step"] < step or (r["step"] == step and not (evaluation and "val_loss" in r))]
    write_whole(path, (f"{json.dumps(r)}\n".encode() for r in kept))
