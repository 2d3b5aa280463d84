"""The launcher's side of heartbeats: detects a hang and finds the rank that causes it. No torch."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from shoal.elastic.heartbeat import COMPILE, FOLDER, SOONER, Page, Sign, stacks_file

# States in which a process makes no progress by itself, with their descriptions.
STUCK: Final = {
    psutil.STATUS_STOPPED: "stopped (SIGSTOP)",
    psutil.STATUS_TRACING_STOP: "stopped (by a debugger)",
    psutil.STATUS_ZOMBIE: "dead (one of its threads remains)",
    psutil.STATUS_DISK_SLEEP: "waiting for a disk or a device (state D)",
}
LASTING: Final = tuple(state for state in STUCK if state != psutil.STATUS_DISK_SLEEP)
# States in which a process runs no signal handler.
_MUTE: Final = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE)

WORK_SECONDS: Final = 2.0  # interval over which a process's activity is measured
WORK_SHARE: Final = 0.05  # share of a core: threads that only poll a clock use less
WORK_BYTES: Final = 1 << 20  # bytes read from or written to a disk in that interval
LOCAL_PHASES: Final = ("data",)  # phases of a step in which no rank waits for another

PAUSE_SECONDS: Final = 1.0  # a longer gap between checks means that the launcher, and perhaps its workers, were paused
STACKS_SECONDS: Final = 2.0  # maximum wait for stack traces


@dataclass(frozen=True)
class RankStatus:
    """A rank's last heartbeat, and the state of its process ("" if unknown)."""

    rank: int
    sign: Sign
    state: str
    host: str = ""  # the host's name if it is another machine
    works: bool = False  # busy with work that has no time limit


@dataclass(frozen=True)
class Hang:
    """A rank that did not join the others in time."""

    rank: int
    step: int
    phase: str
    silent_seconds: float
    state: str  # its description in `STUCK`, or ""
    host: str  # the host's name if it is another machine, else ""
    stacks: Path | None  # None if they could not be written
    ties: int = 0  # other ranks with the same progress, which only arrived later

    def __str__(self) -> str:
        where = f"{self.phase} of step {self.step}" if self.step else self.phase
        how = f"{self.state} in {where}, {self.silent_seconds:.0f} s ago" if self.state else (
            f"in {where} for {self.silent_seconds:.0f} s"
        )  # fmt: skip
        who = f"rank {self.rank}" + (f" on {self.host}" if self.host else "")
        others = f"; {self.ties} other{'s are' if self.ties > 1 else ' is'} at the same place" if self.ties else ""
        return f"{who} did not join: {how}{others}" + (f"; stacks in {self.stacks}" if self.stacks else "")


def find_culprit(statuses: Sequence[RankStatus]) -> RankStatus:
    """
    Return the rank that the others wait for.

    Prefers a stuck rank to others, then the least advanced, then one that does not wait, then the longest silent.
    """
    return min(statuses, key=lambda each: (_progress(each), each.sign.since))


def count_ties(culprit: RankStatus, statuses: Sequence[RankStatus]) -> int:
    """
    Count the other ranks with the same progress as `culprit`, which was chosen among them only because it arrived first.

    On a GPU, collectives are queued among other work, so nothing shows which rank waits for which.
    """
    return sum(_progress(each) == _progress(culprit) for each in statuses) - 1


def _progress(of: RankStatus) -> tuple[bool, int, int, bool]:
    return of.state not in STUCK, of.sign.step, of.sign.turn, of.sign.waits


class Pauses:
    """The times during which the launcher itself was paused: if a whole machine sleeps, no rank is to blame."""

    def __init__(self, now: float) -> None:
        self._last = now
        self._pauses: list[tuple[float, float]] = []  # (end, seconds)

    def tick(self, now: float) -> None:
        """Record a check at `now`."""
        if now - self._last > PAUSE_SECONDS:
            self._pauses = [*self._pauses[-9:], (now, now - self._last)]
        self._last = now

    def since(self, moment: float) -> float:
        """Return the seconds of all pauses that ended after `moment`."""
        return sum(seconds for end, seconds in self._pauses if end > moment)


