"""
Goodput of a run whose workers are killed again and again: a small model, a SIGKILL to one of them every minute.

    python scripts/bench_goodput.py recipes/quickstart.yaml --kills 5
    python scripts/bench_goodput.py recipes/quickstart.yaml --kills 0 --hangs 3

Prints how long each kill took until the next step, each hang (a SIGSTOP) until it was found and until the next step, and
the last signal (a SIGTERM, to one worker) until all was saved; then what `shoal goodput` says.
"""

from __future__ import annotations

import argparse
import functools
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from shoal.run.events import read_json_lines


def last_step(run: Path) -> int:
    records = read_json_lines(run / "ledger.jsonl")
    return max((int(r["step"]) for r in records if "step" in r), default=0)


def ledger_lines(run: Path) -> int:
    path = run / "ledger.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def hangs(run: Path) -> list[str]:
    """What was said of each."""
    return [str(e["why"]) for e in read_json_lines(run / "events.jsonl") if e["event"] == "hang"]


def _has_hangs(run: Path, count: int) -> bool:
    return len(hangs(run)) >= count


def signal_one(number: signal.Signals, launcher: subprocess.Popen[bytes], draw: random.Random) -> float:
    """To a worker by chance; when."""
    draw.choice(psutil.Process(launcher.pid).children()).send_signal(number)
    return time.monotonic()


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> float:
    """When it is, in seconds of the monotonic clock."""
    while process.poll() is None:
        if true():
            return time.monotonic()
        time.sleep(0.02)
    raise SystemExit("the run ended early")


def wait_for_step(run: Path, known: int, process: subprocess.Popen[bytes]) -> float:
    """When it trains again: after `known` lines of the ledger there is one that it goes on, and one of a step."""
    return wait_until(lambda: ledger_lines(run) > known + 1, process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--hangs", type=int, default=0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds from a fault to the next")
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
    draw = random.Random(options.seed)
    wait_until(lambda: ledger_lines(run) > 1, process)
    took = []
    for number in range(1, options.kills + 1):
        time.sleep(options.every)
        lines = ledger_lines(run)
        begun = signal_one(signal.SIGKILL, process, draw)
        took.append(wait_for_step(run, lines, process) - begun)
        print(f"kill {number}: the next step after {took[-1]:.1f} s, at step {last_step(run)}", flush=True)
    for number in range(1, options.hangs + 1):
        time.sleep(options.every)
        begun = signal_one(signal.SIGSTOP, process, draw)
        known = wait_until(functools.partial(_has_hangs, run, number), process) - begun
        trains = wait_for_step(run, ledger_lines(run), process) - begun
        print(
            f"stop {number}: known after {known:.1f} s, the next step after {trains:.1f} s:\n    {hangs(run)[-1]}",
            flush=True,
        )
    time.sleep(options.every)
    step = last_step(run)
    begun = signal_one(signal.SIGTERM, process, draw)
    code = process.wait()
    print(
        f"asked to stop, one worker, in step {step + 1}: saved at step {last_step(run)}, {time.monotonic() - begun:.1f} s to "
        f"the end of all processes, exit code {code}"
    )
    if took:
        print(
            f"\nfrom a kill to the next step: median {statistics.median(took):.1f} s, {min(took):.1f} to {max(took):.1f}\n"
        )
    subprocess.run([*shoal, "goodput", str(run)], check=True)
    subprocess.run([*shoal, "ledger", str(run)], check=True)


if __name__ == "__main__":
    main()
