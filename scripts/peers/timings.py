"""
Runs of the contenders in turns, and the file that keeps them: one line per run in `results.jsonl`.

A turn is a few contenders, each in a new process. They take their steps in turns: while one works, the others wait. Ratios are
those of neighboring steps. The lines of a turn are written together, so that a benchmark that was interrupted resumes with the
next turn.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
from scripts.peers.contract import TURNS, Spec
from scripts.peers.inputs import without_files
from scripts.peers.installs import PEERS, python_of

from shoal.bench.worker_process import command_of, end
from shoal.config.options import Config
from shoal.launch.torchrun import worker_environment
from shoal.resolve.resolve import to_yaml

ROOT: Final = Path(__file__).parents[2]
SHOAL, TWO_PROCESSES, PRODUCTS = "shoal", "shoal, two processes", "products"
WARMUP_STEPS: Final = 2
DISTURBED: Final = 0.1  # share of the machine's cores that other programs may use
CALM_SECONDS: Final = 60.0  # longest wait for that before a run


@dataclass(frozen=True)
class Case:
    """
    A shape in a dtype. folder: its spec and files.

    config, split: shoal's, with one process, and with two that divide threads and batch.
    """

    shape: str
    dtype: str
    spec: Spec
    folder: Path
    config: Config
    split: Config


@dataclass(frozen=True)
class Turn:
    """Contenders that take their steps in turns. number: its place in the round."""

    case: Case
    repeat: int
    number: int
    contenders: tuple[str, ...]

    def key(self) -> str:
        """Return a hash of everything that the figures depend on, besides the machine."""
        content = [
            without_files(self.case.spec),
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
    others: float  # share of the machine's cores that other programs used during the turn
    answer: dict[str, Any]

    @property
    def error(self) -> str:
        """Why the run failed; empty if it did not."""
        return str(self.answer.get("error", ""))

    @property
    def steps(self) -> list[float]:
        """The seconds of the steps after warmup."""
        return [float(seconds) for seconds in self.answer["seconds"][WARMUP_STEPS:]]


def turns(cases: Sequence[Case], names: Sequence[str], repeats: int) -> list[Turn]:
    """
    Return all turns in order. In each, a step of shoal is in the round of a step of every other contender.

    The contender that starts first changes with the repeat: the memory that a process gets first can be slower.
    """
    pairs = [names[at : at + 2] for at in range(0, len(names), 2)]
    groups = [*((first, SHOAL, *second) for first, *second in pairs), (PRODUCTS, SHOAL, TWO_PROCESSES)]
    found = []
    for repeat in range(repeats):
        for case in cases:
            for number, group in enumerate(groups):
                begin = repeat % len(group)
                found.append(Turn(case, repeat, number, (*group[begin:], *group[:begin])))
    return found


@functools.cache
def identity(contender: str) -> object:
    """Return what a contender consists of: the pins and worker of a peer, or the source of shoal."""
    here = Path(__file__).parent
    if contender == PRODUCTS:
        return _digest([here / "products.py", ROOT / "src" / "shoal" / "models" / "layers.py"])
    if contender in (SHOAL, TWO_PROCESSES):
        return _digest([here / "with_shoal.py", *sorted((ROOT / "src" / "shoal").rglob("*.py"))])
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


class Contender:
    """A contender's process, which works only during `step`."""

    def __init__(self, name: str, case: Case, folder: Path, peers: Path) -> None:
        """
        Start it, and return when it is ready for its first step, or has ended.

        folder: an empty one, for its files. peers: the peers' environments.
        """
        self._answer, self._errors = folder / "answer.json", folder / "errors.txt"
        self._connection: socket.socket | None = None
        command, environment = _command(name, case, folder, peers, self._answer)
        with socket.socket(socket.AF_UNIX) as waiting, self._errors.open("wb") as errors:
            waiting.bind(str(folder / "turns"))
            waiting.listen()
            waiting.settimeout(1.0)
            environment[TURNS] = str(folder / "turns")
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
            )
            while self._connection is None and self._process.poll() is None:
                with contextlib.suppress(TimeoutError):
                    self._connection, _ = waiting.accept()
        if self._connection is not None:
            self._connection.settimeout(None)
            self._wait()

    def step(self) -> bool:
        """Let it take a step; return False if its process has ended or ends."""
        if self._connection is None:
            return False
        self._connection.sendall(b".")
        return self._wait()

    def _wait(self) -> bool:
        """Return True when it waits for its next turn, or False when it has written its answer."""
        assert self._connection is not None
        with contextlib.suppress(ConnectionError):
            if self._connection.recv(1):
                return True
        self._process.wait()
        self._connection.close()
        self._connection = None
        return False

    def answer(self) -> dict[str, Any]:
        """Return what it has measured, or its error."""
        code = self._process.wait()
        if code == 0 and self._answer.is_file():
            answer: dict[str, Any] = json.loads(self._answer.read_text(encoding="utf-8"))
            return answer
        lines = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {code}"}

    def close(self) -> None:
        """End the process if it still runs."""
        if self._connection is not None:
            self._connection.close()
        end(self._process)


