"""
Measure the dashboard in a real browser: `python scripts/bench_page.py [--runs 50] [--steps 100000] [--ranks 1024]`.

Writes synthetic runs, starts `shoal dashboard` and opens it in headless Chromium, several times with warm caches and once
without. Times are in milliseconds from the start of the navigation, as the page's own clock has them:

    frame     first contentful paint: the header of the page
    list      the list of runs is there
    curves    the loss curves of all runs are drawn
    all       every chart is drawn
    cpu_list, cpu_curves  processor time that browser and server took until then, together: what does not depend on other load

Needs shoal[dashboard] and playwright. --keep DIR keeps the runs for the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
from playwright.sync_api import Browser, sync_playwright
from tests.report.synthetic import losses, write_ranks, write_run

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LISTED = "() => typeof page !== 'undefined' && page.list"
LOSS_DRAWN = "runs => typeof page !== 'undefined' && page.charts[0] && page.charts[0].drawn.filter(c => c.name === 'loss').length >= runs"
ALL_DRAWN = "() => page.charts.every(chart => chart.uplot || chart.element.classList.contains('empty'))"


def processor() -> str:
    """Return the processor's model and the number of cores."""
    found = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    model = re.search(r"Model name:\s*(.*)", found)
    cores = re.search(r"^CPU\(s\):\s*(\d+)", found, re.MULTILINE)
    return f"{model[1] if model else platform.processor()}, {cores[1] if cores else '?'} cores"


def write_runs(folder: Path, runs: int, steps: int) -> None:
    """Write runs that differ in their losses; all else is written once, since formatting numbers takes most of the time."""
    first = write_run(folder / "run-00", steps, seed=0)
    lines = [re.split(r'(?<="loss":)[^,]*', line) for line in first.metrics_file.read_text().splitlines(keepends=True)]
    for number in range(1, runs):
        run = write_run(folder / f"run-{number:02}", 10, seed=number, options={"train.steps": str(steps)})
        values = iter(losses(steps, seed=number, final=3 + number / 50).tolist())
        text = "".join(repr(next(values)).join(parts) if len(parts) == 2 else parts[0] for parts in lines)
        run.metrics_file.write_text(text)
        for name in ("events.jsonl", "time.jsonl"):
            shutil.copy(folder / "run-00" / name, run.path / name)


@contextlib.contextmanager
def dashboard(folder: Path) -> Iterator[str]:
    """Start a dashboard; yield its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "dashboard", str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield next(found[0] for line in process.stdout if (found := re.search(r"http://\S+", line)))
    finally:
        process.terminate()
        process.wait()


def spent() -> float:
    """Return the milliseconds of processor time that this process's children took so far: the server and the browser."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(child.cpu_times()[:2])
    return 1000 * total


def measure(browser: Browser, address: str, runs: int) -> dict[str, float]:
    """Open the page; return the milliseconds until each thing is shown, and the bytes of all answers."""
    tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    before = spent()
    tab.goto(address, wait_until="commit")
    tab.wait_for_function(
        "() => performance.getEntriesByName('first-contentful-paint').length", polling="raf", timeout=300_000
    )
    tab.wait_for_function(LISTED, polling="raf", timeout=300_000)
    listed = tab.evaluate("performance.now()")
    cpu_list = spent() - before
    tab.wait_for_function(LOSS_DRAWN, arg=runs, polling="raf", timeout=300_000)
    curves = tab.evaluate("performance.now()")
    cpu_curves = spent() - before
    tab.wait_for_function(ALL_DRAWN, polling="raf", timeout=300_000)
    every = tab.evaluate("performance.now()")
    painted = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    size = tab.evaluate(
        "performance.getEntriesByType('navigation').concat(performance.getEntriesByType('resource'))"
        ".map(e => e.transferSize).reduce((a, b) => a + b)"
    )
    page = tab.evaluate("performance.getEntriesByType('navigation')[0].transferSize")
    tab.context.close()
    cpu = {"cpu_list": cpu_list, "cpu_curves": cpu_curves}
    return (
        {"frame": painted, "list": listed, "curves": curves, "all": every}
        | cpu
        | {"page_kB": page / 1000, "answers_kB": size / 1000}
    )


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(each[name] for each in found), 1) for name in found[0]}


def measure_runs(browser: Browser, folder: Path, runs: int, repeats: int) -> dict[str, Any]:
    """Measure a dashboard without caches, then with them."""
    for cache in folder.glob("*/cache"):
        shutil.rmtree(cache)
    with dashboard(folder) as address:
        cold = measure(browser, address, runs)
    warm = []
    for _ in range(repeats):
        with dashboard(folder) as address:
            warm.append(measure(browser, address, runs))
        time.sleep(0.5)
    return {"cold": {name: round(value, 1) for name, value in cold.items()}, "warm": medians(warm)}


def main() -> None:
    """Write the runs, measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp())
    try:
        if not (folder / "many").is_dir():
            write_runs(folder / "many", args.runs, args.steps)
            large = write_run(folder / "ranks" / "large", 100_000, seed=1)
            write_ranks(
                large.ranks_file, 100_000, args.ranks, seed=1, slow={args.ranks // 3: "backward"}, slow_from=40_000
            )
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            found = {
                "processor": processor(),
                f"{args.runs} runs of {args.steps} steps": measure_runs(
                    browser, folder / "many", args.runs, args.repeats
                ),
                f"{args.ranks} ranks": measure_runs(browser, folder / "ranks", 1, args.repeats),
            }
        print(json.dumps(found, indent=2))
    finally:
        if not args.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
