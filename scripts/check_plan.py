"""
Draw models and layouts, run their steps for real on gloo, and compare memory and time with what `shoal plan` predicts.

    python scripts/check_plan.py [--count 200] [--ranked 8] [--seed TEXT] [--link 2gbit]

The cases follow from the seed, by default the commit, so that no version of the code was tuned for them. Memory is the peak of the
events of torch's own allocator, with memory that processes share, of the rank that needs the most; time is the median step of the
slowest rank. Some cases are measured again at the end: no prediction can be nearer than two measurements are. Then all layouts of
some models on four processes are measured, and compared with the one that the planner ranks first.

Rates come from `shoal plan --calibrate`, which is run first in a folder of its own. With --link, all of it runs in a network
namespace (which needs root) whose loopback `tc` limits to this rate. Each measurement is a line of build/check_plan/LINK/*.jsonl,
so that a stopped run resumes; remove the folder to start over. The page docs/benchmarks/plan.md holds all that was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["KINETO_LOG_LEVEL"] = "99"  # torch's profiler says on stderr when it starts and stops
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shoal.launch.torchrun import worker_environment

os.environ.update(worker_environment(1))  # before torch is imported and processes start
import torch
from tests.parallel.layouts import NeverStop, mesh_for
from tests.world import Worlds

from shoal.bench.calibrate import calibrate
from shoal.bench.environment import describe
from shoal.config.data_options import Data
from shoal.config.layout import Layout
from shoal.config.options import Config, Model, Optim, Parallel, Train
from shoal.config.presets import resolve_shape
from shoal.config.run_options import Launch, Metrics
from shoal.mesh.mesh import Mesh
from shoal.metrics.allocated import most_alive
from shoal.parallel.shared_sum import shared_bytes
from shoal.plan.fits import Need, layouts, need_of
from shoal.plan.machine import Machine, machine_of
from shoal.plan.speed.calibration import Calibration, kept_file, load
from shoal.plan.speed.corrections import Corrections, Interval, Seen
from shoal.plan.speed.measured import NEWEST
from shoal.plan.speed.rates import Rates
from shoal.plan.speed.seconds import idle_share, step_seconds
from shoal.run.console import Console
from shoal.run.narrator import Narrator
from shoal.system.cpu import count_cores, model_name
from shoal.training.loop import take_step
from shoal.training.run import Run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "check_plan"
PAGE = ROOT / "docs" / "benchmarks" / "plan.md"
COUNTS = (1, 2, 4)  # processes
LONGEST = 0.6  # predicted seconds of a step; more would take the script too long
STEPS = 7  # timed in each case, after two others
OPEN = "open"  # the folder of a run without --link
AGAIN = 10  # every tenth case is measured a second time
FRESH = 25  # cases after which processes are restarted: they keep memory, a profiled one 1 GB after 25 cases
FIRST = 20  # cases whose errors are told apart from those of later ones
INSIDE = "SHOAL_CHECK_PLAN_LINK"  # set inside the namespace


def machine_with(processes: int) -> Machine:
    found = machine_of("", processes, 1, 8 * 2**30, cuda=False)
    assert found is not None
    return found


def draw(rng: random.Random, folder: Path) -> Config:
    """Return a small config without a layout."""
    family: Any = rng.choice(("llama", "gpt2"))
    head_dim, heads = rng.choice((32, 64)), rng.choice((4, 6, 8, 12))
    fewer = [h for h in (1, 2, 4, heads) if heads % h == 0]
    model = Model(
        family=family, dim=head_dim * heads, num_layers=rng.randint(4, 9), num_heads=heads, max_seq_len=2048,
        num_kv_heads=rng.choice(fewer) if family == "llama" else None, vocab_size=rng.choice((512, 2048, 8192)),
        tie_embeddings=family == "gpt2" or rng.random() < 0.5,
    )  # fmt: skip
    micro = rng.choice((1, 2, 4, 8))
    return Config(
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
        launch=Launch(runs=str(folder / "runs"), processes=1),
    )  # fmt: skip


def short_layouts(config: Config, processes: int) -> list[tuple[Config, Layout]]:
    """Return the layouts of `config` whose steps are short enough by the data sheet of a slow core."""
    machine = machine_with(processes)
    rates = Rates(machine, 4)

    def seconds(need: Need) -> float:
        return sum(step_seconds(need.works, need.layout, idle_share(need), rates).values())

    legal = layouts(config, machine)
    return [(each, layout) for each, layout in legal if seconds(need_of(each, layout, cuda=False)) < LONGEST]


def draw_case(rng: random.Random, folder: Path) -> tuple[Config, Layout]:
    """Return a small config in one of its layouts on 1, 2 or 4 processes."""
    while True:
        config = draw(rng, folder)
        if legal := short_layouts(config, rng.choice(COUNTS)):
            return rng.choice(legal)


def memory_of(mesh: Mesh, config: Config) -> int:
    """Return, in a worker: the most bytes alive in a step."""
    runs: list[Run] = []

    def open_run() -> None:
        runs.append(Run.open(config, mesh_for(mesh, config.parallel), NeverStop()))
        take_step(runs[0])

    most = most_alive(open_run, lambda: take_step(runs[0])) + shared_bytes()
    runs[0].close()
    return most


def seconds_of(mesh: Mesh, config: Config, threads: int) -> float:
    """Return, in a worker: the median seconds of a step."""
    torch.set_num_threads(threads)
    run, times = Run.open(config, mesh_for(mesh, config.parallel), NeverStop()), []
    for _ in range(STEPS + 2):
        run.mesh.barrier()
        begun = time.perf_counter()
        take_step(run).read()
        times.append(time.perf_counter() - begun)
    run.close()
    return statistics.median(times[2:])


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


class Bench:
    """
    Measures cases in processes that are kept; starts others if a case does not end, as on a machine that does other work.

    Time is measured in other processes than memory: in those that torch's profiler has recorded, steps became slower from case to
    case (one with 150 messages took 0.6, then 1.7, then 2.4 s).
    """

    def __init__(self, results: Path) -> None:
        """results: the folder of the lines, and of the calibration."""
        os.environ["XDG_STATE_HOME"] = str(results / "state")
        self._results, self._calibration = results, calibrated()
        self._timed, self._profiled = Worlds(), Worlds()

    def measure(self, name: str, cases: Sequence[tuple[int, Config, Layout]]) -> list[dict[str, Any]]:
        """Measure those cases that the file `name` lacks; return the lines of all. The number of a case is kept in its line."""
        file = self._results / f"{name}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        for place, (number, config, layout) in enumerate(cases[len(lines) :], len(lines) + 1):
            if place % FRESH == 0:
                self.close()
            named = config.replace("launch", name=f"{name}-{place}")
            line = {"case": number, **self._line(named, layout)}
            lines.append(line)
            with file.open("a") as out:
                out.write(json.dumps(line) + "\n")
            print(
                f"{name}, {place} of {len(cases)}: {layout}: {line['predicted_bytes'] / line['bytes'] - 1:+.2%} memory, "
                f"{sum(line['parts'].values()) / line['seconds'] - 1:+.1%} time",
                flush=True,
            )
        return lines

    def _line(self, config: Config, layout: Layout) -> dict[str, Any]:
        """Measure a case; return it beside its predictions, by calibrated rates and by those of a data sheet."""
        processes = layout.world_size
        seconds = self._run(self._timed, processes, seconds_of, config, max(1, count_cores() // processes))
        profiled = config.replace("launch", name=f"{config.launch.name}-memory")
        most = self._run(self._profiled, processes, memory_of, profiled)
        need, machine = need_of(config, layout, cuda=False), machine_with(processes)
        rates = self._calibration.rates(machine, "float32")
        assert rates is not None
        parts, sheet = (step_seconds(need.works, layout, idle_share(need), r) for r in (rates, Rates(machine, 4)))
        return {
            "layout": str(layout), "processes": processes, "family": config.model.family,
            "checkpointing": config.train.activation_checkpointing, "width": config.model.dim,
            "bytes": max(most), "predicted_bytes": need.total,
            "seconds": max(seconds), "parts": parts, "sheet": sheet,
        }  # fmt: skip

    def _run(self, worlds: Worlds, processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function` on all ranks of a world; start another one if another program took the processor for long."""
        try:
            return worlds[processes].run(function, *args)
        except TimeoutError:
            return worlds[processes].run(function, *args)

    def close(self) -> None:
        self._timed.close()
        self._profiled.close()


