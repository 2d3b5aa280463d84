"""The layouts that benchmarks try: a method on a number of processes, with the batch that strong or weak scaling gives it. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from shoal.bench.steps import METHODS
from shoal.config.layout import AXES
from shoal.config.options import Config
from shoal.errors import LaunchError, ShoalError
from shoal.plan.fits import without_unused
from shoal.resolve.layout_checks import refusals
from shoal.system.cpu import count_cores

SINGLE: Final = "single"
AXIS_OF: Final = {name.lower(): axis for axis, name in METHODS.items()}  # ddp -> dp_replicate
MOST_PROCESSES: Final = 8  # of the default numbers
PER_CORE: Final = 4  # processes a core that `plan_processes` allows
Mode = Literal["strong", "weak"]
MODES: Final[tuple[Mode, ...]] = get_args(Mode)


@dataclass(frozen=True)
class Case:
    """
    A method on a number of processes. mode: strong keeps the global batch, weak lets it grow with the processes.

    A single process is one case, whatever the method and the mode.
    """

    method: str
    processes: int
    mode: Mode = "strong"

    @property
    def label(self) -> str:
        """Return the method and the number of processes."""
        kind = SINGLE if self.processes == 1 else METHODS[AXIS_OF[self.method]]
        return f"{kind}, {self.processes} process{'es' * (self.processes > 1)}"

    @property
    def name(self) -> str:
        """Return the name of its row, which has the mode too."""
        return self.label if self.processes == 1 else f"{self.label}, {self.mode}"


def read_counts(text: str) -> list[int]:
    """Read numbers of processes, such as 1,2,4. Raises `ShoalError` if one is none, or given twice."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ShoalError(f"--processes {text}: give numbers of processes, separated by commas, such as 1,2,4,8")
    if len(set(words)) < len(words):
        raise ShoalError(f"--processes {text}: a number is given twice")
    return sorted(map(int, words))


def usual_counts(gpus: int, first: int = 1) -> list[int]:
    """Return `first`, twice as many, ... up to `MOST_PROCESSES` and the GPUs or, on CPUs, `PER_CORE` for each core."""
    most = min(MOST_PROCESSES, gpus or PER_CORE * count_cores())
    return [n for n in (1, 2, 4, 8) if first <= n <= most]


def read_methods(text: str) -> list[str]:
    """Read methods, such as ddp,fsdp. Raises `ShoalError` for another word."""
    words = [word.strip().lower() for word in text.split(",")]
    if wrong := [word for word in words if word not in AXIS_OF]:
        raise ShoalError(f"--method {text}: {wrong[0]!r} is not one of {', '.join(AXIS_OF)}")
    return list(dict.fromkeys(words))


def threads_of(config: Config, counts: list[int]) -> int | None:
    """Return the CPU threads of each process in every case: scaling adds processes, and does not divide threads among more."""
    return config.launch.threads or max(1, count_cores() // max(counts))


def devices_of(processes: int, threads: int, *, gpus: int) -> float:
    """Return how many devices the processes really have: of CPUs, at most as many as the cores can run at a time."""
    return processes if gpus else min(processes, max(1.0, count_cores() / threads))


def config_of(case: Case, base: Config) -> Config:
    """
    Return the config of a case. Raises `ShoalError` if its batch does not divide, or the recipe cannot have this layout.

    The micro-batch is the recipe's or, if that does not divide a process's share of the batch, the largest smaller one that does.
    """
    axis = AXIS_OF[case.method]
    sizes: dict[str, Any] = dict.fromkeys(AXES, 1) | {axis: case.processes}
    parallel = without_unused(dataclasses.replace(base.parallel, **sizes))
    whole = base.train.global_batch * (case.processes if case.mode == "weak" else 1)
    ranks = case.processes if axis.startswith("dp_") else 1
    if whole % ranks:
        raise ShoalError(
            f"{case.name}: train.global_batch {whole} does not divide among {ranks} processes; set train.global_batch to "
            f"{-(-whole // ranks) * ranks}, or choose other --processes"
        )
    config = dataclasses.replace(base, parallel=parallel).replace("launch", processes=case.processes)
    found = _fitting(config, whole, ranks)
    problems = list(refusals(found, case.processes))
    if problems:
        raise LaunchError("\n".join(f"{case.name}: {sentence}" for sentence in problems))
    return found


def _fitting(config: Config, whole: int, ranks: int) -> Config:
    """Return the config with the largest micro-batch that is not rejected; if all are, with the recipe's or a smaller one."""
    found = list(_with_micro_batch(config, whole, ranks))
    return next((each for each in found if not any(refusals(each, each.launch.processes))), found[0])


def _with_micro_batch(config: Config, whole: int, ranks: int) -> Iterator[Config]:
    share = whole // ranks
    for micro in range(min(config.train.micro_batch, share), 0, -1):
        if share % micro == 0:
            yield config.replace("train", global_batch=whole, micro_batch=micro)
