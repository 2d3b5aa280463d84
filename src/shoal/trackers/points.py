"""What a tracker gets: numbers at a step, texts, and what the run is. Made from the run's typed records. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.config.options import Config
from shoal.resolve.resolve import to_dict
from shoal.run.records import Evaluation, RanksRecord, StepRecord


@dataclass(frozen=True)
class Scalars:
    """Numbers at a step, by name: "train/loss", "val/loss", "memory/peak_bytes/rank_0"."""

    step: int
    time: float  # seconds since 1970
    values: Mapping[str, float]


@dataclass(frozen=True)
class Note:
    """A text: an event of the run, or a sample of the model's text."""

    step: int
    time: float
    name: str  # "events/stopped", "samples/end"
    text: str


@dataclass(frozen=True)
class About:
    """What the run is, as far as its files say."""

    name: str
    options: Mapping[str, Any]  # the hyperparameters
    facts: Mapping[str, Any]  # hardware, versions, sizes
    model: str = ""  # the model's modules, as text


@dataclass
class Batch:
    """What is sent at once. cut: the last step that was sent before and still counts; later ones are sent again."""

    scalars: list[Scalars] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    cut: int | None = None

    def __bool__(self) -> bool:
        return bool(self.scalars or self.notes) or self.cut is not None


def of_step(record: StepRecord, devices: int) -> dict[str, float]:
    """Return the numbers of a step. devices: the number of processes, each with a device."""
    found: dict[str, float | None] = {
        "train/loss": record.loss,
        "train/lr": record.lr,
        "train/grad_norm": record.grad_norm,
        "train/spike_score": record.spike_score,
        "train/tokens": record.tokens,
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/tokens_per_second_per_device": record.tokens_per_second / devices,
        "speed/step_seconds": record.step_seconds,
        "speed/mfu": record.mfu,
        "memory/peak_bytes": record.memory_bytes,
    }
    found |= {f"train/source_loss/{name}": loss for name, loss in (record.source_loss or {}).items()}
    found |= {f"split_seconds/{phase}": seconds for phase, seconds in (record.split_seconds or {}).items()}
    return _numbers(found)


def of_evaluation(record: Evaluation) -> dict[str, float]:
    """Return the numbers of an evaluation."""
    found = {
        "val/loss": record.val_loss,
        "val/bits_per_byte": record.val_bits_per_byte,
        "val/skipped_rows": record.val_skipped_rows,
    }
    return _numbers(found | {f"val/source_loss/{name}": loss for name, loss in (record.val_source_loss or {}).items()})


def of_ranks(record: RanksRecord) -> dict[str, float]:
    """Return the memory of each rank and of all together, and the longest and the mean busy time of each phase."""
    memory = {
        "bytes": record.memory_bytes,
        "peak_bytes": record.peak_memory_bytes,
        "reserved_bytes": record.reserved_bytes,
        "peak_reserved_bytes": record.peak_reserved_bytes,
    }
    found: dict[str, float | None] = {}
    for name, by_rank in memory.items():
        if by_rank:
            found |= {f"memory/{name}/rank_{rank}": value for rank, value in enumerate(by_rank)}
            found[f"memory/{name}/total"] = sum(by_rank)
    for phase, seconds in record.busy_seconds.items():
        found |= {f"busy_seconds/{phase}/{name}": value for name, value in _of_all(seconds)}
    return _numbers(found)


def _of_all(seconds: Sequence[float]) -> Iterator[tuple[str, float]]:
    if seconds:
        yield "mean", sum(seconds) / len(seconds)
        yield "max", max(seconds)


def _numbers(found: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items() if value is not None}


def note_of(event: Mapping[str, Any], step: int) -> Note:
    """Return an event as a text. step: the last step before it, for an event without one."""
    facts = {key: value for key, value in event.items() if key not in ("time", "event")}
    said = event.get("step")
    name = "_".join(str(event["event"]).split())
    return Note(
        said if isinstance(said, int) else step, float(event.get("time") or 0.0), f"events/{name}",
        " ".join([str(event["event"]), json.dumps(facts, ensure_ascii=False) if facts else ""]).strip(),
    )  # fmt: skip


def about(config: Config, started: Mapping[str, Any], model: str) -> About:
    """Return what the run is. started: its last event of that name, or nothing. model: the text of the model's modules."""
    options = {f"{section}.{key}": v for section, values in to_dict(config).items() for key, v in _flat(values)}
    return About(config.launch.name or "run", _short(config) | options, dict(_facts(started)), model)


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _short(config: Config) -> dict[str, Any]:
    """Return what most people look for, under the names that they look for."""
    data, train = config.data, config.train
    text = ", ".join(data.sources or ()) or data.corpus or ", ".join(data.paths)
    return {
        "model": config.model.preset or config.model.from_ or config.model.family,
        "data": text,
        "seq_len": data.seq_len,
        "batch": train.global_batch,
        "lr": config.optim.lr,
        "epochs": train.epochs,
        "steps": train.steps,
        "optimizer": config.optim.name,
        "schedule": config.optim.schedule,
        "dtype": train.dtype,
    }


def _facts(started: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the facts of a start, flat: gpus/0/name, versions/torch, world_size, parameters, ..."""
    for key, value in started.items():
        if key in ("time", "event", "step"):
            continue
        if key == "gpus" and isinstance(value, list):
            yield from _flat({f"gpus.{rank}": gpu for rank, gpu in enumerate(value)})
            continue
        yield from _flat({"world_size" if key == "processes" else key: value})
