"""
The matrix: every layout of at most 8 processes, with each family, precision, checkpointing and compile.

    cells()            all of them; `refused(cell)` returns shoal's reasons to reject one
    Bench.run(cell)    measures its first step on real processes against one process
    problem(cell, ..)  what is wrong with the measurements, or None
    cover()            few cells, with every layout and every pair of features and values that can be combined
    thin()             even fewer, with every feature and value

`scripts/matrix.py` runs all of it and writes docs/matrix.md; `test_matrix.py` runs the cells of `cover()`, and
`make test-torch` those of `thin()`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from shoal.config.options import Config
from shoal.mesh.mesh import Mesh
from shoal.resolve.layout_checks import refusals
from tests.parallel.layouts import Step, config_of, first_step, whole
from tests.parallel.setups import GROUPS, LAYOUTS, TOGETHER, Setup
from tests.world import Worlds

FAMILIES = ("llama", "gpt2")
DTYPES = ("float32", "bfloat16", "float16")
CHECKPOINTING = ("none", "full", "selective", "budget")


@dataclass(frozen=True)
class Cell:
    """One cell of the matrix. Its fields are the axes."""

    layout: str
    family: str
    dtype: str
    checkpointing: str
    compile: bool

    def __str__(self) -> str:
        compiled = ", compiled" if self.compile else ""
        return f"{self.layout} | {self.family} | {self.dtype} | {self.checkpointing}{compiled}"

    @property
    def setup(self) -> Setup:
        return LAYOUTS[self.layout]

    @property
    def plain(self) -> bool:
        """Return whether the cell is float32 and not compiled: the strictest test of a layout."""
        return self.dtype == "float32" and not self.compile

    @property
    def processes(self) -> int:
        return self.setup.processes

    @property
    def values(self) -> frozenset[str]:
        """Return the features of the cell's layout, and its values on the other axes."""
        values = (self.family, self.dtype, f"checkpointing {self.checkpointing}", f"compile {self.compile}")
        return self.setup.features.union(values)

    @property
    def pairs(self) -> frozenset[tuple[str, str]]:
        """Return all pairs of the cell's values."""
        return frozenset(itertools.combinations(sorted(self.values), 2))

    @property
    def cost(self) -> float:
        """Return the cell's approximate seconds: processes share few cores, and compiling is slow."""
        return self.processes * (8.0 if self.compile else 0.4)

    def config(self, folder: Path) -> Config:
        return config_of(
            folder, str(self).replace(" | ", "-"), self.family, **self.setup.options, train__device="cpu",
            train__dtype=self.dtype, train__activation_checkpointing=self.checkpointing, train__compile=self.compile,
        )  # fmt: skip


def cells() -> Iterator[Cell]:
    """
    Yield all cells, including rejected ones, fast ones first and sorted by number of processes.

    Cells for which the compiler generates the same code are adjacent.
    """
    for compile, processes in itertools.product((False, True), sorted({setup.processes for setup in LAYOUTS.values()})):
        layouts = [name for name, setup in LAYOUTS.items() if setup.processes == processes]
        for dtype, family, checkpointing, layout in itertools.product(DTYPES, FAMILIES, CHECKPOINTING, layouts):
            if layout not in GROUPS[TOGETHER] or (checkpointing == "none" and not compile):
                yield Cell(layout, family, dtype, checkpointing, compile)


def refused(cell: Cell) -> list[str]:
    """Return why shoal rejects the cell; empty if it runs."""
    return list(refusals(cell.config(Path("unused")), cell.processes))


@cache
def legal() -> tuple[Cell, ...]:
    return tuple(cell for cell in cells() if not refused(cell))


@cache
def cover() -> tuple[Cell, ...]:
    """
    Return one plain cell of every layout, then cells for the remaining pairs of values, greedily by new pairs per cost.

    Deterministic; sorted by number of processes.
    """
    pairs = {cell: cell.pairs for cell in legal()}
    left = set().union(*pairs.values())
    chosen: list[Cell] = []

    def take(pool: Iterable[Cell]) -> None:
        best = max(pool, key=lambda cell: len(pairs[cell] & left) / cell.cost)  # the first if several are equal
        chosen.append(best)
        left.difference_update(pairs[best])

    for layout in dict.fromkeys(cell.layout for cell in legal()):
        take(cell for cell in legal() if cell.layout == layout and cell.plain)
    while left:
        take(legal())
    return tuple(sorted(chosen, key=lambda cell: (cell.processes, legal().index(cell))))


# Features for which the compiler generates the same code as for other features, which are tested compiled.
COMPILES_ALIKE = {"hsdp", "reshard over a number", "reshard never", "ulysses", "ring", "gpipe", "1f1b"}


@cache
def thin() -> tuple[Cell, ...]:
    """Return a few cells of `cover()` with each feature and value, also a compiled cell if it changes the generated code."""

    def new(cell: Cell) -> set[tuple[str, bool]]:
        return {(value, cell.compile) for value in cell.values - (COMPILES_ALIKE if cell.compile else set())}

    left = set().union(*map(new, cover()))
    chosen: list[Cell] = []
    while left:
        chosen.append(max(cover(), key=lambda cell: len(left & new(cell)) / cell.cost))
        left -= new(chosen[-1])
    return tuple(cell for cell in cover() if cell in chosen)


