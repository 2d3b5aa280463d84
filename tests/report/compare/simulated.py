"""
Simulated runs whose noise is like that of real ones.

The logarithm of a loss is a falling curve, plus: noise of steps, AR(1); a slow drift; an offset of the seed. Runs with the same
seed and data share part of the steps' noise, since they read the same batches. Measured on ten runs of `shoal train` (5 seeds
each at two learning rates, 100 steps): steps 4.4%, seed 0.3% to 1.1%, and steps of a pair with the same seed differ by 1.7%.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from shoal.report.compare.series import Array, Series
from shoal.report.runs.facts import RunFacts
from shoal.run.folder import RunFolder
from shoal.run.records import Evaluation


@dataclass(frozen=True)
class Noise:
    """Standard deviations of log loss; `follows` is the AR(1) coefficient, `shared` the part of a step's variance from its batch."""

    steps: float = 0.044
    follows: float = 0.3
    shared: float = 0.85
    drift: float = 0.003
    seed: float = 0.0075
    speed: float = 0.03


REAL: Final = Noise()
OPTIONS: Final[dict[str, Any]] = {"train.seed": 0, "optim.lr": 1e-3, "data.corpus": "text", "train.global_batch": 8}


def ar1(draws: np.random.Generator, n: int, follows: float) -> Array:
    """Return n values of an AR(1) process with standard deviation 1."""
    shocks: Array = draws.standard_normal(n) * np.sqrt(1 - follows**2)
    shocks[0] = draws.standard_normal()
    for i in range(1, n):
        shocks[i] += follows * shocks[i - 1]
    return shocks


def run(
    draws: np.random.Generator, *, seed: int = 0, steps: int = 400, better: float = 0.0, noise: Noise = REAL,
    name: str = "run", batches: int | None = None, evaluated: bool = True, **options: Any,
) -> Series:  # fmt: skip
    """
    Return a simulated run.

    better: its loss is lower by this fraction. batches: a seed of the noise that runs with the same batches share.
    """
    at = np.arange(1, steps + 1)
    own = ar1(draws, steps, noise.follows)
    common = ar1(draws if batches is None else np.random.default_rng(batches), steps, noise.follows)
    walk = np.cumsum(draws.standard_normal(steps)) / np.sqrt(steps)
    level: Array = np.log(2.5 + 3 * np.exp(-at / 60)) + np.log1p(-better)
    level += noise.seed * draws.standard_normal() + noise.drift * walk
    log: Array = level + noise.steps * (np.sqrt(1 - noise.shared) * own + np.sqrt(noise.shared) * common)
    held_out = Evaluation(step=steps, tokens=steps * 1024, val_loss=float(np.exp(level[-1])), val_bits_per_byte=1.0)
    speed: Array = 1e5 * np.exp(noise.speed * ar1(draws, steps, 0.8))
    return Series(
        facts(name, OPTIONS | {"train.seed": seed} | options), at.astype(float), (1024.0 * at).astype(float), np.asarray(np.exp(log)), np.ones(steps),
        speed, 1024 / speed, (held_out,) if evaluated else (),
    )  # fmt: skip


def facts(name: str, options: dict[str, Any]) -> RunFacts:
    """Return the facts of a finished run with these options."""
    empty: dict[str, Any] = {f.name: None for f in dataclasses.fields(RunFacts)}
    known: dict[str, Any] = {"folder": RunFolder(Path(name)), "state": "finished", "event": {}, "options": options}
    return RunFacts(**(empty | known))


def group(draws: np.random.Generator, seeds: range, *, paired: bool = False, **more: Any) -> list[Series]:
    """Return a run for each seed. paired: whether runs of another group with the same seeds read the same batches."""
    return [run(draws, seed=s, name=f"run{s}", batches=1000 + s if paired else None, **more) for s in seeds]
