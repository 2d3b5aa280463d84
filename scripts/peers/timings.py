"""
Runs of the contenders in turns, and the file that keeps them: one line per run in `results.jsonl`.

A turn is a few contenders, one right after the other, each in a new process. Ratios are taken within turns. The lines of a turn
are written together, so that a benchmark that was interrupted resumes with the next turn.
"""

from __future__ import annotations

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

from shoal.config.options import Config
from shoal.launch.torchrun import worker_environment
from shoal.resolve.resolve import to_yaml

ROOT: Final = Path(__file__).parents[2]
SHOAL, TWO_PROCESSES, PRODUCTS = "shoal", "shoal, two processes", "products"
WARMUP_STEPS: Final = 2
DISTURBED: Final = 0.1  # share of the machine's cores that other programs may use


@dataclass(frozen=True)
class Case:
    """A shape in a dtype. folder: its spec and files. config, split: shoal's, with one process, and with two that divide threads and batch."""

    shape: str
    dtype: str
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
        content = [without_files(self.case.spec), self.repeat, [(c, identity(c)) for c in self.contenders]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Timing:
    """One finished run, as in its line of results."""

    key: str
    attempt: int
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
    groups = [(first, SHOAL, *second) for first, *second in rounds] + [(PRODUCTS, SHOAL, TWO_PROCESSES)]
    return [
        Turn(case, repeat, number, group)
        for repeat in range(repeats)
        for case in cases
        for number, group in enumerate(groups)
    ]


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
    """Return the timings of a turn's least disturbed attempt; empty if there is none."""
    attempts: dict[int, list[Timing]] = {}
    for timing in timings:
        if timing.key == turn.key():
            attempts.setdefault(timing.attempt, []).append(timing)
    whole = [found for found in attempts.values() if len(found) == len(turn.contenders)]
    return min(whole, key=lambda found: max(timing.others for timing in found), default=[])


def attempts_of(turn: Turn, timings: Iterable[Timing]) -> int:
    """Return how often a turn was run."""
    return len({timing.attempt for timing in timings if timing.key == turn.key()})


def is_due(turn: Turn, timings: Sequence[Timing], most: int) -> bool:
    """Return whether a turn has not run yet, or only while other programs used the machine, and fewer than `most` times."""
    found = of_turn(turn, timings)
    disturbed = any(timing.others > DISTURBED and not timing.error for timing in found)
    return not found or (disturbed and attempts_of(turn, timings) < most)


def take(turn: Turn, attempt: int, folder: Path) -> list[Timing]:
    """Run a turn's contenders. folder: `build/peers`."""
    found = []
    for contender in turn.contenders:
        print(f"{turn.case.shape} {turn.case.dtype}, repeat {turn.repeat + 1}: {contender}", end="", file=sys.stderr, flush=True)  # fmt: skip
        answer, others = _measured(contender, turn.case, folder)
        timing = Timing(turn.key(), attempt, turn.case.shape, turn.case.dtype, turn.repeat, contender, others, answer)
        print(f"  {_in_words(timing, turn.case.spec)}", file=sys.stderr, flush=True)
        found.append(timing)
    return found


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
    return now.user + now.nice + now.system, sum(each.ru_utime + each.ru_stime for each in own)


def _command(contender: str, case: Case, folder: Path, out: Path) -> tuple[list[str], dict[str, str]]:
    """Return a contender's command and environment; shoal's is what `shoal train` sets."""
    threads = case.spec.threads
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONNOUSERSITE": "1"}
    if contender in (SHOAL, TWO_PROCESSES):
        config = case.config if contender == SHOAL else case.split
        shutil.rmtree(folder / "runs", ignore_errors=True)
        recipe = folder / "timed.yaml"
        recipe.write_text(to_yaml(config), encoding="utf-8")
        module = ["-m", "shoal.bench.step_worker", str(recipe), str(out)]
        processes, threads = config.launch.processes or 1, config.launch.threads or 1
        if processes > 1:
            module = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *module]
        return [sys.executable, *module], worker_environment(threads) | inherited | {"OMP_NUM_THREADS": str(threads)}
    python = sys.executable if contender == PRODUCTS else str(python_of(contender, folder))
    worker = PRODUCTS if contender == PRODUCTS else PEERS[contender].worker
    command = [python, "-m", f"scripts.peers.{worker}", str(case.folder / f"{case.dtype}.json"), str(out)]
    return command, inherited | {"OMP_NUM_THREADS": str(threads)}
