"""
Goodput of a run whose workers are killed again and again: a small model, a SIGKILL to one of them every minute.

    python scripts/bench_goodput.py recipes/quickstart.yaml --kills 5

Prints what `shoal goodput` says in the end, and how long each kill took until the next step.
"""

from __future__ import annotations

import argparse
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

from shoal.metrics.trackers import read_json_lines


def last_step(run: Path) -> int:
    records = read_json_lines(run / "ledger.jsonl")
    return max((int(r["step"]) for r in records if "step" in r), default=0)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes]) -> float:
    """When the file has more lines than `count`."""
    while process.poll() is None:
        if path.is_file() and path.read_bytes().count(b"\n") > count:
            return time.monotonic()
        time.sleep(0.02)
    raise SystemExit("the run ended early; give it more --steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--every", type=float, default=60.0, help="seconds from a kill to the next")
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("build/goodput"))
    options = parser.parse_args()
    shoal = [sys.executable, "-m", "shoal"]
    run = options.runs / f"kills-{int(time.time())}"
    command = [*shoal, "train", str(options.recipe), "--name", run.name, "--launch.runs", str(options.runs)]
    command += ["--train.steps", "100000", "--checkpoint.every", str(options.save_every), "--train.eval_every", "0"]
    command += ["--processes", str(options.processes), "--metrics.every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    draw, ledger, took = random.Random(options.seed), run / "ledger.jsonl", []
    wait_for_lines(ledger, 1, process)
    for number in range(options.kills):
        time.sleep(options.every)
        victim = draw.choice(psutil.Process(process.pid).children())
        lines = ledger.read_bytes().count(b"\n")
        begun = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        took.append(wait_for_lines(ledger, lines + 1, process) - begun)  # a line that it goes on, and a step's
        print(f"kill {number + 1}: the next step after {took[-1]:.1f} s, at step {last_step(run)}", flush=True)
    time.sleep(options.every)
    process.send_signal(signal.SIGTERM)
    process.wait()
    print(
        f"\nfrom a kill to the next step: median {statistics.median(took):.1f} s, {min(took):.1f} to {max(took):.1f}\n"
    )
    subprocess.run([*shoal, "goodput", str(run)], check=True)
    subprocess.run([*shoal, "ledger", str(run)], check=True)


if __name__ == "__main__":
    main()
