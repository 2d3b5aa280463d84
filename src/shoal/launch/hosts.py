"""A file of hosts, and a command that runs on all of them over ssh. No torch."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from shoal.errors import EXIT_BAD_INPUT, EXIT_REQUEUE, LaunchError
from shoal.fault.limit import ENDS
from shoal.launch.attached import ATTACHED, task
from shoal.system.network import is_here
from shoal.system.output import on_one_line, say_error, visible

SSH: Final = "ssh -T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
EXAMPLE: Final = "a line is a host's name, such as node0 or alice@node0, and perhaps slots=8 and port=22"
_UNREACHABLE: Final = 255  # ssh's own exit code


@dataclass(frozen=True)
class Host:
    """A node to reach by ssh. `slots`: its number of processes, if the file has it."""

    name: str
    user: str | None = None
    port: int | None = None
    slots: int | None = None

    @property
    def target(self) -> str:
        return f"{self.user}@{self.name}" if self.user else self.name


def read_hosts(path: Path) -> list[Host]:
    """Return the hosts of a file, in order. Raises `LaunchError` if it cannot be read, or for a line that is not a host."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise LaunchError(f"cannot read the hosts file {on_one_line(path)}: {why}") from None
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host = _host(words)
        if isinstance(host, str):
            raise LaunchError(f"{on_one_line(path)}:{number}: {host}; {EXAMPLE}")
        if any(other.name == host.name for other in hosts):
            raise LaunchError(f"{on_one_line(path)}:{number}: {host.name} is there twice; write each host once")
        hosts.append(host)
    if not hosts:
        raise LaunchError(f"{on_one_line(path)} names no host; {EXAMPLE}")
    return hosts


def _host(words: Sequence[str]) -> Host | str:
    """Return the host that a line's words describe, or the problem."""
    user, _, name = words[0].rpartition("@")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.:-]*", name) or not re.fullmatch(r"([A-Za-z0-9_][\w.-]*)?", user):
        return f"{on_one_line(words[0])!r} is not a host"
    numbers: dict[str, int] = {}
    for word in words[1:]:
        key, _, value = word.partition("=")
        if key not in ("slots", "port") or not (value.isascii() and value.isdigit()) or int(value) < 1:
            return f"{on_one_line(word)!r} is not slots=N or port=N"
        numbers[key] = int(value)
    return Host(name, user or None, numbers.get("port"), numbers.get("slots"))


def common_slots(hosts: Sequence[Host]) -> int | None:
    """Return the slots of every host, None if no host has any. Raises `LaunchError` if hosts differ."""
    counts = {host.slots for host in hosts}
    if len(counts) > 1:
        named = ", ".join(f"{host.name} {host.slots or 'none'}" for host in hosts[:8])
        raise LaunchError(
            f"all nodes of a run have as many processes, but slots differ: {named}; write the same slots=N for all"
        )
    return counts.pop()


def _without_slurm() -> dict[str, str]:
    """Return this process's environment without the tasks of Slurm, which are not those of a command on hosts."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == ENDS}


class Hosts:
    """The same command on several hosts: its output comes with the host's name, and signals go to all."""

    def __init__(self, hosts: Sequence[Host], ssh: str = SSH, python: str | None = None) -> None:
        """ssh: the command that reaches a host. python: the interpreter there; None: the same path as here."""
        self._hosts, self._ssh, self._python = hosts, shlex.split(ssh), python or sys.executable
        self._processes: dict[Host, subprocess.Popen[str]] = {}
        self._attached: set[Host] = set()
        self._last_words: dict[Host, str] = {}
        self._ended: queue.SimpleQueue[Host] = queue.SimpleQueue()
        self._print = threading.Lock()

    def start(self, command: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
        """Start `command`, the arguments of the interpreter, on all hosts. Raises `LaunchError` if there is no ssh command."""
        line = task([self._python, *command], folder, environment)
        for host in self._hosts:
            try:
                process = subprocess.Popen(
                    self._reach(host), env=_without_slurm(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self.signal("SIGTERM")
                raise LaunchError(f"cannot run {self._ssh[0]}: {error.strerror}") from None
            self._processes[host] = process
            self._order(process, line)
            threading.Thread(target=self._follow, args=(host, process), daemon=True).start()

    def signal(self, name: str) -> None:
        """Send the command a signal on every host, by name: SIGTERM or SIGINT."""
        for process in self._processes.values():
            self._order(process, f"{name}\n")

    def wait(self, fewest: int) -> int:
        """
        Wait until the command has ended on all hosts; return the exit code of the whole.

        It ends everywhere if hosts cannot be reached and fewer than `fewest` are left. 2 if any ended with it or too few can be
        reached, else 1 if any failed, 85 if any must be resumed, and 0.
        """
        unreachable: list[str] = []
        for _ in self._hosts:
            host = self._ended.get()
            code = self._processes[host].returncode
            if host in self._attached:
                self._tell(
                    host, sys.stderr, "the connection was lost" if code == _UNREACHABLE else f"ended with {code}"
                )
                continue
            words = self._last_words.get(host) or f"{self._ssh[0]} ended with {code}"
            unreachable.append(host.name)
            self._tell(host, sys.stderr, f"cannot be reached: {words}")
            if len(self._hosts) - len(unreachable) == fewest - 1:
                self.signal("SIGTERM")
        if len(self._hosts) - len(unreachable) < fewest:
            say_error(f"the run needs {fewest} hosts, but {', '.join(unreachable)} cannot be reached")
        return self._outcome(len(unreachable), fewest)

    def _outcome(self, unreachable: int, fewest: int) -> int:
        codes = [process.returncode for host, process in self._processes.items() if host in self._attached]
        if len(self._hosts) - unreachable < fewest or EXIT_BAD_INPUT in codes:
            return EXIT_BAD_INPUT
        others = [code for code in codes if code not in (0, EXIT_REQUEUE, _UNREACHABLE)]
        if others or not codes:
            return 1
        return 0 if 0 in codes else EXIT_REQUEUE

    def _reach(self, host: Host) -> list[str]:
        attached = [self._python, "-m", "shoal.launch.attached"]
        if self._ssh == shlex.split(SSH) and is_here(host.name, option="the hosts file"):
            return attached
        port = ["-p", str(host.port)] if host.port else []
        return [*self._ssh, *port, host.target, shlex.join(attached)]

    def _follow(self, host: Host, process: subprocess.Popen[str]) -> None:
        """Print the lines of a host's output until it ends."""
        assert process.stdout is not None
        assert process.stderr is not None
        errors = threading.Thread(target=self._copy, args=(host, process.stderr, sys.stderr), daemon=True)
        errors.start()
        self._copy(host, process.stdout, sys.stdout)
        errors.join()
        process.wait()
        self._ended.put(host)

    def _copy(self, host: Host, lines: IO[str], to: IO[str]) -> None:
        for line in lines:
            if to is sys.stdout and line.rstrip("\n") == ATTACHED:
                self._attached.add(host)
                continue
            if host not in self._attached:  # ssh's own words, told once with the outcome
                self._last_words[host] = line.strip()
                continue
            self._tell(host, to, line.rstrip("\n"))

    def _tell(self, host: Host, to: IO[str], line: str) -> None:
        with self._print:
            print(f"{host.name}: {visible(line)}", file=to, flush=True)

    @staticmethod
    def _order(process: subprocess.Popen[str], line: str) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended
            process.stdin.write(line)
            process.stdin.flush()