def take(turn: Turn, folder: Path) -> list[Timing]:
    """Let a turn's contenders take their steps. folder: `build/peers`."""
    case = turn.case
    print(f"{case.shape} {case.dtype}, repeat {turn.repeat + 1}: {', '.join(turn.contenders)}", file=sys.stderr)
    _wait_for_calm()
    before, begun = _used(), time.perf_counter()
    with contextlib.ExitStack() as stack:
        contenders = list[Contender]()
        for number, name in enumerate(turn.contenders):
            own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"peers-{number}-")))
            contenders.append(Contender(name, case, own, folder))
            stack.callback(contenders[-1].close)
        waiting = contenders
        while waiting:
            waiting = [each for each in waiting if each.step()]
        answers = [each.answer() for each in contenders]
    after, seconds = _used(), time.perf_counter() - begun
    all_programs, ours = (b - a for a, b in zip(before, after, strict=True))
    others = max(0.0, all_programs - ours) / (seconds * (os.cpu_count() or 1))
    found = [
        Timing(turn.key(), case.shape, case.dtype, turn.repeat, name, others, answer)
        for name, answer in zip(turn.contenders, answers, strict=True)
    ]
    for timing in found:
        print(f"  {timing.contender}: {_in_words(timing, case.spec)}", file=sys.stderr, flush=True)
    return found


def _wait_for_calm() -> None:
    """Wait until other programs use little of the machine, for a minute at most."""
    end = time.monotonic() + CALM_SECONDS
    while time.monotonic() < end and psutil.cpu_percent(interval=1.0) > 100 * DISTURBED:
        pass


def _in_words(timing: Timing, spec: Spec) -> str:
    if timing.error:
        return f"failed: {timing.error}"
    seconds = statistics.median(timing.steps)
    if timing.contender == PRODUCTS:
        return f"{seconds:.2f} s for a step's products, {timing.answer['product_flops'] / seconds / 1e9:.0f} GFLOP/s"
    return f"{spec.tokens_per_step / seconds:,.0f} tokens/s, loss {timing.answer['losses'][-1]:.3f}"


def _used() -> tuple[float, float]:
    """Return the CPU seconds used since the machine started, by all programs and by this one with its children."""
    now = psutil.cpu_times()
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    stolen = getattr(now, "steal", 0.0)  # by other machines of the same host
    return now.user + now.nice + now.system + stolen, sum(each.ru_utime + each.ru_stime for each in own)


def _command(name: str, case: Case, folder: Path, peers: Path, answer: Path) -> tuple[list[str], dict[str, str]]:
    """Return a contender's command and environment; shoal's is what `shoal train` sets."""
    threads = case.spec.threads
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONNOUSERSITE": "1"}
    if name in (SHOAL, TWO_PROCESSES):
        config = (case.config if name == SHOAL else case.split).replace("launch", runs=str(folder / "runs"))
        recipe = folder / "timed.yaml"
        recipe.write_text(to_yaml(config), encoding="utf-8")
        threads = config.launch.threads or 1
        command = command_of("scripts.peers.with_shoal", [str(recipe), str(answer)], config.launch.processes or 1)
        return command, worker_environment(threads) | inherited | {"OMP_NUM_THREADS": str(threads)}
    python = sys.executable if name == PRODUCTS else str(python_of(name, peers))
    worker = PRODUCTS if name == PRODUCTS else PEERS[name].worker
    command = [python, "-m", f"scripts.peers.{worker}", str(case.folder / f"{case.dtype}.json"), str(answer)]
    return command, inherited | {"OMP_NUM_THREADS": str(threads)}
