"""
Draw models and layouts, run their steps for real on gloo, and compare memory and time with what `shoal plan` predicts.

    python scripts/check_plan.py [--count 200] [--seed TEXT]

The cases follow from the seed, by default the commit, so that no version of the code was tuned for them. Memory is the peak of the events of torch's own
allocator, of the rank that needs the most; time is the median step of the slowest rank. Rates come from `shoal plan --calibrate`,
which is run first if this machine was not measured with 1, 2 and 4 processes. Each case is a line of build/check_plan.jsonl, so
that a stopped run resumes; remove that file to start over. The summary goes to docs/benchmarks/plan.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported and workers start: as shoal's launcher sets them
os.environ["MALLOC_MMAP_THRESHOLD_"] = str(4 * 2**30)
os.environ["MALLOC_TRIM_THRESHOLD_"] = str(16 * 2**30)
os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler says on stderr when it starts and stops
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tests.parallel.layouts import NeverStop, mesh_for
from tests.world import Worlds

from shoal.bench.calibrate import calibrate
from shoal.bench.environment import describe
from shoal.config.data_options import Data
from shoal.config.layout import Layout, find_layout
from shoal.config.options import Config, Model, Optim, Parallel, Train
from shoal.config.presets import resolve_shape
from shoal.config.run_options import Launch, Metrics
from shoal.mesh.mesh import Mesh
from shoal.metrics.allocated import most_alive
from shoal.plan.fits import layouts, need_of
from shoal.plan.machine import Machine, machine_of
from shoal.plan.speed.calibration import Calibration, kept_file, load
from shoal.plan.speed.corrections import Corrections, Interval, Seen
from shoal.plan.speed.rates import Rates
from shoal.plan.speed.seconds import idle_share, step_seconds
from shoal.run.console import Console
from shoal.run.narrator import Narrator
from shoal.system.cpu import count_cores, model_name
from shoal.training.loop import take_step
from shoal.training.run import Run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "check_plan.jsonl"
PAGE = ROOT / "docs" / "benchmarks" / "plan.md"
COUNTS = (1, 2, 4)  # processes
LONGEST = 0.6  # predicted seconds of a step; more would take the script too long
STEPS = 7  # timed in each case, after two others


def machine_with(processes: int) -> Machine:
    found = machine_of("", processes, 1, 8 * 2**30, cuda=False)
    assert found is not None
    return found


def draw(rng: random.Random, folder: Path) -> tuple[Config, Layout]:
    """Return a small config in one of its layouts on 1, 2 or 4 processes."""
    while True:
        family: Any = rng.choice(("llama", "gpt2"))
        head_dim, heads = rng.choice((32, 64)), rng.choice((4, 6, 8, 12))
        fewer = [h for h in (1, 2, 4, heads) if heads % h == 0]
        model = Model(
            family=family, dim=head_dim * heads, num_layers=rng.randint(4, 9), num_heads=heads, max_seq_len=2048,
            num_kv_heads=rng.choice(fewer) if family == "llama" else None, vocab_size=rng.choice((512, 2048, 8192)),
            tie_embeddings=family == "gpt2" or rng.random() < 0.5,
        )  # fmt: skip
        micro = rng.choice((1, 2, 4, 8))
        config = Config(
            model=resolve_shape(model),
            data=Data(
                corpus="dummy", dummy_documents=400, tokenizer="bytes", seq_len=rng.choice((64, 128, 256, 512)),
                document_mask=rng.random() < 0.3, folder=str(folder / "data"),
            ),
            optim=Optim(lr=1e-4, warmup_steps=0),
            train=Train(
                steps=1000, global_batch=micro * rng.choice((4, 8)), micro_batch=micro, dtype="float32", device="cpu",
                activation_checkpointing=rng.choice(("none", "none", "selective", "full")),
            ),
            parallel=Parallel(pp_schedule=rng.choice(("1f1b", "gpipe", "interleaved_1f1b")), cp_method=rng.choice(("allgather", "ulysses"))),
            metrics=Metrics(peak_tflops=1.0),
            launch=Launch(runs=str(folder / "runs"), name=f"case{rng.random()}", processes=1),
        )  # fmt: skip
        legal = list(layouts(config, machine_with(rng.choice(COUNTS))))
        if legal:
            changed, layout = rng.choice(legal)
            rates = Rates(machine_with(layout.world_size), 4)
            need = need_of(changed, layout, cuda=False)
            if sum(step_seconds(need.works, layout, idle_share(need), rates).values()) < LONGEST:
                return changed, layout


def measured(mesh: Mesh, config: Config, threads: int) -> tuple[int, float]:
    """Return, in a worker: the most bytes alive in a step, and the median seconds of a step."""
    torch.set_num_threads(threads)
    runs: list[Run] = []

    def open_run() -> None:
        runs.append(Run.open(config, mesh_for(mesh, config.parallel), NeverStop()))
        take_step(runs[0])

    most = most_alive(open_run, lambda: take_step(runs[0]))
    run, times = runs[0], []
    for _ in range(STEPS + 1):
        run.mesh.barrier()
        begun = time.perf_counter()
        take_step(run).read()
        times.append(time.perf_counter() - begun)
    run.close()
    return most, statistics.median(times[1:])


def calibrated() -> Calibration:
    """Return this machine's calibration, and measure it if it lacks a number of processes."""
    path = kept_file(model_name())
    if path.is_file() and {s.processes for s in load(path).settings if s.dtype == "float32"} >= set(COUNTS):
        return load(path)
    console = Console(on_stderr=True)
    for count in COUNTS:
        found = calibrate(20.0, count, "float32", Narrator.of(console), console.warn)
        (found.joined(load(path)) if path.is_file() else found).save(path)
    return load(path)


