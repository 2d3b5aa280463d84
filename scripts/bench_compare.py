"""
Measure how often `shoal compare` is wrong, on simulated runs with the noise of real ones: `python scripts/bench_compare.py`.

False alarms: of pairs with the same config and different seeds, how many are called different at its 1% level. Power: how
often a true difference of 1% is found. All draws have fixed seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.report.compare.simulated import REAL, Noise, run

from shoal.report.compare.comparison import SEED_NOISE, Comparison, Measure, compare_series

Draw = Callable[[np.random.Generator], Comparison]


def against(count: int, noise: Noise, better: float = 0.0, *, paired: bool = False, evaluated: bool = True) -> Draw:
    """Return a function that compares `count` seeds with as many others, or the same if `paired`, with a lower loss."""

    def draw(draws: np.random.Generator) -> Comparison:
        number = int(draws.integers(1 << 30))
        seeds = range(count), range(count) if paired else range(count, 2 * count)
        a, b = (
            [
                run(draws, seed=s, noise=noise, better=x, batches=number + s if paired else None, evaluated=evaluated)
                for s in each
            ]
            for each, x in zip(seeds, (0.0, better), strict=True)
        )
        return compare_series(a, b)

    return draw


def count(title: str, draw: Draw, draws: int) -> None:
    """Print how many draws are called different, in loss and in speed."""
    generator = np.random.default_rng(15)
    found = [draw(generator) for _ in range(draws)]
    loss, speed = sum(differs(c.loss) for c in found), sum(differs(c.measures[-1]) for c in found)
    print(f"  {title:68} loss {loss:5} speed {speed:4} of {draws}", flush=True)


def differs(measure: Measure) -> bool:
    """Return whether a measure is called different."""
    return measure.difference is not None and measure.difference.is_real


def main() -> None:
    """Print a line for each experiment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1000)
    draws = parser.parse_args().draws
    bound = dataclasses.replace(REAL, seed=SEED_NOISE, drift=0.0)
    quiet = dataclasses.replace(REAL, seed=0.0025, drift=0.0005)
    print("same config, different seeds: called different (false alarms)")
    count("one run against one, noise of real logs", against(1, REAL), draws)
    count("the same, without held-out loss", against(1, REAL, evaluated=False), draws)
    count("the same, seed noise as large as the assumed bound", against(1, bound), draws)
    count("five against five", against(5, REAL), draws)
    count("five against five, the same seeds and data", against(5, REAL, paired=True), draws)
    count("the same, without held-out loss", against(5, REAL, paired=True, evaluated=False), draws)
    print("loss truly lower by 1%: found")
    count("five against five, seed noise 0.25%", against(5, quiet, 0.01), draws)
    count("five against five, the same seeds and data, seed noise 0.25%", against(5, quiet, 0.01, paired=True), draws)
    count("five against five, seed noise 0.75%", against(5, REAL, 0.01), draws)
    count("one run against one, seed noise 0.25%", against(1, quiet, 0.01), draws)


if __name__ == "__main__":
    main()