def off_by(intervals: Sequence[Interval], lines: Sequence[dict[str, Any]]) -> list[float]:
    """Return the relative errors of predicted steps."""
    return [abs(i.middle / each["seconds"] - 1) for i, each in zip(intervals, lines, strict=True)]


def learning(lines: Sequence[dict[str, Any]], parts: str, *, calibrated: bool) -> list[Interval]:
    """Return the prediction of each step by what the steps before it teach. parts: the rates, "parts" or "sheet"."""
    seen = [Seen(each[parts], each["seconds"]) for each in lines]
    return [
        Corrections(seen[max(0, number - NEWEST) : number], calibrated=calibrated).predict(step.parts)
        for number, step in enumerate(seen)
    ]


def of_memory(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return how near the memory was, and what it says of limits."""
    off = sorted(abs(each["predicted_bytes"] / each["bytes"] - 1) for each in lines)
    held = sum(
        Corrections([], calibrated=True).memory(e["predicted_bytes"], cuda=False).holds(e["bytes"]) for e in lines
    )
    rng, wrong, rejected, fitting = random.Random(0), 0, 0, 0
    for each in lines:
        limit = each["bytes"] * rng.uniform(0.8, 1.2)
        says = each["predicted_bytes"] <= limit
        wrong += says and each["bytes"] > limit
        fitting += each["bytes"] <= limit
        rejected += not says and each["bytes"] <= limit
    return [
        f"**Memory** of {len(lines)} cases: median error {statistics.median(off):.2%}, 90% below {off[int(0.9 * len(off))]:.2%}, "
        f"worst {off[-1]:.2%}, {sum(o > 0.03 for o in off)} above 3%. Its 90% interval held {held} times.",
        "",
        f'Limits drawn within 20% of the need of each case: "fits" was wrong {wrong} times in {len(lines)}, and {rejected} of '
        f"{fitting} that fit were rejected.",
    ]


def of_time(lines: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]]) -> list[str]:
    """Return how near the time was."""
    rows = []
    for name, found in {
        "calibrated": [Corrections([], calibrated=True).predict(each["parts"]) for each in lines],
        "calibrated, and learning from the cases before": learning(lines, "parts", calibrated=True),
        "data sheet of a slow core": [Corrections([], calibrated=False).predict(each["sheet"]) for each in lines],
        "data sheet, and learning from the cases before": learning(lines, "sheet", calibrated=False),
    }.items():
        off = off_by(found, lines)
        held = sum(i.holds(each["seconds"]) for i, each in zip(found, lines, strict=True)) / len(lines)
        later = off[FIRST:] or off
        rows.append(
            f"| {name} | {statistics.median(off):.1%} | {statistics.median(off[:FIRST]):.1%} | {statistics.median(later):.1%} | "
            f"{sorted(off)[int(0.9 * len(off))]:.1%} | {held:.0%} |"
        )
    apart = [abs(each["seconds"] / lines[each["case"]]["seconds"] - 1) for each in again]
    return [
        f"**Time**: {len(again)} of the cases, measured a second time at the end, differ from the first time by "
        f"{statistics.median(apart):.1%} (median), at most {max(apart):.1%}.",
        "",
        f"| time | median error | of the first {FIRST} | of those after | 90% below | 90% intervals held |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
    ]


def of_ranks(ranked: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return how much slower the layout is that the plan ranks first than the fastest one."""
    taught = Corrections([Seen(each["parts"], each["seconds"]) for each in lines][-NEWEST:], calibrated=True)
    rows = []
    for number in sorted({each["case"] for each in ranked}):
        some = [each for each in ranked if each["case"] == number]
        best = min(some, key=lambda each: each["seconds"])
        plain = min(some, key=lambda each: sum(each["parts"].values()))
        learned = min(some, key=lambda each: taught.predict(each["parts"]).middle)
        slower = [f"{each['seconds'] / best['seconds'] - 1:.1%}" for each in (plain, learned)]
        rows.append(
            f"| {some[0]['family']}, {some[0]['width']} wide | {len(some)} | {best['layout']} | {plain['layout']} | {slower[0]} | "
            f"{learned['layout']} | {slower[1]} |"
        )
    return [
        "**Ranks** of all layouts of some models on four processes:",
        "",
        "| model | layouts | fastest measured | ranked first, calibrated | slower by | ranked first after the cases | slower by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]


def draw_models(rng: random.Random, count: int, folder: Path) -> list[tuple[int, Config, Layout]]:
    """Return all layouts on four processes of `count` models, numbered, that have at least three and only short ones."""
    found: list[tuple[int, Config, Layout]] = []
    for number in range(count):
        while True:
            config = draw(rng, folder)
            short = short_layouts(config, 4)
            if len(short) >= 3 and len(short) == len([*layouts(config, machine_with(4))]):
                found += [(number, each, layout) for each, layout in short]
                break
    return found


def enter(link: str) -> None:
    """Start this script again in a network namespace whose loopback carries at most `link`."""
    if not (shutil.which("unshare") and shutil.which("tc")) or os.geteuid():
        raise SystemExit("--link needs root, unshare (util-linux) and tc (iproute2)")
    shape = f"ip link set lo up && tc qdisc add dev lo root tbf rate {link} burst 1mb latency 400ms"
    os.environ |= {INSIDE: link, "GLOO_SOCKET_IFNAME": "lo"}
    os.execvp("unshare", ["unshare", "--net", "sh", "-c", f'{shape} && exec "$@"', "sh", sys.executable, *sys.argv])


def write_page() -> None:
    """Write what the folders of results hold."""
    files = sorted(RESULTS.glob("*/summary.md"), key=lambda file: file.parent.name != OPEN)
    found = [file.read_text(encoding="utf-8") for file in files]
    PAGE.write_text("\n".join(["# The planner against real runs", "", *found]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--ranked", type=int, default=8, help="models of which all layouts are measured")
    parser.add_argument("--seed", default=commit, metavar="TEXT")
    parser.add_argument("--link", metavar="RATE", help="of the loopback, as tc writes it")
    args = parser.parse_args()
    if args.link and os.environ.get(INSIDE) != args.link:
        enter(args.link)
    results = RESULTS / (args.link or OPEN)
    results.mkdir(parents=True, exist_ok=True)
    bench = Bench(results)
    with tempfile.TemporaryDirectory(prefix="shoal-check-plan-") as name:
        folder, seed = Path(name), args.seed + results.name
        rng, ranking = random.Random(seed), random.Random(seed + "ranked")
        cases = [(number, *draw_case(rng, folder)) for number in range(args.count)]
        models = draw_models(ranking, args.ranked, folder)
        lines = bench.measure("cases", cases)
        again = bench.measure("again", cases[::AGAIN])
        ranked = bench.measure("ranked", models)
    bench.close()
    link = f" --link {args.link}" if args.link else ""
    command = f"python scripts/check_plan.py --count {args.count} --ranked {args.ranked} --seed {args.seed}{link}"
    title = f"Messages limited to {args.link} by `tc`" if args.link else "Messages on the loopback"
    text = [
        f"## {title}", "", f"`{command}`", "", *of_memory(lines), "", *of_time(lines, again), "",
        *([*of_ranks(ranked, lines), ""] if ranked else []), "```", describe(), "```", "",
    ]  # fmt: skip
    print("\n".join(text))
    (results / "summary.md").write_text("\n".join(text), encoding="utf-8")
    write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