def run_case(worlds: Worlds, config: Config, layout: Layout, calibration: Calibration) -> dict[str, Any]:
    """Run one case; return its line."""
    processes = layout.world_size
    found = worlds[processes].run(measured, config, max(1, count_cores() // processes))
    need = need_of(config, layout, cuda=False)
    rates = calibration.rates(machine_with(processes), "float32")
    assert rates is not None
    parts = step_seconds(need.works, layout, idle_share(need), rates)
    return {
        "layout": str(layout), "processes": processes, "family": config.model.family,
        "checkpointing": config.train.activation_checkpointing, "width": config.model.dim,
        "bytes": max(most for most, _ in found), "predicted_bytes": need.total,
        "seconds": max(seconds for _, seconds in found), "parts": parts,
    }  # fmt: skip


def summary(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return the comparison as Markdown."""
    memory = [each["predicted_bytes"] / each["bytes"] - 1 for each in lines]
    seen = [Seen(each["parts"], each["seconds"]) for each in lines]
    alone, learning = list[Interval](), list[Interval]()
    for number, step in enumerate(seen):
        alone.append(Corrections([], calibrated=True).predict(step.parts))
        learning.append(Corrections(seen[:number], calibrated=True).predict(step.parts))

    def time_row(name: str, found: Sequence[Interval]) -> str:
        off = [abs(i.middle / s.seconds - 1) for i, s in zip(found, seen, strict=True)]
        half = len(off) // 2
        held = sum(i.holds(s.seconds) for i, s in zip(found, seen, strict=True)) / len(off)
        nine = sorted(off)[int(0.9 * len(off))]
        return (
            f"| {name} | {statistics.median(off):.1%} | {statistics.median(off[half:]):.1%} | {nine:.1%} | {held:.0%} |"
        )

    off = sorted(map(abs, memory))
    rng, wrong, rejected, fitting = random.Random(0), 0, 0, 0
    for each in lines:
        limit = each["bytes"] * rng.uniform(0.8, 1.2)
        says = each["predicted_bytes"] <= limit
        wrong += says and each["bytes"] > limit
        fitting += each["bytes"] <= limit
        rejected += not says and each["bytes"] <= limit
    return [
        f"{len(lines)} cases; memory: median error {statistics.median(off):.2%}, 90% below {off[int(0.9 * len(off))]:.2%}, "
        f"worst {off[-1]:.2%}, {sum(o > 0.03 for o in off)} above 3%",
        "",
        f'Limits drawn within 20% of the need of each case: "fits" was wrong {wrong} times in {len(lines)}, and {rejected} of '
        f"{fitting} that fit were rejected.",
        "",
        "| time | median error | of the later half | 90% below | 90% intervals held |",
        "| --- | --- | --- | --- | --- |",
        time_row("calibrated", alone),
        time_row("and learning from the cases before", learning),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", default=commit, metavar="TEXT")
    args = parser.parse_args()
    calibration, worlds = calibrated(), Worlds()
    RESULTS.parent.mkdir(exist_ok=True)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    with tempfile.TemporaryDirectory(prefix="shoal-check-plan-") as name, RESULTS.open("a") as file:
        rng = random.Random(args.seed)
        for number in range(args.count):
            config, layout = draw(rng, Path(name))
            assert find_layout(config.parallel, layout.world_size) == layout
            if number < len(lines):
                continue
            try:
                line = run_case(worlds, config, layout, calibration)
            except TimeoutError:  # another program took the processor for long
                worlds.close()
                worlds = Worlds()
                line = run_case(worlds, config, layout, calibration)
            lines.append(line)
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(
                f"{number + 1} of {args.count}: {layout}: {line['predicted_bytes'] / line['bytes'] - 1:+.2%} memory, "
                f"{sum(line['parts'].values()) / line['seconds'] - 1:+.1%} time",
                flush=True,
            )
    worlds.close()
    text = summary(lines)
    print("\n".join(text))
    command = f"python scripts/check_plan.py --count {args.count} --seed {args.seed}"
    page = ["# The planner against real runs", "", f"`{command}`", "", *text, "", "```", describe(), "```", ""]
    PAGE.write_text("\n".join(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
