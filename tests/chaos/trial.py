"""Run a case and judge it: the same weights as without faults, every sample once, nothing left over."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from shoal.checkpoint.saved import listed, verify
from shoal.data.order.audit import audit
from shoal.errors import CheckpointError
from shoal.fault.inject import PLAN
from shoal.run.events import read_json_lines
from tests import warm
from tests.chaos.case import SAVE_EVERY, STEPS, Case
from tests.cli.commands import clean_environment
from tests.digests import weights

MARK: Final = "SHOAL_CHAOS"  # environment variable that marks a run's processes
PATIENCE_SECONDS: Final = 400.0
_LOOK_SECONDS: Final = 0.5  # between two checks of a run's ports

RECIPE = f"""
model: {{dim: 32, num_layers: 2, num_heads: 2, max_seq_len: 32}}
data: {{corpus: dummy, dummy_documents: 60, tokenizer: bytes, seq_len: 32, stuck_seconds: 3}}
optim: {{lr: 1e-2, warmup_steps: 2, schedule: constant}}
train: {{steps: {STEPS}, global_batch: 12, micro_batch: 2, dtype: float32, device: cpu, repro: bitwise, eval_every: 0}}
checkpoint: {{every: {SAVE_EVERY}, keep: 3}}
fault: {{check_replicas_every: 1}}
metrics: {{peak_tflops: 1, report: false}}
# crashes before the first step count as no progress, and a case may have several in a row
launch: {{hang_seconds: 15, timeout_seconds: 45, threads: 1, max_crashes: 6}}
"""


@dataclass(frozen=True)
class Verdict:
    """The judgment of a run. problems: empty if it passed. events: names of the run's events, in order."""

    problems: tuple[str, ...]
    events: tuple[str, ...]
    output: str

    def explain(self, case: Case) -> str:
        """Describe the problems, the faults, and the commands that repeat the run or each fault alone."""
        return "\n".join(
            [
                *self.problems,
                f"events: {', '.join(e for e in self.events if e != 'saved')}",
                f"the run had these faults: {case}; to repeat it:",
                f"  {case.command}",
                "each fault alone:",
                *(f"  {each.command}" for each in case.alone()),
            ]
        )


@dataclass
class Trace:
    """The resources that a run used, and must release."""

    temporary: Path  # the run's folder for temporary files, also the value of `MARK` in its processes
    ports: set[int] = field(default_factory=set)
    shared: set[Path] = field(default_factory=set)

    def look(self) -> None:
        """Record the ports on which the run's processes listen, and their files in shared memory."""
        for process in _marked(self.temporary):
            self.shared |= _shared_files(process.pid)
            try:
                found = process.net_connections("tcp")
            except (psutil.Error, OSError):
                continue
            self.ports |= {c.laddr.port for c in found if c.laddr and c.status == psutil.CONN_LISTEN}

    def left_over(self) -> list[str]:
        """Describe what was not released, processes first."""
        ours = {p.pid: f"process {p.pid} is left over: {' '.join(p.cmdline())}" for p in _marked(self.temporary)}
        listening = {
            c.laddr.port
            for c in psutil.net_connections("tcp")
            if c.laddr
            and c.status == psutil.CONN_LISTEN
            and (c.pid is None or c.pid in ours)  # otherwise another program has the port now
        }
        files = [*_temporary_files(self.temporary), *filter(Path.exists, self.shared)]
        return [
            *ours.values(),
            *(f"port {port} is still listening" for port in sorted(self.ports & listening)),
            *(f"{path} is left over" for path in sorted(files)),
        ]