class Work:
    """Detects busy processes: those that use a core or a disk, or whose child processes do."""

    def __init__(self) -> None:
        # by process: time of measurement, core seconds, disk bytes
        self._seen: dict[int, tuple[float, float, int]] = {}
        self._found: dict[int, bool] = {}

    def is_busy(self, pid: int, now: float) -> bool:
        """Return whether the process is busy; True until `WORK_SECONDS` after the first call, while it is unknown."""
        before = self._seen.get(pid)
        if before is None:
            self._seen[pid] = (now, *_used(pid))
        elif now - before[0] >= WORK_SECONDS:
            seconds, moved = _used(pid)
            share = (seconds - before[1]) / (now - before[0])
            self._found[pid] = share >= WORK_SHARE or moved - before[2] >= WORK_BYTES
            self._seen[pid] = (now, seconds, moved)
        return self._found.get(pid, True)

    def forget(self, pid: int) -> None:
        """Discard the measurements of a process, so that the next ones start from zero."""
        self._seen.pop(pid, None)
        self._found.pop(pid, None)


def _used(pid: int) -> tuple[float, int]:
    """Return (core seconds, disk bytes read and written) of a process and its descendants since they started."""
    seconds, moved = 0.0, 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                seconds += sum(each.cpu_times()[:4])  # includes children that have ended
                if hasattr(each, "io_counters"):
                    counts = each.io_counters()
                    moved += counts.read_bytes + counts.write_bytes
    return seconds, moved


def may_take_long(sign: Sign) -> bool:
    """
    Return whether a process with this heartbeat may take unlimited time while it is busy, since the machine may be loaded.

    False while it waits for other ranks. False also in `strict` steps after the first, except while it reads data: the user
    set the limit of these steps, or a GPU computes, whose host looks busy while it waits.
    """
    return not sign.waits and not (sign.strict and sign.in_step and sign.taken and sign.phase not in LOCAL_PHASES)


