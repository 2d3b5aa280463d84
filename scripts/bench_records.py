"""
Measure what a run's records cost a step: steps that are recorded in full, alternating with steps that are not.

    python scripts/bench_records.py recipes/quickstart.yaml --pairs 200

recorded: the step has a spike score, sends its memory and busy times to `ranks.jsonl` (here after every step, usually after
every `metrics.split_every` steps), and tells `now.json`. not: the same step without these. Time is the CPU time of the
training thread, which other programs on the machine hardly affect. Exits with 1 if the ratio of the medians exceeds
--most.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from shoal.elastic.heartbeat import Heartbeat
from shoal.mesh.mesh import open_mesh
from shoal.resolve.resolve import resolve
from shoal.run.now import TRAINING, Now
from shoal.system.signals import StopRequest
from shoal.training.guard import RECENT
from shoal.training.loop import record, take_step
from shoal.training.run import Run


def _seconds(run: Run, now: Now, *, recorded: bool) -> float:
    """Return the seconds of one step."""
    run.watch.by_rank._measures = lambda step: recorded
    run.guard.score = type(run.guard).score.__get__(run.guard) if recorded else lambda step, loss: None  # type: ignore[method-assign]
    begun = time.thread_time()
    if recorded:
        now.say(TRAINING, run.state.step)
    record(run, take_step(run))
    return time.thread_time() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument(
        "--most", type=float, default=1.02, help="largest ratio of a recorded step's time to another one's"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    took: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as runs:
        wanted = {"launch.runs": runs, "launch.name": "bench", "train.steps": "1000000", "metrics.every": "1"}
        config = resolve(options.recipe, [(key, value, f"--{key}") for key, value in wanted.items()]).config
        with open_mesh("cpu", 600.0, config.parallel) as mesh:
            run = Run.open(config, mesh, StopRequest(), Heartbeat.open(config.launch))
            run.files.begin(run.header, 0, 0, {}, at_end=False)
            run.guard.losses.extend((-step, 3.0 + step % 7) for step in range(RECENT, 0, -1))
            now = Now(run.folder.now_file)
            for pair in range(-3, options.pairs):
                for recorded in (True, False) if pair % 2 else (False, True):
                    seconds = _seconds(run, now, recorded=recorded)
                    if pair >= 0:
                        took[recorded].append(seconds)
            now.close()
            run.close()
    whole, bare = (1e3 * statistics.median(took[recorded]) for recorded in (True, False))
    differ = 1e3 * statistics.median(a - b for a, b in zip(took[True], took[False], strict=True))
    print(
        f"recorded {whole:.3f} ms, not {bare:.3f} ms: ratio {whole / bare:.4f}, median difference {1e3 * differ:.0f} us"
    )
    return int(whole / bare > options.most)


if __name__ == "__main__":
    sys.exit(main())
