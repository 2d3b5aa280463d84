"""
Measure what a log call costs the trainer: `python scripts/bench_trackers.py [--steps 2000] [--trackers wandb,comet,mlflow]`.

Writes the records of a run as the training loop does, in two runs that alternate, step by step: one without trackers and one
with three, of which MLflow's server is a black hole: it accepts connections and never answers. Between two steps the trainer
sleeps, as one that waits for its device; so the trackers' processes compete for the cores. Prints the median and the quartiles
of a call, and the CPU's model.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from shoal.config.options import Config
from shoal.config.track_options import Track
from shoal.run.console import Console
from shoal.run.folder import RunFolder
from shoal.run.records import MetricsFile, StepRecord
from shoal.system.cpu import count_cores
from shoal.training.run_files import RunFiles

WANTED_MS = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="log calls of each run (default: 2000)")
    parser.add_argument("--pause-ms", type=float, default=5.0, metavar="T", help="between two steps (default: 5)")
    parser.add_argument(
        "--trackers", default="wandb,comet,mlflow", metavar="NAMES", help="trackers (default: wandb,comet,mlflow)"
    )
    asked = parser.parse_args()
    os.environ["MLFLOW_TRACKING_URI"] = black_hole()
    for key in ("WANDB_API_KEY", "COMET_API_KEY"):
        os.environ.pop(key, None)  # these two then write offline
    with tempfile.TemporaryDirectory() as folder:
        track = Track(to=tuple(asked.trackers.split(",")), close_seconds=5)
        files = {
            "no tracker": opened(Path(folder) / "without", Track()),
            asked.trackers: opened(Path(folder) / "with", track),
        }
        took = measure(files, asked.steps, asked.pause_ms / 1000)
        for each in files.values():
            each.close()
    print(f"\n{cpu_model()}, {count_cores()} cores, Python {platform.python_version()}")
    for name, seconds in took.items():
        low, middle, high = (1000 * quarter for quarter in statistics.quantiles(seconds, n=4))
        print(f"{name}: a log call takes {middle:.4f} ms (quartiles {low:.4f} and {high:.4f}), of {len(seconds):,}")
    median = 1000 * statistics.median(took[asked.trackers])
    print(f"{'below' if median < WANTED_MS else 'NOT below'} {WANTED_MS} ms")
    return int(median >= WANTED_MS)


def opened(path: Path, track: Track) -> RunFiles:
    """Open a run's files for log calls, and start its trackers."""
    folder = RunFolder(path)
    files = RunFiles(folder, Console(), writes=True)
    folder.save_config(Config().replace("launch", name=path.name))
    files._metrics = MetricsFile(folder.metrics_file)
    files.event("started", step=0, processes=1)
    files.track(track)
    return files


def measure(files: dict[str, RunFiles], steps: int, pause: float) -> dict[str, list[float]]:
    """Return the seconds of each log call of each run."""
    took: dict[str, list[float]] = {name: [] for name in files}
    for step in range(1, steps + 1):
        names: Sequence[str] = list(files) if step % 2 else list(reversed(files))
        for name in names:
            time.sleep(pause)
            record = line(step)
            begun = time.perf_counter()
            files[name].metrics(record)
            took[name].append(time.perf_counter() - begun)
    return took


def line(step: int) -> StepRecord:
    phases = dict.fromkeys(("step", "data", "forward", "backward", "reduce", "optimizer"), 0.01)
    return StepRecord(
        step=step, tokens=512 * step, time=time.time(), loss=4 / step, lr=1e-3, grad_norm=1.0, tokens_per_second=1e4,
        step_seconds=0.05, mfu=0.3, memory_bytes=1 << 30, split_seconds=phases if step % 10 == 0 else None,
    )  # fmt: skip


def black_hole() -> str:
    """Open a port that accepts connections and never answers; return its address."""
    server = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            held.append(server.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}"


def cpu_model() -> str:
    """Return the CPU's model, as Linux calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((text.partition(":")[2].strip() for text in lines if text.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
