"""How nodes are reached: a probe on each, started here, by ssh or by srun, that answers requests over its pipes. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.doctor.probe import MARK
from shoal.system.output import on_one_line

START_SECONDS: Final = 30.0  # to log in and to start Python from a shared disk
# Variables that choose the network, which ssh does not hand on. srun does.
HANDED_ON: Final = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "TMPDIR")
END_SECONDS: Final = 2.0  # that probes have to end
_LAST_WORDS: Final = 20  # lines of standard error that are kept


@dataclass(frozen=True)
class Silence:
    """No answer from a node. why: the reason, in words. is_over: whether the probe has ended, rather than being late."""

    why: str
    is_over: bool


def here(python: str = sys.executable) -> list[str]:
    """Return the command that starts a probe on this machine."""
    return [python, "-m", "shoal.doctor.probe"]


def by_ssh(host: str, template: str, python: str = sys.executable) -> list[str]:
    """
    Return the command that starts a probe on `host` through ssh, in this working folder.

    template: a command with {host}; it gets one more argument, a line for the shell there.
    """
    handed = [f"{name}={os.environ[name]}" for name in HANDED_ON if name in os.environ]
    folder = shlex.quote(str(Path.cwd()))
    line = f"cd {folder} 2>/dev/null; exec {shlex.join(['env', *handed, *here(python)])}"
    return [part.replace("{host}", host) for part in shlex.split(template)] + [line]


def by_srun(host: str, python: str = sys.executable) -> list[str]:
    """Return the command that starts a probe on a node of the Slurm job, beside the job's other steps."""
    # Without binding, the probe sees all cores that the job has on the node, not the one that a task gets by default
    options = ("--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={host}", "--cpu-bind=none", "--mpi=none", "--quiet")
    return ["srun", *options, *here(python)]


class Node:
    """A node and its probe."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Start the probe; returns at once. A command that does not exist counts as an ended probe."""
        self.name = name
        self._number = 0
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._words: deque[str] = deque(maxlen=_LAST_WORDS)
        self._process: subprocess.Popen[str] | None = None
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", bufsize=1,
                start_new_session=True,  # a Ctrl-C reaches this process alone, which then closes the pipes
            )  # fmt: skip
        except OSError as error:
            self._words.append(f"{command[0]}: {error.strerror}")
            self._answers.put(None)
            return
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._read_answers, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def request(self, do: str, arguments: Mapping[str, Any]) -> None:
        """Send a request; `answer` returns the result."""
        self._number += 1
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError, ValueError):  # it has ended, or was closed; `answer` says why
            self._process.stdin.write(json.dumps({"id": self._number, "do": do, "with": dict(arguments)}) + "\n")
            self._process.stdin.flush()

    def answer(self, end: float) -> Any:
        """Return the answer to the last request, or a `Silence` if none comes until `end`, in monotonic seconds."""
        while True:
            try:
                found = self._answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return Silence("no answer in time", is_over=False)
            if found is None:
                self._answers.put(None)
                return Silence(self._why_it_ended(), is_over=True)
            if found.get("id") != self._number:
                continue  # the late answer to an earlier request
            if "error" in found:
                return Silence(str(found["error"]), is_over=False)
            return found["answer"]

    def end(self) -> None:
        """Let the probe end, which it does when its input ends; returns at once."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def close(self, end: float) -> None:
        """End the probe, and kill the process that started it if it is still there at `end`, in monotonic seconds."""
        self.end()
        if self._process is None:
            return
        try:
            self._process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _why_it_ended(self) -> str:
        if self._process is None:
            return self._words[-1]
        for thread in self._threads:
            thread.join(1.0)
        words = [line for line in self._words if line.strip()]
        code = self._process.poll()
        return on_one_line(words[-1].strip()) if words else f"the command ended with {code} and printed nothing"

    def _read_answers(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            _, mark, text = line.partition(MARK)  # a login shell may print a greeting before
            if mark:
                self._answers.put(json.loads(text))
        self._answers.put(None)

    def _read_errors(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        self._words.extend(self._process.stderr)


def close_all(nodes: Sequence[Node]) -> None:
    """End all probes, at the same time."""
    for node in nodes:
        node.end()
    end = time.monotonic() + END_SECONDS
    for node in nodes:
        node.close(end)


def ask_all(nodes: Sequence[Node], do: str, seconds: float, **arguments: Any) -> dict[str, Any]:
    """Send one request to all nodes; return {node's name: answer or `Silence`}. seconds: time limit for all together."""
    return ask_each(dict.fromkeys(nodes, arguments), do, seconds)


def ask_each(requests: Mapping[Node, Mapping[str, Any]], do: str, seconds: float) -> dict[str, Any]:
    """Send to each node a request with arguments of its own; see `ask_all`."""
    end = time.monotonic() + seconds
    for node, arguments in requests.items():
        node.request(do, arguments)
    return {node.name: node.answer(end) for node in requests}
