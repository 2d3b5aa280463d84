"""The result of a benchmark: what was measured, where, with which config, and every repeat of it. One schema for all. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from shoal.errors import ShoalError
from shoal.system.disk import write_whole
from shoal.system.output import on_one_line

KIND: Final = "shoal bench"  # of every result file, so that no other JSON is taken for one
VERSION: Final = 1
SECTIONS: Final = ("model", "data", "optim", "train", "parallel", "launch")  # of the config that a result holds
OWN: Final = frozenset({"launch.name", "launch.runs", "data.folder"})  # options that change no figure
MOST_BYTES: Final = 64 * 2**20  # of a file that is read as a result


@dataclass(frozen=True)
class Figure:
    """A measured quantity. better: which of two values is the better one; None: neither."""

    unit: str
    better: Literal["more", "less"] | None
    meaning: str


FIGURES: Final[dict[str, Figure]] = {
    "tokens_per_second": Figure("tokens/s", "more", "throughput of all processes together"),
    "step_seconds": Figure("s", "less", "median time of a step, after warmup"),
    "loss": Figure("nats/token", None, "training loss of the last step"),
    "memory_bytes": Figure(
        "bytes", "less", "peak memory of the process that needs the most: of the device, or resident on a CPU"
    ),
    "of_product": Figure("", "more", "model FLOP/s, causal attention, divided by the rate of a matrix product in the same run"),
    "of_product_full": Figure("", "more", "the same, with full attention"),
    "mfu": Figure("", "more", "model FLOP/s, causal attention, divided by the devices' peak"),
    "mfu_full": Figure("", "more", "the same, with full attention"),
    "times_peer": Figure("", "more", "shoal's speed divided by the peer's in the neighboring run"),
    "speedup": Figure("", "more", "throughput divided by that of the fewest processes in the same repeat"),
    "efficiency": Figure("", "more", "speedup divided by the growth of devices"),
    "allocated_bytes": Figure("bytes", "less", "peak of torch's allocator and of memory that processes share, in a step, of the process that needs the most"),
    "predicted_bytes": Figure("bytes", None, "the same, as shoal plan predicts it"),
    "bytes_per_second": Figure("bytes/s", "more", "bytes of text per second"),
    "times_need": Figure("", "more", "batches read, divided by what a training step needs"),
    "of_tokenizer": Figure("", "more", "speed of preparing, divided by that of the tokenizer alone"),
    "seconds": Figure("s", "less", "duration"),
    "of_torch_save": Figure("", "less", "duration, divided by that of torch.save of the same state, flushed, in the same repeat"),
    "prefill_tokens_per_second": Figure("tokens/s", "more", "tokens of the prompts, until the first new token"),
    "decode_tokens_per_second": Figure("tokens/s", "more", "new tokens of all prompts, after the first"),
    "times_peer_prefill": Figure("", "more", "shoal's prefill speed divided by the peer's in the neighboring run"),
    "times_peer_decode": Figure("", "more", "shoal's decode speed divided by the peer's in the neighboring run"),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One case. facts: its layout, batch and the like. figures: for each of `FIGURES` that was measured, a value per repeat."""

    name: str
    facts: Mapping[str, Any]
    figures: Mapping[str, Sequence[float]]

    def median(self, figure: str) -> float:
        """Return the median over the repeats; NaN if the figure was not measured."""
        return statistics.median(self.figures[figure]) if self.figures.get(figure) else math.nan


@dataclass(frozen=True, kw_only=True)
class Result:
    """
    All that a benchmark measured.

    date: in UTC. commit: of an editable installation, else empty. recipe: `name`, `model`, `options` by dotted key, and
    `tokens_to_train`, the recipe's own length, if known. notes: what to conclude, in sentences.
    """

    verb: str
    command: str
    date: str
    commit: str
    versions: Mapping[str, str]
    hardware: Mapping[str, str | int]
    instructions: str
    recipe: Mapping[str, Any]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    kind: str = field(default=KIND, init=False)
    version: int = field(default=VERSION, init=False)

    def headline(self) -> str:
        """Return the model and the machine in a line."""
        hardware, options = self.hardware, self.recipe["options"]
        device = f"{hardware['cpu']}, {hardware['cores']} cores"
        if "gpu" in hardware:
            device = f"{hardware['gpus']} x {hardware['gpu']}"
        model = f"{self.recipe['model']}, {options['train.dtype']}; " if self.recipe["model"] else ""
        return f"{model}{device} ({self.instructions}), torch {self.versions['torch']}"

    def to_json(self) -> str:
        """Return the result as a JSON object."""
        whole = dataclasses.asdict(self)
        first = {key: whole.pop(key) for key in ("kind", "version")}
        return json.dumps(first | whole, indent=2, default=str)

    def save(self, path: Path) -> None:
        """Write the result to a file. Raises `ShoalError` if it cannot be written."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, [self.to_json().encode(), b"\n"])
        except OSError as error:
            raise ShoalError(f"{on_one_line(path)} cannot be written: {error.strerror}; choose another --out") from None


def read_result(path: Path) -> Result:
    """Read a file that `--out` wrote. Raises `ShoalError` if it is not one."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise _other(path, "it is too large")
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ShoalError(f"{on_one_line(path)} cannot be read: {error.strerror}") from None
    except ValueError:
        raise _other(path, "it is not JSON") from None
    if not isinstance(read, dict) or read.pop("kind", None) != KIND:
        raise _other(path, f'it is not an object with "kind": "{KIND}"')
    if (version := read.pop("version", None)) != VERSION:
        raise _other(path, f"it has version {version}, and this shoal reads version {VERSION}; measure again")
    try:
        rows = [Row(row["name"], row["facts"], _figures(row["figures"])) for row in read.pop("rows")]
        return Result(**read, rows=rows)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise _other(path, f"it is damaged: {error}") from None


def _figures(read: Mapping[str, Any]) -> dict[str, list[float]]:
    """Check the values of a row. Raises `ValueError` if one is not a finite number."""
    found = {name: [float(value) for value in values] for name, values in read.items()}
    if any(not math.isfinite(value) for values in found.values() for value in values):
        raise ValueError("a figure is not finite")
    return found


def _other(path: Path, why: str) -> ShoalError:
    return ShoalError(f"{on_one_line(path)} is not a result of shoal bench --out: {why}")
