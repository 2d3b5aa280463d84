"""
`parallel: auto` and `train.micro_batch: auto`: plan for this machine, try the best few for some steps, keep the fastest that fits.

No torch here: the trials' processes import it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.bench.timed_steps import time_steps
from shoal.config.options import Config
from shoal.errors import LaunchError, ShoalError
from shoal.launch.torchrun import uses_cpu
from shoal.plan.choice.candidates import (
    MOST_MEASURED,
    Candidate,
    Candidates,
    Timing,
    Trial,
    Tried,
    fastest,
    find_candidates,
)
from shoal.plan.machine import GIB, Machine, find_machine, machine_of
from shoal.plan.speed.corrections import Seen
from shoal.plan.speed.measured import keep, known, predict
from shoal.plan.speed.rates import WIDTHS, Rates
from shoal.resolve.undecided import with_sizes_of
from shoal.run.console import Console
from shoal.run.narrator import Narrator
from shoal.system.cpu import multiplies_bfloat16
from shoal.system.disk import gigabytes
from shoal.system.memory import available_bytes
from shoal.system.output import aligned

PROCESS_BYTES: Final = GIB // 2  # of main memory that a process takes besides its tensors: Python, torch and gloo
STEP_SHARE: Final = 1 / 40  # of the limit, that a timed step should take: three trials of six steps, and their starts
LIMIT_SECONDS: Final = 60.0  # to ask torch for the GPUs' memory


@dataclass(frozen=True)
class Search:
    """What was tried, in this order, and why nothing else was. took: seconds."""

    candidates: Candidates
    tried: Sequence[Tried]
    why_over: str
    took: float

    @property
    def chosen(self) -> Candidate:
        """The fastest that was measured; if none was, the first that did not fail."""
        if best := fastest(self.tried):
            return best.candidate
        failed = [t.candidate for t in self.tried if t.timing.out_of_memory]
        left = [c for c in self.candidates.listed if not any(c is f for f in failed)]
        return (left or self.candidates.listed)[0]


def choose_sizes(
    config: Config, undecided: Mapping[str, str], gpus: int, vocab_size: int, limit_seconds: float, console: Console
) -> Config:
    """
    Return `config` with sizes in place of the `undecided` ones, and print why.

    config: with its processes and threads planned. vocab_size: of its data. limit_seconds: of all trials; 0 tries none, and the plan
    decides. Raises `ShoalError` if no size is possible.
    """
    machine = this_machine(config, gpus)
    planned = _finished(config, vocab_size, cuda=machine.cuda)
    with contextlib.closing(Narrator.of(console)) as narrator:
        with narrator.phase("planning"):
            candidates = find_candidates(
                planned, machine, undecided, _known(machine, planned.train.dtype, console.warn)
            )

        def time(trial: Trial, limit: float) -> Timing:
            sized = with_sizes_of(config, trial.config, undecided)
            sized = sized.replace("train", global_batch=trial.config.train.global_batch)
            with narrator.phase(f"trying {trial.candidate}"), _folder() as folder:
                return time_steps(sized, trial.steps, folder, limit, cuda=machine.cuda)

        search = run_search(candidates, time, limit_seconds)
    _keep(search.tried, machine)
    for line in lines(search, undecided, machine):
        console.say(line)
    return with_sizes_of(config, search.chosen.config, undecided)


def run_search(
    candidates: Candidates,
    time_trial: Callable[[Trial, float], Timing],
    limit_seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> Search:
    """Try candidates until no other is likely to be faster, or the limit is near. time_trial: within a number of seconds."""
    began = now()
    tried: list[Tried] = []
    while True:
        left = began + limit_seconds - now()
        following = candidates.following(tried)
        if isinstance(following, str):
            return Search(candidates, tried, following, now() - began)
        if left <= 0 or left < (needed := _needed(tried)):
            return Search(
                candidates, tried, f"launch.auto_seconds {limit_seconds:g} leaves no time for another", now() - began
            )
        start = now()
        is_last = sum(t.is_measured for t in tried) == MOST_MEASURED - 1
        trial = candidates.trial(following, tried, limit_seconds * STEP_SHARE)
        timing = time_trial(trial, left if is_last else max(left / 2, needed))
        tried.append(Tried(trial, timing, now() - start))


def _needed(tried: Sequence[Tried]) -> float:
    """Return the seconds that a trial needs at least, by those before it: to start, and for two steps."""
    return min((t.took - (t.timing.steps - 2) * (t.timing.seconds or 0.0) for t in tried if t.is_measured), default=0.0)


def this_machine(config: Config, gpus: int) -> Machine:
    """Return this machine with the processes of `config`, and the memory that each may take now."""
    processes = config.launch.processes or 1
    if uses_cpu(config, gpus):
        each = available_bytes() // processes - PROCESS_BYTES
        machine = machine_of("cpu", processes, 1, max(each, 0), cuda=False)
    else:
        name, free = _gpu(processes)
        known = machine_of(name, processes, 1, free, cuda=True) or find_machine(f"{processes}x{free / GIB:.2f}GB", 1)
        machine = dataclasses.replace(known, name=known.name if known.card else name, memory_bytes=free)
    assert machine is not None
    return machine


def _gpu(count: int) -> tuple[str, int]:
    """Return the name of the first GPU, and the least memory that one of the first `count` has free. In a process of its own."""
    code = (
        "import json, sys, torch\n"
        f"free = [torch.cuda.mem_get_info(i)[0] for i in range({count})]\n"
        "print(json.dumps([torch.cuda.get_device_name(0), min(free)]))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=True
        )
        name, free = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise LaunchError(f"the memory of the GPUs is not known ({error}); set the sizes instead of auto") from None
    return str(name), int(free)


def _finished(config: Config, vocab_size: int, *, cuda: bool) -> Config:
    """Return the config with the vocabulary and the dtype that the run will probably choose, for the planner."""
    config = config.replace("model", vocab_size=config.model.vocab_size or vocab_size)
    if config.train.dtype != "auto":
        return config
    return config.replace("train", dtype="bfloat16" if cuda or multiplies_bfloat16() else "float32")


def _known(machine: Machine, dtype: str, warn: Callable[[str], None]) -> tuple[Rates, Sequence[Seen]]:
    try:
        return known(machine, dtype)
    except ShoalError as error:
        warn(f"planned without a calibration: {error}")
        return Rates(machine, WIDTHS[dtype]), ()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shoal-auto-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _keep(tried: Sequence[Tried], machine: Machine) -> None:
    """Keep the measured steps beside their predictions, for later plans."""
    for each in tried:
        if each.is_measured and each.candidate.choice:
            config = each.trial.config.replace("train", dtype=each.timing.dtype)
            with contextlib.suppress(OSError, ShoalError):
                if found := predict(config, each.candidate.layout, machine):
                    keep(found, each.timing.seconds or 0.0, each.timing.memory_bytes)


# --- the report ------------------------------------------------------------------------------------------


def lines(search: Search, undecided: Mapping[str, str], machine: Machine) -> list[str]:
    """Return what was tried as a table, and why one was chosen."""
    said = " and ".join(f"{key} auto" for key in undecided)
    count = len(search.candidates.listed)
    devices = f"{machine.per_node} {'GPU' if machine.cuda else 'process'}"
    many = ("" if machine.per_node == 1 else "s") if machine.cuda else "es" * (machine.per_node > 1)
    head = f"{said}: {count} candidate{'s' * (count != 1)} on {devices}{many}"
    took = f", {len(search.tried)} tried in {search.took:.0f} s" if search.tried else ""
    return [f"{head}{took}", *search.candidates.notes, *_table(search), _why(search)]


def _table(search: Search) -> Iterator[str]:
    """Yield a row for each trial, and how whole steps follow from shorter ones."""
    if not search.tried:
        return
    rows = [["candidate", "planned s", "measured s", "memory", ""]]
    for each in search.tried:
        interval = search.candidates.predicted(each.candidate)
        rows.append([
            str(each.candidate), f"{interval.middle:.3g}" if interval else "-", _measured(each), _memory(each), each.timing.why,
        ])  # fmt: skip
    yield from (f"  {line}" for line in aligned(rows, left=(0, 4)))
    shares = sorted({f"{each.trial.share:.0%}" for each in search.tried if each.trial.share < 1 and each.is_measured})
    if shares:
        by = "the plan" if search.candidates.plan else "the number of micro-batches"
        yield f"  ~: from steps with {' and '.join(shares)} of the micro-batches, extended by {by}"


def _measured(tried: Tried) -> str:
    if not tried.is_measured:
        return "-"
    return f"{'~' * (tried.trial.share < 1)}{tried.seconds:.3g}"


def _memory(tried: Tried) -> str:
    """Return the measured peak of a GPU, or what a CPU's tensors take by the plan."""
    if tried.timing.memory_bytes is not None:
        return gigabytes(tried.timing.memory_bytes)
    return gigabytes(tried.candidate.choice.need.total) if tried.candidate.choice else "-"


def _why(search: Search) -> str:
    chosen, measured = search.chosen, sorted(t.seconds for t in search.tried if t.is_measured)
    kept = "The run keeps it, also when it resumes."
    if not search.tried:
        return f"chosen by the plan alone: {chosen}"
    if not measured:
        return f"chosen: {chosen}, although no step of it was measured. Stopped: {search.why_over}. {kept}"
    faster = f", {measured[1] / measured[0] - 1:.0%} faster than the next" if len(measured) > 1 else ""
    return f"chosen: {chosen}, the fastest measured{faster}. Stopped: {search.why_over}. {kept}"
