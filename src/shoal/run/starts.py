"""
Notes of a run's launchers on several nodes: `launchers.jsonl`. No torch.

A launcher that waits for the others reads here if one of them has ended with an error, or meets elsewhere. Launchers that
cannot reach each other over the network can still read the run's folder.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shoal.run.jsonl import object_of
from shoal.system.output import on_one_line

RECENT_SECONDS: Final = 20.0  # launchers of one start begin within this time of each other
MEETING_SECONDS: Final = 60.0  # and reach the rendezvous within this time of each other
# The same on all nodes that one command starts, with the number of nodes at its end; set by `shoal launch hosts`.
START: Final = "SHOAL_START"


def start_id(environment: Mapping[str, str] = os.environ) -> str:
    """Return a name of this start of the run that is the same on all its nodes; empty if there is none."""
    if START in environment:
        return environment[START]
    if "SLURM_JOB_ID" in environment:
        return f"slurm-{environment['SLURM_JOB_ID']}-{environment.get('SLURM_RESTART_COUNT', '0')}"
    return ""


def started_with(environment: Mapping[str, str] = os.environ) -> int:
    """Return how many launchers were started together, spares included; 0 if that is unknown."""
    text = environment.get(START, "").rpartition("-")[2] or environment.get("SLURM_STEP_NUM_TASKS", "")
    return int(text) if text.isascii() and text.isdigit() else 0


class Starts:
    """This launcher's notes, and those of the launchers on other nodes. Never raises `OSError`."""

    def __init__(self, path: Path, host: str | None = None, start: str | None = None) -> None:
        """path: the file. host: this node's name. start: see `start_id`. None takes the real ones."""
        self._path = path
        self._host = host or socket.gethostname()
        self._start = start_id() if start is None else start
        self._began = time.time()
        self._offset = self._beginning()

    def begin(self) -> None:
        """Note that this launcher has begun. This outdates an earlier error of this node."""
        self._note("begins")

    def fail(self, problem: str) -> None:
        """Note that this launcher ends with `problem`, before it has joined the others."""
        self._note("fails", problem=problem)

    def meet(self, store: str, address: str) -> None:
        """Note that this launcher has reached the rendezvous with the id `store`, at `address`."""
        self._note("meets", store=store, address=address)

    def problems(self) -> dict[str, str]:
        """Return the errors with which launchers of this start ended on other nodes, by host."""
        return {
            host: on_one_line(note.get("problem", ""))
            for host, note in self._latest().items()
            if note.get("what") == "fails"
        }

    def reached(self) -> list[str]:
        """Return the other hosts whose launchers have lately reached the rendezvous."""
        return sorted(host for host, note in self._latest().items() if _met_lately(note))

    def elsewhere(self, store: str) -> dict[str, str]:
        """Return the addresses at which launchers on other nodes meet, by host, if that is not the rendezvous `store`."""
        return {
            host: on_one_line(note.get("address", ""))
            for host, note in self._latest().items()
            if _met_lately(note) and note.get("store") != store
        }

    def _beginning(self) -> int:
        """Return the offset of this process's first note, or the size of the file: notes beyond it are newer than this launcher."""
        at = 0
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            for line in file:
                note = object_of(line) or {}
                if (note.get("pid"), note.get("host"), note.get("what")) == (os.getpid(), self._host, "begins"):
                    return at
                at += len(line)
        return at

    def _latest(self) -> dict[str, dict[str, Any]]:
        """Return the last note of each other host that belongs to this start."""
        found: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            at = 0
            for line in file:
                note = object_of(line)
                if note is not None and self._is_of_this_start(note, at):
                    found[on_one_line(note.get("host", ""))] = note
                at += len(line)
        return {host: note for host, note in found.items() if host != self._host}

    def _is_of_this_start(self, note: Mapping[str, Any], at: int) -> bool:
        """Return whether a note belongs to this start. at: its offset in the file; clocks of nodes may differ by hours."""
        theirs = note.get("start", "")
        if self._start and theirs:
            return bool(theirs == self._start)
        return at >= self._offset or abs(float(note.get("time", 0.0)) - self._began) < RECENT_SECONDS

    def _note(self, what: str, **facts: str) -> None:
        from shoal.run.events import Events

        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        notes = Events(self._path)
        notes.add(
            {"time": time.time(), "what": what, "host": self._host, "pid": os.getpid(), "start": self._start, **facts}
        )
        notes.close()


def _met_lately(note: Mapping[str, Any]) -> bool:
    return note.get("what") == "meets" and abs(float(note.get("time", 0.0)) - time.time()) < MEETING_SECONDS
