"""
Measures a report of many runs: `python scripts/bench_report.py [--runs 50] [--steps 100000] [--plants 20]`.

Plants spikes of one step at random in random runs, draws all runs at once, and reads back the pixels of each spike at every
zoom from all steps to a few. Prints the report's size and time, and each spike that was not seen.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.report.browser import Visit, open_browser, visit

from shoal.config.options import Config
from shoal.report.page.html import report_html
from shoal.run.folder import RunFolder

TOKENS = 8192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--plants", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    plants = [
        (int(random.integers(args.runs)), int(random.integers(args.steps // 50, args.steps)), random.uniform(5, 12))
        for _ in range(args.plants)
    ]
    with tempfile.TemporaryDirectory() as folder:
        runs = [
            _make(Path(folder) / f"run-{i:02}", args.steps, i, [p for p in plants if p[0] == i])
            for i in range(args.runs)
        ]
        page = Path(folder) / "report.html"
        for name in ("first", "again"):
            began, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
            page.write_bytes(report_html(runs))
            used = resource.getrusage(resource.RUSAGE_SELF).ru_utime - cpu
            print(
                f"report, {name}: {time.perf_counter() - began:.2f} s ({used:.2f} s of one core), {page.stat().st_size / 1e6:.2f} MB"
            )
        missed = _look(page, args.steps, plants)
    print(f"{len(plants)} spikes, {missed} views in which one was not seen")
    return int(missed > 0)


def _make(folder: Path, steps: int, seed: int, plants: list[tuple[int, int, float]]) -> Path:
    """Write a run whose log has the loss and the time of each step."""
    folder.mkdir()
    RunFolder(folder).save_config(Config().replace("train", steps=steps).replace("optim", lr=1e-4 * (1 + seed)))
    random = np.random.default_rng(seed)
    loss = 2 + 0.01 * seed + 6 * np.arange(1, steps + 1) ** -0.4 + random.normal(0, 0.02, steps)
    for _, step, value in plants:
        loss[step - 1] = value
    with (folder / "metrics.jsonl").open("w") as file:
        for i, value in enumerate(loss.tolist(), 1):
            line = {"step": i, "tokens": i * TOKENS, "loss": round(value, 5), "lr": 1e-4, "grad_norm": 1.0, "tokens_per_second": 3e4, "step_seconds": 0.25, "mfu": None, "memory_bytes": 1}  # fmt: skip
            file.write(json.dumps(line) + "\n")
    return folder


def _look(page: Path, steps: int, plants: list[tuple[int, int, float]]) -> int:
    missed = 0
    with open_browser() as browser:
        began = time.perf_counter()
        with visit(browser, page) as found:
            print(f"all curves drawn {time.perf_counter() - began:.2f} s after the file was opened")
            paint = found.page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime")
            print(f"first paint after {paint / 1000:.2f} s")
            for _, step, value in plants:
                missed += sum(not _is_seen(found, steps, width, step, value) for width in _widths(steps))
            for problem in found.problems:
                print(f"console: {problem}")
    return missed


def _widths(steps: int) -> list[int]:
    widths = [steps]
    while widths[-1] > 16:
        widths.append(widths[-1] // 3)
    return widths


def _is_seen(found: Visit, steps: int, width: int, step: int, value: float) -> bool:
    first = max(0, step - width // 3)
    found.zoom(first, first + width)
    share = found.rows_with_ink(0, step, 2.0 + (value - 2.0) * 0.35, value)
    if share < 0.95:
        print(f"not seen: step {step}, {width} steps shown, {share:.0%} of its height")
    return share >= 0.95


if __name__ == "__main__":
    sys.exit(main())
