"""
Measure the goodput of a run whose workers are killed repeatedly: one SIGKILL per minute.

    python scripts/bench_goodput.py recipes/quickstart.yaml --kills 5
    python scripts/bench_goodput.py recipes/quickstart.yaml --kills 0 --hangs 3

Prints the seconds from each kill to the next step; from each hang (SIGSTOP) to its detection and to the next step; and from
the last signal (SIGTERM to one worker) to the end of all processes. Then prints `shoal goodput` and `shoal ledger`.
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
    """Return the recorded reason of each hang."""
    return [str(e["why"]) for e in read_json_lines(run / "events.jsonl") if e["event"] == "hang"]


def _has_hangs(run: Path, count: int) -> bool:
    return len(hangs(run)) >= count


def signal_one(number: signal.Signals, launcher: subprocess.Popen[bytes], draw: random.Random) -> float:
    """Send a signal to a random worker process; return the monotonic time in seconds."""
    draw.choice(psutil.Process(launcher.pid).children()).send_signal(number)
    return time.monotonic()


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> float:
    """Wait until `true()`; return the monotonic time in seconds."""
    while process.poll() is None:
        if true():
            return time.monotonic()
        time.sleep(0.02)
    raise SystemExit("the run ended early")


def wait_for_step(run: Path, known: int, process: subprocess.Popen[bytes]) -> float:
    """Wait until the run trains again: a resume and a step follow the first `known` lines of the ledger. Return the time."""
    return wait_until(lambda: ledger_lines(run) > known + 1, process)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--hangs", type=int, default=0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between faults")
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
        print(f"kill {number}: next step after {took[-1]:.1f} s, at step {last_step(run)}", flush=True)
    for number in range(1, options.hangs + 1):
        time.sleep(options.every)
        begun = signal_one(signal.SIGSTOP, process, draw)
        known = wait_until(functools.partial(_has_hangs, run, number), process) - begun
        trains = wait_for_step(run, ledger_lines(run), process) - begun
        print(
            f"hang {number}: detected after {known:.1f} s, next step after {trains:.1f} s:\n    {hangs(run)[-1]}",
            flush=True,
        )
    time.sleep(options.every)
    step = last_step(run)
    begun = signal_one(signal.SIGTERM, process, draw)
    code = process.wait()
    print(
        f"SIGTERM to one worker in step {step + 1}: saved at step {last_step(run)}, all processes ended after "
        f"{time.monotonic() - begun:.1f} s, exit code {code}"
    )
    if took:
        print(
            f"\nfrom a kill to the next step: median {statistics.median(took):.1f} s, {min(took):.1f} to {max(took):.1f}\n"
        )
    subprocess.run([*shoal, "goodput", str(run)], check=True)
    subprocess.run([*shoal, "ledger", str(run)], check=True)


if __name__ == "__main__":
    main()