class Watch:
    """The heartbeat pages of this machine's workers. Create it before the workers: they find the folder in their environment."""

    def __init__(self, stacks: Path, folder: Path) -> None:
        """stacks: folder for the stack traces of hangs; folder: existing folder for the pages."""
        self._stacks, self._folder = stacks, folder
        os.environ[FOLDER] = str(folder)
        self._pages: dict[int, tuple[int, Page]] = {}  # by local rank: (rank, page)
        self._pauses = Pauses(time.monotonic())
        self._work = Work()
        self._saved = 0  # newest checkpoint on closed pages

    def start(self, ranks: Sequence[int], seconds: float) -> None:
        """Prepare pages for workers of `ranks`, in local rank order; allow `SOONER` times `seconds` for their first heartbeat."""
        self.close()
        self._pages = {local: (rank, Page(self._folder, local)) for local, rank in enumerate(ranks)}
        for _, page in self._pages.values():
            page.write(0, 0, "start")
            page.took(0)
            page.allow(SOONER * seconds)

    def sign(self, local_rank: int) -> Sign:
        """Return the last heartbeat of a worker, dead or alive."""
        return self._pages[local_rank][1].read()

    def statuses(self, pids: Mapping[int, int]) -> list[RankStatus]:
        """Return the status of the running workers. pids: local rank -> process id."""
        now = time.monotonic()
        signs = {local: self.sign(local) for local in pids}
        return [
            RankStatus(self._pages[local][0], signs[local], _state(pid), works=self._works(pid, signs[local], now))
            for local, pid in pids.items()
        ]

    def taken(self, local_ranks: Iterable[int]) -> int:
        """Return the most steps that any of these workers has taken since it started."""
        return max((self.sign(local).taken for local in local_ranks), default=0)

    def saved(self) -> int:
        """Return the step of the newest checkpoint that a worker reported; 0: none."""
        return max((self._saved, *(page.read().saved for _, page in self._pages.values())))

    def find_hang(self, pids: Mapping[int, int], elsewhere: Callable[[], Sequence[RankStatus]] = list) -> Hang | None:
        """
        Return a hang, with the rank that causes it, if a running worker is late; else None.

        Also None if the causing rank is busy with work that may take long, or if a rank compiles within its time limit. pids: local
        rank -> process id. elsewhere: a function that returns the status of workers on other machines.
        """
        now = time.monotonic()
        self._pauses.tick(now)
        signs = {local: self.sign(local) for local in pids}
        if any(now > sign.until - 2 * WORK_SECONDS for sign in signs.values()):
            self.statuses(pids)  # measure activity ahead of the deadline
        if not any(now > sign.until + self._pauses.since(sign.since) for sign in signs.values()):
            return None
        others = list(elsewhere())
        if any(sign.phase == COMPILE and now <= sign.until for sign in (*signs.values(), *(k.sign for k in others))):
            return None  # the others wait for a compilation, which has its own deadline
        found = find_culprit([*self.statuses(pids), *others])
        if found.works and found.state not in _MUTE:
            return None
        states = {local: _state(pid) for local, pid in pids.items()}
        kept = self._keep_stacks(pids, states, max(sign.step for sign in signs.values()))
        # a rank that writes to a disk is in state D for moments: count it only if it still is
        statuses = [
            RankStatus(self._pages[local][0], signs[local], states[local] if _state(pid) == states[local] else "")
            for local, pid in pids.items()
        ]
        found = find_culprit([*statuses, *others])
        sign = found.sign
        return Hang(
            found.rank, sign.step, sign.phase, now - sign.since, STUCK.get(found.state, ""), found.host, kept,
            count_ties(found, [*statuses, *others]),
        )  # fmt: skip

    def _works(self, pid: int, sign: Sign, now: float) -> bool:
        if may_take_long(sign):
            return self._work.is_busy(pid, now)
        self._work.forget(pid)
        return False

    def close(self) -> None:
        """Close the pages, but remember the newest checkpoint they reported."""
        self._saved = self.saved()
        for _, page in self._pages.values():
            page.close()
        self._pages = {}

    def _keep_stacks(self, pids: Mapping[int, int], states: Mapping[int, str], step: int) -> Path | None:
        """Write the stacks of all threads of this machine's workers to one file; return its path, None if it cannot be written."""
        asked = {local: pid for local, pid in pids.items() if states[local] not in _MUTE}
        for pid in asked.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
        self._await_stacks(list(asked))
        parts = []
        for local in pids:
            rank, sign = self._pages[local][0], self.sign(local)
            parts.append(
                f"rank {rank}: {sign.phase} of step {sign.step}; process {pids[local]} is {states[local] or 'gone'}\n"
            )
            file = stacks_file(self._folder, local)
            parts.append(file.read_text("utf-8", "replace") if local in asked and file.is_file() else "  no stacks\n")
        try:
            self._stacks.mkdir(parents=True, exist_ok=True)
            path = self._stacks / f"{time.strftime('%Y%m%d-%H%M%S')}-step-{step}-{socket.gethostname()}.txt"
            path.write_text("\n".join(parts), encoding="utf-8")
        except OSError:
            return None  # a full disk must not prevent the restart
        return path

    def _await_stacks(self, asked: Sequence[int]) -> None:
        """Wait until the files exist and stop growing."""
        sizes: list[int] = []
        end = time.monotonic() + STACKS_SECONDS
        while time.monotonic() < end:
            time.sleep(0.1)
            files = [stacks_file(self._folder, local) for local in asked]
            before, sizes = sizes, [file.stat().st_size if file.is_file() else 0 for file in files]
            if all(sizes) and sizes == before:
                return


def _state(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return ""
