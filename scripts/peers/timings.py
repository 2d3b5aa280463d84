"""
Runs of the contenders in turns, and the file that keeps them: one line per run in `results.jsonl`.

A turn is a few contenders, one right after the other, each in a new process. Ratios are taken within turns. The lines of a turn
are written together, so that a benchmark that was interrupted resumes with the next turn.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
from scripts.peers.contract import Spec
from scripts.peers.inputs import without_files
from scripts.peers.installs import PEERS, python_of

from shoal.bench.worker_process import command_of
from shoal.config.options import Config
from shoal.launch.torchrun import worker_environment
from shoal.resolve.resolve import to_yaml

ROOT: Final = Path(__file__).parents[2]
SHOAL, TWO_PROCESSES, PRODUCTS = "shoal", "shoal, two processes", "products"
WARMUP_STEPS: Final = 2
DISTURBED: Final = 0.1  # share of the machine's cores that other programs may use
CPU_CLOCK: Final = (
    "import runpy, sys, time; time.perf_counter = time.process_time; del sys.argv[0]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
CALM_SECONDS: Final = 60.0  # longest wait for that before a run


@dataclass(frozen=True)
class Case:
    """
    A shape in a dtype. folder: its spec and files. clock: wall, or cpu for the CPU time of a contender's process.

    config, split: shoal's, with one process, and with two that divide threads and batch.
    """

    shape: str
    dtype: str
    clock: str
    spec: Spec
    folder: Path
    config: Config
    split: Config


@dataclass(frozen=True)
class Turn:
    """Contenders that run one right after the other. number: its place in the round."""

    case: Case
    repeat: int
    number: int
    contenders: tuple[str, ...]

    def key(self) -> str:
        """Return a hash of everything that the figures depend on, besides the machine."""
        content = [
            without_files(self.case.spec),
            self.case.clock,
            self.repeat,
            [(c, identity(c)) for c in self.contenders],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Timing:
    """One finished run, as in its line of results."""

    key: str
    shape: str
    dtype: str
    repeat: int
    contender: str
    others: float  # share of the machine's cores that other programs used
    answer: dict[str, Any]

    @property
    def error(self) -> str:
        """Why the run failed; empty if it did not."""
        return str(self.answer.get("error", ""))

    @property
    def is_disturbed(self) -> bool:
        """Whether other programs used much of the machine during a run that did not fail."""
        return self.others > DISTURBED and not self.error

    @property
    def step_seconds(self) -> float:
        """The median step after warmup."""
        return float(statistics.median(self.answer["seconds"][WARMUP_STEPS:]))

    @property
    def fastest_seconds(self) -> float:
        """The fastest step: the one that other programs disturbed least."""
        return float(min(self.answer["seconds"]))


def turns(cases: Sequence[Case], names: Sequence[str], repeats: int) -> list[Turn]:
    """Return all turns in order. In each, shoal runs beside every other contender: before it, after it, or both."""
    rounds = [names[at : at + 2] for at in range(0, len(names), 2)]
    groups = [(first, SHOAL, *second) for first, *second in rounds]
    last = {
        "wall": (PRODUCTS, SHOAL, TWO_PROCESSES),
        "cpu": (PRODUCTS, SHOAL),
    }  # CPU time excludes waiting for each other
    return [
        Turn(case, repeat, number, group)
        for repeat in range(repeats)
        for case in cases
        for number, group in enumerate([*groups, last[case.clock]])
    ]


@functools.cache
def identity(contender: str) -> object:
    """Return what a contender consists of: the pins and worker of a peer, or the source of shoal."""
    here = Path(__file__).parent
    if contender == PRODUCTS:
        return _digest([here / "products.py"])
    if contender in (SHOAL, TWO_PROCESSES):
        return _digest(sorted((ROOT / "src" / "shoal").rglob("*.py")))
    peer = PEERS[contender]
    return peer.pins, _digest([here / "contract.py", here / "transformers_llama.py", here / f"{peer.worker}.py"])


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def read(results: Path) -> list[Timing]:
    """Return the timings of all complete lines."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    return [Timing(**json.loads(line)) for line in lines if line.endswith("}")]


def of_turn(turn: Turn, timings: Iterable[Timing]) -> list[Timing]:
    """Return the timings of a turn; empty if it has not run."""
    key = turn.key()
    return [timing for timing in timings if timing.key == key]