# Measurements.

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """Errors of a cell's first step, compared with one process in float32 without checkpointing and compile."""

    loss: float  # relative error
    norm: float  # relative error of the gradient norm that the step reports
    total: float  # relative error of the whole gradient
    worst: float  # largest relative error of a parameter's gradient, beyond 1e-8 of the whole gradient's norm
    parameter: str  # the parameter with that error
    # loss, norm and total of one process in the cell's precision: the error of rounding alone
    own_loss: float
    own_norm: float
    own_total: float
    same_bits: bool | None  # with train.repro bitwise: whether the bits equal those of `Setup.same_bits`


# float32 bounds on the relative error: of a parameter's gradient; of the loss and the norm
WORST, WORST_NUMBER = 3e-6, 1e-6
ROUNDING, SLACK = 1.5, 1e-3  # bfloat16 bounds: this factor times the error of one process, plus this constant


def problem(cell: Cell, found: Measured) -> str | None:
    """Return what is wrong with the measurements, or None. NaN is wrong."""
    if found.same_bits is False:
        return "not the bits that train.repro bitwise promises"
    if cell.dtype == "float32":
        checks = [
            (f"the gradient of {found.parameter}", found.worst, WORST),
            ("the loss", found.loss, WORST_NUMBER),
            ("the norm", found.norm, WORST_NUMBER),
        ]
    else:
        checks = [
            ("the whole gradient", found.total, ROUNDING * found.own_total + SLACK),
            ("the loss", found.loss, ROUNDING * found.own_loss + SLACK),
            ("the norm", found.norm, ROUNDING * found.own_norm + SLACK),
        ]
    wrong = [
        f"relative error {error:.1e} of {what}, allowed {most:.1e}" for what, error, most in checks if not error <= most
    ]
    return "; ".join(wrong) or None


class Bench:
    """Runs cells and their references. Caches the references; closes those of `worlds` that the cell does not need."""

    def __init__(self, folder: Path, worlds: Worlds) -> None:
        self._folder, self._worlds = folder, worlds
        self._found: dict[tuple[Any, ...], tuple[Step, Gradients]] = {}

    def run(self, cell: Cell) -> Measured:
        """Run the cell and return the measurements. Raises AssertionError if a process fails, TimeoutError if one hangs."""
        self._worlds.close(but=(1, cell.setup.same_bits.processes, cell.processes))
        step, grads = self._step(cell.processes, cell.config(self._folder))
        exact, wanted = self._kept(1, cell.family, cell.setup.alone | {"train__dtype": "float32"})
        own, rounded = self._kept(1, cell.family, cell.setup.alone | {"train__dtype": cell.dtype})
        assert grads.keys() == wanted.keys()
        norm = _norm(wanted.values())
        # A key's bias has gradient 0 up to rounding, since softmax does not depend on it.
        errors = {n: ((grads[n] - w).norm() - 1e-8 * norm).clamp(min=0) / w.norm() for n, w in wanted.items()}
        parameter = max(errors, key=lambda n: float(errors[n].nan_to_num(torch.inf)))
        same_bits = None
        if cell.setup.bitwise:
            same, same_grads = self._same_bits(cell)
            same_bits = (step.loss, step.norm) == (same.loss, same.norm)
            same_bits = same_bits and all(torch.equal(grads[n], w) for n, w in same_grads.items())
        return Measured(
            _relative(step.loss, exact.loss), _relative(step.norm, exact.norm), _difference(grads, wanted) / norm,
            float(errors[parameter]), parameter,
            _relative(own.loss, exact.loss), _relative(own.norm, exact.norm), _difference(rounded, wanted) / norm,
            same_bits,
        )  # fmt: skip

    def _same_bits(self, cell: Cell) -> tuple[Step, Gradients]:
        """Run the reference of the bitwise check. Without the compiler, it skips checkpointing, which then changes no bits."""
        setup = cell.setup.same_bits
        options = setup.options | {"train__dtype": cell.dtype}
        if cell.compile:
            options |= {"train__compile": True, "train__activation_checkpointing": cell.checkpointing}
        return self._kept(setup.processes, cell.family, options)

    def _kept(self, processes: int, family: str, options: dict[str, Any]) -> tuple[Step, Gradients]:
        key = (family, *sorted(options.items()))
        if key not in self._found:
            config = config_of(self._folder, f"beside-{len(self._found)}", family, train__device="cpu", **options)
            self._found[key] = self._step(processes, config)
        return self._found[key]

    def _step(self, processes: int, config: Config) -> tuple[Step, Gradients]:
        steps = self._worlds[processes].run(step_of, config)
        [_] = {(step.loss, step.norm) for step in steps}  # all ranks report the same
        return steps[0], whole([step.gradients for step in steps])


def step_of(mesh: Mesh, config: Config) -> Step:
    """Run `first_step` in a process after discarding all that it has compiled before."""
    if config.train.compile:
        import torch._functorch.config as functorch
        import torch._inductor.config as inductor
        from torch._dynamo.utils import counters

        inductor.compile_threads = 1  # no pool of compile processes in each worker
        functorch.activation_memory_budget = 1.0
        torch.compiler.reset()
        counters.clear()
    step = first_step(mesh, config)
    if config.train.compile:
        assert counters["stats"]["unique_graphs"], "nothing was compiled"
    return step


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def _difference(some: Gradients, others: Gradients) -> float:
    return _norm(some[name].double() - other for name, other in others.items())


def _relative(value: float, wanted: float) -> float:
    return abs(value - wanted) / abs(wanted)
