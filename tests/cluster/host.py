"""
A host with a name, an address, processes and a /dev/shm of its own: a set of Linux namespaces on this machine. Needs root.

    switch = Switch(folder)                     # a host with a bridge; it may serve as a login node
    node = Host("n1", folder, switch)           # plugged into the bridge
    node.run("hostname")                        # n1
    node.power_off()                            # the kernel kills its processes at once; its cable is gone

The namespaces have no names: they end with the host's first process, and that ends with this process, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

PATIENCE_SECONDS: Final = float(os.environ.get("TEST_PATIENCE_SECONDS", "150"))  # for a command
NETWORK: Final = "10.66.0."  # in namespaces of its own, so beds beside each other may all use it
LOCAL: Final = "/mnt"  # a disk of each host's own, in memory
SPACES: Final = ("--net", "--uts", "--mount", "--pid", "--ipc")
# bash, as the first process of its pid namespace, reaps whatever is orphaned in it
_INIT: Final = f"""
set -e
mount --bind "$0/hosts" /etc/hosts
mount --bind "$0/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o size=64m tmpfs {LOCAL}
hostname "$1"
ip link set lo up
echo up
while :; do sleep infinity & wait; done
"""
_SWITCH_FILES: Final = "passwd: files\ngroup: files\nhosts: files\n"  # a question to a name server would only time out


class Host:
    """One host. `folder/NAME` holds its files; `switch` is None for a host without a cable."""

    def __init__(self, name: str, folder: Path, switch: Switch | None, number: int) -> None:
        """Start the host. number: the last part of its address, 1 to 254."""
        self.name, self.folder, self.address = name, folder / name, f"{NETWORK}{number}"
        self.variables: dict[str, str] = {}  # of the environment of its commands
        self._switch = switch
        self.folder.mkdir(exist_ok=True)
        (self.folder / "nsswitch.conf").write_text(_SWITCH_FILES, encoding="utf-8")
        self.know({})
        self._outer: subprocess.Popen[str] | None = None
        self.power_on()

    def know(self, addresses: Mapping[str, str]) -> None:
        """Write /etc/hosts: addresses by name. The file is written in place, since it is mounted."""
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @property
    def is_on(self) -> bool:
        return self._outer is not None

    @property
    def pid(self) -> int:
        """The host's first process, by its number outside."""
        assert self._outer is not None, f"{self.name} is off"
        return int(psutil.Process(self._outer.pid).children()[0].pid)

    def processes(self) -> list[psutil.Process]:
        """Return the host's processes, all but the first, by their numbers outside."""
        mine, found = os.readlink(f"/proc/{self.pid}/ns/pid"), []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if process.pid != self.pid and os.readlink(f"/proc/{process.pid}/ns/pid") == mine:
                    found.append(process)
        return found

    def power_on(self) -> None:
        """Start the host, with empty local disks and no processes, and plug its cable in."""
        assert self._outer is None
        self._outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *SPACES, "--mount-proc", "--kill-child", "--fork",
             "bash", "-c", _INIT, str(self.folder), self.name],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True, env=environment(),
        )  # fmt: skip
        assert self._outer.stdout is not None
        if self._outer.stdout.readline() != "up\n":
            self._outer = None
            raise RuntimeError(f"the host {self.name} did not start: are namespaces and mounting allowed here?")
        if self._switch is not None:
            self._switch.plug(self)

    def power_off(self) -> None:
        """Kill all processes of the host at once, as a loss of power would."""
        if self._outer is not None:
            self._outer.kill()
            self._outer.wait()
            self._outer = None

    def start(self, *command: str, cwd: Path | None = None, **variables: str) -> subprocess.Popen[str]:
        """Start a command on the host; its output and errors come in one pipe."""
        return subprocess.Popen(
            ["nsenter", "--target", str(self.pid), *SPACES, f"--wdns={cwd or self.folder}", "--", *command],
            env=environment() | self.variables | variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    def run(self, *command: str, cwd: Path | None = None, seconds: float = PATIENCE_SECONDS, **variables: str) -> str:
        """Run a command on the host and return its output. Raises AssertionError, with the output, if it fails."""
        code, output = self.attempt(*command, cwd=cwd, seconds=seconds, **variables)
        assert code == 0, f"{self.name}: {' '.join(command)} ended with {code}:\n{output}"
        return output

    def attempt(
        self, *command: str, cwd: Path | None = None, seconds: float = PATIENCE_SECONDS, **variables: str
    ) -> tuple[int, str]:
        """Run a command on the host; return (exit code, output)."""
        process = self.start(*command, cwd=cwd, **variables)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill(process)
            raise AssertionError(f"{self.name}: {' '.join(command)} did not end within {seconds:.0f} s") from None
        return process.returncode, output

    def link(self, state: str) -> None:
        """Set the cable "up" or "down"."""
        self.run("ip", "link", "set", "eth0", state)

    def slow_down(self, rate: str) -> None:
        """Limit what the host sends, to "8mbit" for example, until it is off."""
        shape = ("tbf", "rate", rate, "burst", "32kb", "latency", "400ms")
        self.run("tc", "qdisc", "replace", "dev", "eth0", "root", *shape)

    def speed_up(self) -> None:
        """Undo `slow_down`."""
        self.attempt("tc", "qdisc", "del", "dev", "eth0", "root")

    def part_from(self, other: Host) -> None:
        """Drop what this host sends to `other`, which cuts both ways for TCP."""
        self.run("ip", "route", "replace", "blackhole", f"{other.address}/32")

    def rejoin(self) -> None:
        """Undo every `part_from`."""
        self.run("ip", "route", "flush", "type", "blackhole")


class Switch(Host):
    """A host with a bridge, into which the other hosts are plugged."""

    def __init__(self, name: str, folder: Path) -> None:
        self._ports = 0
        super().__init__(name, folder, None, 1)

    def power_on(self) -> None:
        super().power_on()
        self.run("ip", "link", "add", "bridge", "type", "bridge")
        self.run("ip", "addr", "add", f"{self.address}/24", "dev", "bridge")
        self.run("ip", "link", "set", "bridge", "up")

    def plug(self, host: Host) -> None:
        """Join the host's interface eth0 to the bridge by a cable."""
        self._ports += 1
        port = f"port{self._ports}"
        # only the network of this host is entered: in its pid namespace, the number of the other's process means nothing
        here = ["nsenter", "--target", str(self.pid), "--net", "--", "ip", "link"]
        there = ["type", "veth", "peer", "name", "eth0", "netns", str(host.pid)]
        subprocess.run([*here, "add", port, *there], check=True, env=environment())
        self.run("ip", "link", "set", port, "master", "bridge", "up")
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")


def lacking() -> str:
    """Return why hosts cannot be made here, "" if they can."""
    tried = ["unshare", *SPACES, "--fork", "mount", "-t", "tmpfs", "tmpfs", LOCAL]
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("nsenter") is None:
        return "hosts need root, Linux and nsenter"
    if subprocess.run(tried, check=False, capture_output=True).returncode:
        return "hosts need namespaces, which are not allowed here"
    return ""


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a command that `Host.start` began: nsenter, and what it runs."""
    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.wait()


def environment() -> dict[str, str]:
    """Return this process's environment without variables of launchers, with the administrator's commands in PATH."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CI")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("SLURM_", "PYTEST_"))}
    return kept | {"PATH": f"{kept.get('PATH', '/usr/bin:/bin')}:/usr/sbin:/sbin", "OMP_NUM_THREADS": "1"}
