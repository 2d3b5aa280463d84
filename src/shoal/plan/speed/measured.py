"""
The steps that this user's runs took, beside what `shoal plan` had predicted: what the next prediction learns from. No torch.

A run that ends adds a line to `steps.jsonl` in `calibration.folder()`. The line holds what the step computed and sent, so that
later rates, of another calibration, apply to it too.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.config.layout import Layout
from shoal.config.options import Config
from shoal.plan.fits import Need, need_of, why_unknown
from shoal.plan.machine import Machine
from shoal.plan.rehearse.work import Op, Work
from shoal.plan.speed.calibration import device_of, find, folder
from shoal.plan.speed.corrections import Corrections, Interval, Seen
from shoal.plan.speed.rates import WIDTHS, Rates
from shoal.plan.speed.seconds import idle_share, step_seconds
from shoal.system.disk import write_whole
from shoal.system.output import aligned

FILE: Final = "steps.jsonl"
VERSION: Final = 1
NEWEST: Final = 100  # steps on one device from which a prediction learns
MOST_BYTES: Final = 4 * 2**20  # of the file; then the older half is dropped


@dataclass(frozen=True)
class Measured:
    """
    The median step of a run, with the prediction that its own device's earlier steps gave.

    memory_bytes: of its first rank; None on a CPU. predicted_bytes: as a rehearsal counts them. memory: the prediction from that.
    """

    time: float
    run: str
    device: str
    cuda: bool
    per_node: int
    nodes: int
    dtype: str
    layout: Layout
    idle: float
    works: Sequence[Work]
    seconds: float
    predicted: Interval
    calibrated: bool
    memory_bytes: int | None
    predicted_bytes: int
    memory: Interval | None = None  # unknown of a line that an earlier version wrote

    def seen(self, rates: Rates) -> Seen:
        """Return the step as it is predicted with these rates, without corrections, and as it was measured."""
        memory = self.memory_bytes / self.predicted_bytes if self.memory_bytes else None
        return Seen(step_seconds(self.works, self.layout, self.idle, rates), self.seconds, memory)

    def as_line(self) -> str:
        """Return a line of the file."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {
            "layout": dataclasses.asdict(self.layout), "predicted": dataclasses.astuple(self.predicted),
            "memory": dataclasses.astuple(self.memory) if self.memory else None,
            "works": [[_pairs(work.done), _pairs(work.once), _pairs(work.messages)] for work in self.works],
        }  # fmt: skip
        return json.dumps({"version": VERSION, **fields, **changed})

    @classmethod
    def of_line(cls, line: str) -> Measured:
        """Read a line. Raises ValueError, KeyError or TypeError if it holds none."""
        read: dict[str, Any] = json.loads(line)
        if read.pop("version") != VERSION:
            raise ValueError("another version")
        works = [
            Work(
                Counter({Op(kind, tuple(sizes)): times for (kind, sizes), times in done}),
                Counter({Op(kind, tuple(sizes)): times for (kind, sizes), times in once}),
                Counter({(kind, axis, size): times for (kind, axis, size), times in messages}),
            )
            for done, once, messages in read.pop("works")
        ]
        layout, predicted, memory = (
            Layout(**read.pop("layout")),
            Interval(*read.pop("predicted")),
            read.pop("memory", None),
        )
        return cls(**read, layout=layout, predicted=predicted, works=works, memory=memory and Interval(*memory))


def _pairs(counts: Mapping[Any, float]) -> list[tuple[Any, float]]:
    return [(key, round(times, 4)) for key, times in counts.items()]


def read_all() -> list[Measured]:
    """Return all steps that are kept, the oldest first; lines that cannot be read are passed over."""
    return list(_read(folder() / FILE))


def _read(path: Path) -> Iterator[Measured]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield Measured.of_line(line)
        except (ValueError, KeyError, TypeError):
            continue


