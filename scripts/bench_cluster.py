#!/usr/bin/env python
"""
Measure on the tests' real Slurm how long a job takes to start its first worker, and to save after a signal.

    python scripts/bench_cluster.py --repeats 5

All nodes share this machine's cores, so launchers that import torch at the same time slow each other. Needs root, Linux
namespaces and Slurm: scripts/install_slurm.sh.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.cluster.bed import NODES, Bed, lacking
from tests.cluster.training import Training, is_train

from shoal.run.records import read_metrics

WATCH_SECONDS = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if why := lacking():
        print(why, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="shoal-bed-") as place, Bed(Path(place)) as bed:
        for nodes in (1, 2):
            found = [measure(bed, f"{nodes}-{number}", nodes) for number in range(options.repeats)]
            medians = {name: statistics.median(each[name] for each in found) for name in found[0]}
            print(f"{nodes} node{'s' * (nodes > 1)}, medians of {options.repeats}, in seconds:", flush=True)
            for name, seconds in medians.items():
                values = sorted(each[name] for each in found)
                print(f"  {name:<45} {seconds:6.2f}  ({values[0]:.2f} to {values[-1]:.2f})", flush=True)
    return 0


def measure(bed: Bed, name: str, nodes: int) -> dict[str, float]:
    """Run one job and signal it; return what took how many seconds."""
    training = Training(bed, bed.shared / name)
    before = set(psutil.pids())
    job = training.launch(f"--nodes={nodes}")
    begun: dict[str, float] = {}
    while "worker" not in begun:
        for kind, at in started(before).items():
            begun.setdefault(kind, at)
        time.sleep(WATCH_SECONDS)
    training.until_step(20, job)
    signaled = time.time()
    bed.run("scancel", "--signal=USR2", "--batch", job)
    training.until(lambda: bool(training.events("stopped")), job)
    [stopped] = training.events("stopped")
    steps = read_metrics(training.run.metrics_file).steps
    bed.run("scancel", job)
    bed.heal()
    torch_seconds = import_torch(bed, nodes)
    return {
        "from the job's script to the first worker": begun["worker"] - begun["script"],
        "an import of torch on as many nodes at once": torch_seconds,
        "the difference": begun["worker"] - begun["script"] - torch_seconds,
        "from the signal to the end of the save": stopped["time"] - signaled,
        "a step": statistics.median(step.step_seconds for step in steps),
        "a save": training.events("saved")[-1]["seconds"],
    }


def import_torch(bed: Bed, nodes: int) -> float:
    """Return the longest time of an import of torch on `nodes` nodes at once."""
    code = "import time; begun = time.time(); import torch; print(time.time() - begun)"
    processes = [bed.hosts[name].start(sys.executable, "-c", code) for name in NODES[:nodes]]
    return max(float(process.communicate()[0]) for process in processes)


def started(before: set[int]) -> dict[str, float]:
    """Return when the job's script and its first worker began, as far as they run. before: processes of others."""
    found: dict[str, float] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid in before:
                continue
            if any("slurm_script" in word for word in process.cmdline()):
                found["script"] = process.create_time()
            elif is_train(process) and is_train(psutil.Process(process.ppid())):
                found["worker"] = min(process.create_time(), found.get("worker", float("inf")))
    return found


if __name__ == "__main__":
    sys.exit(main())
