"""
What a profile says, as typed records: `summary.json` and `memory.json`. No torch.

All times are seconds, all sizes bytes. A module is named as in the model: "blocks.3.attention"; "" means work that belongs
to no module, such as the optimizer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from shoal.errors import RunError
from shoal.system.disk import write_whole

SUMMARY: Final = "summary.json"
MEMORY: Final = "memory.json"


@dataclass(frozen=True, kw_only=True)
class OperatorCost:
    """One operator in all recorded steps of a rank."""

    name: str  # "aten::mm"
    calls: int
    cpu_seconds: float  # its own time on the CPU, without operators and ranges inside it
    device_seconds: float  # time of the GPU kernels that it launched itself; 0 on a CPU
    share: float  # of the recorded steps' wall time: of `device_seconds` on a GPU, of `cpu_seconds` on a CPU
    module: str  # kind of module with the largest part, with * for a block's number: "blocks.*.ffn.down"
    module_share: float  # that module's part of this operator's time, 0 to 1


@dataclass(frozen=True, kw_only=True)
class ModuleCost:
    """One module in all recorded steps of a rank, with the modules inside it."""

    name: str
    calls: int  # forwards, recomputed ones too
    forward_seconds: float
    backward_seconds: float  # of the autograd nodes that its forward has made, and recomputed forwards


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """
    Communication that ran while the rank computed.

    hidden_seconds is the length of the intersection of two sets of time. The first is the union of the intervals of
    collectives: NCCL's kernels on a GPU; on a CPU, gloo's transfers on gloo's threads. The second is the union of the
    intervals of computing: all other kernels on a GPU; on a CPU, operators of any thread, without c10d's, without gloo's
    own threads, and without the waits in an operator that calls a collective itself.
    """

    communication_seconds: float
    compute_seconds: float
    hidden_seconds: float

    @property
    def percent(self) -> float | None:
        """Hidden communication in percent of all communication; None without communication."""
        return 100 * self.hidden_seconds / self.communication_seconds if self.communication_seconds else None


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The largest ranges of a rank, nested. Each range is [depth, start, duration, name]: seconds from the first step's begin."""

    names: Sequence[str]
    ranges: Sequence[Sequence[float]]  # depth 0: steps; 1: phases; from 2: modules. name: index into `names`
    collectives: Sequence[Sequence[float]]  # [start, duration, name]
    dropped: int  # ranges and collectives that are shorter than those kept


@dataclass(frozen=True, kw_only=True)
class RankProfile:
    """The profile of one rank."""

    rank: int
    device: str  # "cpu" or "cuda"
    trace: str  # file name of its trace
    trace_bytes: int
    events: int
    steps: Sequence[int]  # the steps recorded
    step_seconds: Sequence[float]  # of the recorded steps, with the profiler
    usual_step_seconds: float | None  # median of the steps before, without the profiler; None if there were none
    recording_bytes: int  # memory that the events took
    stopped_early: bool  # whether the events took too much memory, so that later steps are not recorded
    phase_seconds: Mapping[str, float]  # by phase, all recorded steps
    outside_seconds: float  # wall time of the recorded steps outside any operator of the main thread: Python and waits
    operators: Sequence[OperatorCost]  # the dearest first
    modules: Sequence[ModuleCost]
    overlap: Overlap
    timeline: Timeline

    @property
    def overhead(self) -> float | None:
        """How many times as long a step took with the profiler; None if no step ran without."""
        if not self.usual_step_seconds or not self.step_seconds:
            return None
        return sum(self.step_seconds) / len(self.step_seconds) / self.usual_step_seconds

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `as_json` wrote."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{
            **{name: value for name, value in values.items() if name in known},
            "operators": [OperatorCost(**each) for each in values["operators"]],
            "modules": [ModuleCost(**each) for each in values["modules"]],
            "overlap": Overlap(**{k: v for k, v in values["overlap"].items() if k != "percent"}),
            "timeline": Timeline(**values["timeline"]),
        })  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """Return the record as values for JSON, with the derived ones."""
        values = dataclasses.asdict(self)
        values["overlap"]["percent"] = self.overlap.percent
        return {**values, "overhead": self.overhead}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """`summary.json`: the profile of all recorded ranks."""

    run: str
    first: int  # the first and the last step asked for
    last: int
    world_size: int
    layout: Mapping[str, int]
    total_steps: int
    ranks: Sequence[RankProfile]

    @property
    def overlap(self) -> Overlap:
        """The sum over ranks."""
        return Overlap(**{
            f.name: sum(getattr(each.overlap, f.name) for each in self.ranks) for f in dataclasses.fields(Overlap)
        })  # fmt: skip

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a profile's folder. Raises `RunError` if it holds none."""
        values = read_json(folder / SUMMARY)
        try:
            known = {f.name: values[f.name] for f in dataclasses.fields(cls)}
            return cls(**{**known, "ranks": [RankProfile.of_json(each) for each in values["ranks"]]})
        except (KeyError, TypeError) as error:
            raise RunError(
                f"{folder / SUMMARY} is not a profile of this version of shoal ({error}); run shoal profile again"
            ) from error

    def write(self, folder: Path) -> None:
        """Write `summary.json`. Raises `OSError`."""
        values = {**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}
        overlap = {**dataclasses.asdict(self.overlap), "percent": self.overlap.percent}
        values |= {"ranks": [each.as_json() for each in self.ranks], "overlap": overlap}
        write_json(folder / SUMMARY, values)


@dataclass(frozen=True, kw_only=True)
class ModuleMemory:
    """The memory of one module on a rank, without the modules inside it."""

    name: str
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int = 0  # allocated by its forward and still held at the peak of the recorded steps


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """The memory of one rank by module."""

    rank: int
    modules: Sequence[ModuleMemory]
    peak_bytes: (
        int  # most memory that the recorded steps allocated and held at once, in addition to the memory in use before
    )
    peak_seconds: float  # when, from the first step's begin
    other_bytes: int  # held at the peak and allocated outside of any module's forward: backward, optimizer, batches
    cuda: Mapping[str, Any] = field(default_factory=dict)  # torch's snapshot of a GPU's allocator; empty on a CPU

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the record that `dataclasses.asdict` made."""
        return cls(**{**values, "modules": [ModuleMemory(**each) for each in values["modules"]]})


def read_memory(folder: Path) -> list[RankMemory]:
    """Read `memory.json`. Raises `RunError` if it cannot be read."""
    return [RankMemory.of_json(each) for each in read_json(folder / MEMORY)["ranks"]]


def write_memory(folder: Path, ranks: Sequence[RankMemory]) -> None:
    """Write `memory.json`. Raises `OSError`."""
    write_json(folder / MEMORY, {"ranks": [dataclasses.asdict(each) for each in ranks]})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `RunError` if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); run shoal profile again") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} is not a JSON object; run shoal profile again")
    return found


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object. Raises `OSError`."""
    write_whole(path, [json.dumps(values).encode()])