def known(machine: Machine, dtype: str, path: Path | None = None) -> tuple[Rates, list[Seen]]:
    """
    Return the rates of a machine, from a calibration (`calibration.find`) or its data sheet, and the newest steps that were measured
    on such devices in this dtype.
    """
    calibration, device = find(machine, path), device_of(machine)

    def rates_of(machine: Machine) -> Rates:
        return (calibration and calibration.rates(machine, dtype)) or Rates(machine, WIDTHS[dtype])

    alike = [m for m in read_all() if (m.device, m.cuda, m.dtype) == (device, machine.cuda, dtype)][-NEWEST:]
    seen = [m.seen(rates_of(dataclasses.replace(machine, per_node=m.per_node, nodes=m.nodes))) for m in alike]
    return rates_of(machine), seen


@dataclass(frozen=True)
class Prediction:
    """What is known of a run's step before it is taken. seen: number of measured steps that it has learned from."""

    need: Need
    machine: Machine
    seconds: Interval
    memory: Interval
    calibrated: bool
    seen: int


def predict(config: Config, layout: Layout, machine: Machine) -> Prediction | None:
    """Predict a run's step; None if such a run cannot be predicted."""
    dtype = config.train.dtype
    if why_unknown(config) or dtype not in WIDTHS or layout.world_size != machine.world_size:
        return None
    need = need_of(config, layout, cuda=machine.cuda)
    rates, seen = known(machine, dtype)
    parts = step_seconds(need.works, layout, idle_share(need), rates)
    learned = Corrections(seen, calibrated=rates.measured)
    memory = learned.memory(need.total, cuda=machine.cuda)
    return Prediction(need, machine, learned.predict(parts), memory, rates.measured, len(seen))


def keep(found: Prediction, seconds: float, memory_bytes: int | None) -> None:
    """Keep a run's median step with its prediction. Raises OSError if the file cannot be written."""
    config, machine = found.need.config, found.machine
    measured = Measured(
        time=time.time(), run=config.launch.name or "run", device=device_of(machine), cuda=machine.cuda,
        per_node=machine.per_node, nodes=machine.nodes, dtype=config.train.dtype, layout=found.need.layout,
        idle=idle_share(found.need), works=found.need.works, seconds=seconds, predicted=found.seconds,
        calibrated=found.calibrated, memory_bytes=memory_bytes, predicted_bytes=found.need.total, memory=found.memory,
    )  # fmt: skip
    _append(folder() / FILE, measured.as_line())


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    if path.stat().st_size > MOST_BYTES:
        lines = path.read_bytes().splitlines(keepends=True)
        write_whole(path, lines[len(lines) // 2 :])


def report(kept: Sequence[Measured]) -> list[str]:
    """Return how well the steps were predicted, by device, as text."""
    if not kept:
        return ["no run has been measured yet: shoal train keeps its median step beside the prediction when it ends"]
    groups: dict[tuple[str, str, bool], list[Measured]] = {}
    for each in kept:
        groups.setdefault((each.device, each.dtype, each.calibrated), []).append(each)
    rows = [["device", "dtype", "rates", "runs", "median error", "first", "last", "in 90% interval"]]
    for (device, dtype, calibrated), some in groups.items():
        off = [abs(each.predicted.middle / each.seconds - 1) for each in some]
        half = max(1, len(off) // 2)
        held = sum(each.predicted.holds(each.seconds) for each in some)
        rows.append([
            device, dtype, "measured" if calibrated else "data sheet", str(len(some)), f"{statistics.median(off):.1%}",
            f"{statistics.median(off[:half]):.1%}", f"{statistics.median(off[-half:]):.1%}", f"{held} of {len(some)} ({held / len(some):.0%})",
        ])  # fmt: skip
    table = aligned(rows, left=(0, 1, 2))
    told = ["", "first, last: the median error of the first and of the last half of the runs"]
    sized = [(m.memory, m.memory_bytes) for m in kept if m.memory and m.memory_bytes]
    if sized:
        off = [abs(memory.middle / size - 1) for memory, size in sized]
        held = sum(memory.holds(size) for memory, size in sized)
        told.append(
            f"memory of {len(sized)} runs on GPUs: median error {statistics.median(off):.1%}; in its 90% interval: {held}"
        )
    return [*table, *told]
