"""Four hosts for the doctor, with a way to reach them like ssh, and what a test needs to make one of them ill."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from shoal.doctor.examine import Plan, examine
from shoal.doctor.findings import Report
from shoal.doctor.judge_node import Wanted
from shoal.doctor.reach import by_ssh
from tests.cluster.host import Host, Switch

NAMES: Final = ("d1", "d2", "d3", "d4")
PORTS: Final = (29400, 29500)
# reach HOST LINE: like ssh, it enters the host and gives the line to a shell there, which first reads the host's profile
_REACH: Final = """#!/bin/sh
pid=$(cat "{folder}/$1/pid") || { echo "ssh: connect to host $1: No route to host" >&2; exit 255; }
exec nsenter --target "$pid" --net --uts --mount --pid --ipc -- sh -c ". {folder}/$1/profile; $2"
"""


class Clinic:
    """Four hosts on one switch. `shared` is a folder that all see; each has /dev/shm and /mnt of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.shared = folder, folder / "disk" / "shared"
        self.shared.mkdir(parents=True)
        self.switch = Switch("switch", folder)
        self.hosts = {name: Host(name, folder, self.switch, 11 + i) for i, name in enumerate(NAMES)}
        for host in self.hosts.values():
            host.know(self.addresses)
            (host.folder / "profile").write_text("", encoding="utf-8")
            (host.folder / "pid").write_text(str(host.pid), encoding="utf-8")
        self.reach = self.script(folder / "reach", _REACH.replace("{folder}", str(folder)))

    @property
    def addresses(self) -> dict[str, str]:
        return {name: host.address for name, host in self.hosts.items()}

    def close(self) -> None:
        for host in (*self.hosts.values(), self.switch):
            host.power_off()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def examine(
        self,
        *,
        quick: bool = True,
        shared: Path | None = None,
        wanted: Wanted | None = None,
        names: tuple[str, ...] = NAMES,
    ) -> Report:
        """Examine the hosts as `shoal doctor --hosts d1,d2,d3,d4 --ssh "reach {host}"` does."""
        commands = {name: by_ssh(name, f"{self.reach} {{host}}") for name in names}
        report = Report(list(commands))
        examine(Plan(commands, shared or self.shared, PORTS, wanted or Wanted(), quick), report)
        return report

    @staticmethod
    def script(path: Path, text: str) -> Path:
        """Write a program."""
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        return path

    @contextlib.contextmanager
    def profile(self, name: str, text: str) -> Iterator[None]:
        """Let a host's shells begin with `text`."""
        file = self.hosts[name].folder / "profile"
        file.write_text(f"{text}\n", encoding="utf-8")
        try:
            yield
        finally:
            file.write_text("", encoding="utf-8")

    @contextlib.contextmanager
    def program(self, name: str, program: str, text: str) -> Iterator[None]:
        """Give a host a program of its own, before those of the same name."""
        folder = self.hosts[name].folder / "bin"
        self.script(folder / program, text)
        try:
            with self.profile(name, f'PATH="{folder}:$PATH"'):
                yield
        finally:
            (folder / program).unlink()

    @contextlib.contextmanager
    def mounted(self, name: str, at: str | os.PathLike[str], *options: str) -> Iterator[None]:
        """Mount a disk in memory on one host, or with a `--bind` what `options` say."""
        kind = () if "--bind" in options else ("-t", "tmpfs")
        host = self.hosts[name]
        host.run("mount", *kind, *options, *(("tmpfs",) if kind else ()), str(at))
        try:
            yield
        finally:
            host.run("umount", "--lazy", str(at))

    @contextlib.contextmanager
    def known(self, name: str, **addresses: str | None) -> Iterator[None]:
        """Change what a host's /etc/hosts says of names; None removes one."""
        host = self.hosts[name]
        host.know({n: a for n, a in (self.addresses | addresses).items() if a is not None})
        try:
            yield
        finally:
            host.know(self.addresses)

    @contextlib.contextmanager
    def done(self, name: str, command: str, undo: str) -> Iterator[None]:
        """Run a shell command on a host (or the switch), and `undo` at the end."""
        host = self.switch if name == "switch" else self.hosts[name]
        host.run("sh", "-c", command)
        try:
            yield
        finally:
            host.run("sh", "-c", undo)