def take(turn: Turn, folder: Path, attempts: int) -> list[Timing]:
    """
    Run a turn's contenders. folder: `build/peers`.

    attempts: how often a contender is run at most if other programs use the machine; the least disturbed run counts.
    """
    found, key, case = [], turn.key(), turn.case
    for contender in turn.contenders:
        tried: list[Timing] = []
        while not tried or (len(tried) < attempts and tried[-1].is_disturbed and case.clock == "wall"):
            print(
                f"{case.shape} {case.dtype}, repeat {turn.repeat + 1}: {contender}", end="", file=sys.stderr, flush=True
            )
            if case.clock == "wall":
                _wait_for_calm()
            answer, others = _measured(contender, case, folder)
            tried.append(Timing(key, case.shape, case.dtype, turn.repeat, contender, others, answer))
            print(f"  {_in_words(tried[-1], case.spec)}", file=sys.stderr, flush=True)
        found.append(min(tried, key=lambda timing: timing.others))
    return found


def _wait_for_calm() -> None:
    """Wait until other programs use little of the machine, for a minute at most."""
    end = time.monotonic() + CALM_SECONDS
    while time.monotonic() < end and psutil.cpu_percent(interval=1.0) > 100 * DISTURBED:
        pass


def _in_words(timing: Timing, spec: Spec) -> str:
    if timing.error:
        return f"failed: {timing.error}"
    if timing.contender == PRODUCTS:
        rate = timing.answer["product_flops"] / timing.answer["product_seconds"] / 1e9
        return f"{timing.answer['product_seconds']:.2f} s for a step's products, {rate:.0f} GFLOP/s"
    said = f"{spec.tokens_per_step / timing.step_seconds:,.0f} tokens/s, loss {timing.answer['losses'][-1]:.3f}"
    return said + (f", other programs used {100 * timing.others:.0f}%" if timing.others > 0.02 else "")


def _measured(contender: str, case: Case, folder: Path) -> tuple[dict[str, Any], float]:
    """Run a contender in a new process; return its answer and the share of the cores that other programs used meanwhile."""
    out = folder / "answer.json"
    out.unlink(missing_ok=True)
    command, environment = _command(contender, case, folder, out)
    before, begun = _used(), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    after, seconds = _used(), time.perf_counter() - begun
    all_programs, ours = (b - a for a, b in zip(before, after, strict=True))
    others = max(0.0, all_programs - ours) / (seconds * (os.cpu_count() or 1))
    if done.returncode or not out.is_file():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": last}, others
    answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return answer, others


def _used() -> tuple[float, float]:
    """Return the CPU seconds used since the machine started, by all programs and by this one with its children."""
    now = psutil.cpu_times()
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    stolen = getattr(now, "steal", 0.0)  # by other machines of the same host
    return now.user + now.nice + now.system + stolen, sum(each.ru_utime + each.ru_stime for each in own)


def _command(contender: str, case: Case, folder: Path, out: Path) -> tuple[list[str], dict[str, str]]:
    """Return a contender's command and environment; shoal's is what `shoal train` sets."""
    threads = case.spec.threads
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONNOUSERSITE": "1"}
    if contender in (SHOAL, TWO_PROCESSES):
        config = case.config if contender == SHOAL else case.split
        shutil.rmtree(folder / "runs", ignore_errors=True)
        recipe = folder / "timed.yaml"
        recipe.write_text(to_yaml(config), encoding="utf-8")
        threads = config.launch.threads or 1
        module = command_of("shoal.bench.step_worker", [str(recipe), str(out)], config.launch.processes or 1)[1:]
        return [sys.executable, *_clocked(module, case.clock)], worker_environment(threads) | inherited | {
            "OMP_NUM_THREADS": str(threads)
        }
    python = sys.executable if contender == PRODUCTS else str(python_of(contender, folder))
    worker = PRODUCTS if contender == PRODUCTS else PEERS[contender].worker
    module = ["-m", f"scripts.peers.{worker}", str(case.folder / f"{case.dtype}.json"), str(out)]
    return [python, *_clocked(module, case.clock)], inherited | {"OMP_NUM_THREADS": str(threads)}


def _clocked(module: list[str], clock: str) -> list[str]:
    """Return Python's arguments that run a module; with the clock `cpu`, `time.perf_counter` counts CPU time for all its code."""
    return module if clock == "wall" else ["-c", CPU_CLOCK, *module[1:]]