class Laboratory:
    """A folder for runs. The weights without faults are computed once for each set of skipped steps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        self._clean: dict[tuple[int, ...], dict[str, str]] = {}

    def run(self, name: str, processes: int, plan: Sequence[dict[str, object]]) -> tuple[int, str, list[str]]:
        """Run with a plan of faults; return (exit code, output, descriptions of resources that were not released)."""
        temporary = self.folder / "tmp" / name
        temporary.mkdir(parents=True)
        command = warm.shoal("train", "recipe.yaml", "--name", name, "--processes", str(processes))
        environment = clean_environment() | {
            PLAN: json.dumps(plan), MARK: str(temporary), "TMPDIR": str(temporary),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "cache"),  # kept for the next run
        }  # fmt: skip
        trace = Trace(temporary)
        printed = _printed(temporary)
        with printed.open("w", encoding="utf-8") as file:
            process = warm.Popen(command, cwd=self.folder, env=environment, stdout=file, stderr=file)
            try:
                end = time.monotonic() + PATIENCE_SECONDS
                while process.poll() is None and time.monotonic() < end:
                    trace.look()
                    time.sleep(_LOOK_SECONDS)
                left = trace.left_over() if process.poll() is not None else ["it did not end"]
            finally:
                for each in _marked(temporary):
                    each.kill()
        process.wait()
        return process.returncode, printed.read_text("utf-8", "replace"), left

    def try_out(self, case: Case, name: str) -> Verdict:
        """Run the case and judge it."""
        code, output, left = self.run(name, case.processes, case.plan)
        folder = self.folder / "runs" / name
        lines = read_json_lines(folder / "events.jsonl")
        problems = [*left, *([] if code == 0 else [f"it ended with {code}"]), *judge_events(case, lines)]
        problems += [] if code else self._judge(folder, lines)
        return Verdict(tuple(problems), tuple(line["event"] for line in lines), output)

    def forget(self, name: str) -> None:
        """Remove a run's files."""
        shutil.rmtree(self.folder / "runs" / name, ignore_errors=True)

    def _judge(self, folder: Path, lines: Sequence[dict[str, Any]]) -> list[str]:
        saved = listed(folder / "checkpoints")
        if not saved or saved[-1].step != STEPS:
            return [f"the last checkpoint is {saved[-1].step if saved else 'none'}, not {STEPS}"]
        problems = []
        for each in saved:
            try:
                verify(each.folder)
            except CheckpointError as error:
                problems.append(str(error))
        if weights(saved[-1].folder) != self._expected(steps_left_out(lines)):
            problems.append("other weights than without the faults")
        found = audit(folder / "ledger.jsonl")
        if not found.passed:
            problems.append(f"the ledger fails: {found.problems[:1]}")
        known = ("step-", "latest", "damaged-")
        strange = [p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith(known)]
        return problems + [f"{name} is left over" for name in strange]

    def _expected(self, left_out: tuple[int, ...]) -> dict[str, str]:
        """Return the digests of the weights after a one-process run that skips these steps and has no other faults."""
        if left_out not in self._clean:
            name = "-".join(["clean", *map(str, left_out)])
            plan = [{"step": step, "phase": "forward", "rank": 0, "fault": "nan"} for step in left_out]
            code, output, _ = self.run(name, 1, plan)
            assert code == 0, output
            self._clean[left_out] = weights(listed(self.folder / "runs" / name / "checkpoints")[-1].folder)
        return self._clean[left_out]


def judge_events(case: Case, lines: Sequence[dict[str, Any]]) -> list[str]:
    """Return the problems: faults that did not happen exactly once, and numbers of events that do not match the faults."""
    happened = [{key: line[key] for key in case.plan[0]} for line in lines if line["event"] == "fault"]
    problems = [f"did not happen: {fault}" for fault in case.plan if fault not in happened]
    problems += [f"happened unplanned, or twice: {fault}" for fault in _more(happened, case.plan)]
    said = Counter(line["event"] for line in lines)
    # a hang may be reported as a crash of the ranks that waited for the hung one
    wanted = case.must_say
    ends, wanted_ends = (counts["crashed"] + counts["hang"] for counts in (said, wanted))
    if ends != wanted_ends:
        problems.append(f"the workers ended {ends} times, for {wanted_ends} faults")
    problems += [
        f"{event!r} appears {said[event]} times in the events, for {wanted[event]} faults"
        for event in ("left out", "corrupted", "save failed", "loader restarted")
        if said[event] != wanted[event]
    ]
    steps = {fault.step for fault in case.faults if fault.fault == "nan"}
    strange = [line["step"] for line in lines if line["event"] == "left out" and line["step"] not in steps]
    return problems + [f"step {step} was skipped without a fault" for step in strange]


def _more(happened: Sequence[dict[str, Any]], planned: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    left = list(planned)
    more = []
    for each in happened:
        if each in left:
            left.remove(each)
        else:
            more.append(each)
    return more


def steps_left_out(lines: Sequence[dict[str, Any]]) -> tuple[int, ...]:
    """Return the steps that the final weights skip. Steps retaken after a restart or rollback do not count."""
    steps: set[int] = set()
    for line in lines:
        if line["event"] == "left out":
            steps.add(line["step"])
        elif line["event"] in ("started", "went back"):
            steps = {step for step in steps if step <= line["to" if line["event"] == "went back" else "step"]}
    return tuple(sorted(steps))


def _marked(mark: Path) -> list[psutil.Process]:
    """Find the run's processes by the mark in their environment. Forked processes lack it, but have the run's output open."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(mark) or _output_of(process.pid) == str(_printed(mark)):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _printed(mark: Path) -> Path:
    return mark.parents[1] / f"{mark.name}.txt"


def _output_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/fd/1")


def _temporary_files(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def _shared_files(pid: int) -> set[Path]:
    """Return the shared-memory files that a process has mapped or open."""
    process = Path(f"/proc/{pid}")
    try:
        held = {line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()}
        held |= {os.readlink(link) for link in (process / "fd").iterdir()}
    except OSError:
        return set()
    return {Path(path) for path in held if path.startswith("/dev/shm/") and not path.endswith(" (deleted)")}
