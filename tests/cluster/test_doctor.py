"""Faults planted in one of four hosts: the doctor names the fault and the host, and nothing else."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

import shoal
from shoal.doctor.folder import disk_of
from tests.cluster.clinic import Clinic
from tests.cluster.cures import memory_limit

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or shutil.which("nsenter") is None,
    reason="hosts in namespaces need Linux, root and nsenter",
)
needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="firewalls need the package nftables")
FAKETIME = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu" / "faketime" / "libfaketimeMT.so.1"
SOURCE = Path(shoal.__file__).parents[1]

Fault = Callable[[Clinic], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    try:
        clinic = Clinic(tmp_path_factory.mktemp("clinic"))
    except (RuntimeError, AssertionError, subprocess.CalledProcessError) as error:
        pytest.skip(f"hosts in namespaces are not allowed here: {error}")
    with clinic:
        yield clinic


def listening(clinic: Clinic, name: str, port: int) -> AbstractContextManager[None]:
    """Let another program listen on a port of a host."""

    @contextlib.contextmanager
    def listen() -> Iterator[None]:
        code = f"import socket; s = socket.create_server(('', {port})); print('up', flush=True); s.accept()"
        process = clinic.hosts[name].start(sys.executable, "-c", code)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        try:
            yield
        finally:
            process.kill()
            process.wait()

    return listen()


def firewall(clinic: Clinic, name: str, rule: str) -> AbstractContextManager[None]:
    """Add a rule to what a host lets in."""
    table = f"table inet clinic {{\n chain input {{\n type filter hook input priority 0;\n {rule}\n }}\n }}"
    return clinic.done(name, f"printf '%s\\n' '{table}' | nft -f -", "nft delete table inet clinic")


def forged_torch(clinic: Clinic) -> AbstractContextManager[None]:
    """Let d4 have another version of torch, as far as its metadata tells."""
    folder = clinic.hosts["d4"].folder / "site"
    (folder / "torch-2.0.0.dist-info").mkdir(parents=True, exist_ok=True)
    (folder / "torch-2.0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.0\n")
    return clinic.profile("d4", f"export PYTHONPATH={folder}")


def other_code(clinic: Clinic) -> AbstractContextManager[None]:
    """Let d2 have a copy of shoal with one line more."""
    copy = clinic.hosts["d2"].folder / "src"
    if not copy.exists():
        shutil.copytree(SOURCE / "shoal", copy / "shoal", ignore=shutil.ignore_patterns("__pycache__", "static"))
        with (copy / "shoal" / "errors.py").open("a", encoding="utf-8") as file:
            file.write("# changed\n")
    return clinic.profile("d2", f"export PYTHONPATH={copy}")


def read_only(clinic: Clinic) -> AbstractContextManager[None]:
    at = clinic.shared
    return clinic.done("d4", f"mount --bind {at} {at} && mount -o remount,bind,ro {at}", f"umount --lazy {at}")


def quota(clinic: Clinic) -> AbstractContextManager[None]:
    """Let d2's `quota` report that 99% of the blocks are used, in the format of `quota -w -p`."""
    line = f"{disk_of(clinic.shared)} 990000 0 1000000 0 12 0 0 0"
    return clinic.program("d2", "quota", f"#!/bin/sh\necho 'Disk quotas for user root (uid 0):'\necho '{line}'\n")


def slow_disk(clinic: Clinic) -> AbstractContextManager[None]:
    """Let d3 wait for two seconds whenever it flushes much to a disk."""
    folder = clinic.hosts["d3"].folder / "slow"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import os, time\nplain = os.fsync\ndef slow(fd):\n    time.sleep(2 * (os.fstat(fd).st_size > 1000))\n    plain(fd)\n"
        "os.fsync = slow\n"
    )
    return clinic.profile("d3", f"export PYTHONPATH={folder}")


def unknown_to_all(clinic: Clinic) -> AbstractContextManager[None]:
    stack = ExitStack()
    for name in ("d1", "d2", "d4"):
        stack.enter_context(clinic.known(name, d3=None))
    return stack


def other_user(clinic: Clinic) -> AbstractContextManager[None]:
    """Let d2's probe run with another number of the user, who may still write to the shared folder."""
    clinic.shared.chmod(0o777)
    return clinic.program("d2", "env", '#!/bin/sh\nexec setpriv --reuid 4242 --clear-groups /usr/bin/env "$@"\n')


FAULTS: dict[str, tuple[Fault, set[tuple[str, tuple[str, ...]]]]] = {
    "no shoal": (lambda c: c.mounted("d2", SOURCE / "shoal"), {("no-shoal", ("d2",))}),
    "one host does not know another": (lambda c: c.known("d1", d3=None), {("name-unknown", ("d1", "d3"))}),
    "no host knows another": (unknown_to_all, {("name-unknown", ("d3",))}),
    "own name is loopback": (lambda c: c.known("d2", d2="127.0.1.1"), {("name-loopback", ("d2",))}),
    "name of another host": (lambda c: c.known("d4", d2=c.addresses["d3"]), {("name-wrong", ("d2", "d4"))}),
    "no such interface": (lambda c: c.profile("d3", "export GLOO_SOCKET_IFNAME=eth7"), {("interface", ("d3",))}),
    "interface is down": (
        lambda c: ExitStackOf(
            c.done("d1", "ip link add ib0 type dummy", "ip link del ib0"),
            c.profile("d1", "export NCCL_SOCKET_IFNAME=ib"),
        ),
        {("interface", ("d1",))},
    ),
    "another MTU": (
        lambda c: c.done("d2", "ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500"),
        {("mtu", ("d2",))},
    ),
    "a route is missing": (
        lambda c: c.done("d1", "ip route add unreachable 10.66.0.14/32", "ip route del unreachable 10.66.0.14/32"),
        {("port-blocked", ("d1", "d4"))},
    ),
    "a port is in use": (lambda c: listening(c, "d3", 29500), {("port-in-use", ("d3",))}),
    "other code": (other_code, {("code", ("d2",))}),
    "another torch": (forged_torch, {("package-version", ("d4",))}),
    "another user": (other_user, {("user", ("d2",))}),
    "memory of the cgroup": (lambda c: memory_limit(c, "d1", 1 << 30), {("memory", ("d1",))}),
    "few open files": (lambda c: c.profile("d2", "ulimit -n 256"), {("open-files", ("d2",))}),
    "few processes": (lambda c: c.profile("d2", "ulimit -u 100"), {("processes", ("d2",))}),
    "small /dev/shm": (lambda c: c.mounted("d2", "/dev/shm", "-o", "size=16m"), {("shm", ("d2",))}),
    "read-only /dev/shm": (lambda c: c.mounted("d4", "/dev/shm", "-o", "ro"), {("shm", ("d4",))}),
    "full TMPDIR": (lambda c: c.profile("d3", "export TMPDIR=/mnt"), {("tmp", ("d3",))}),
    "no inodes in TMPDIR": (
        lambda c: ExitStackOf(c.mounted("d3", "/mnt", "-o", "nr_inodes=5"), c.profile("d3", "export TMPDIR=/mnt")),
        {("tmp", ("d3",))},
    ),
    "not shared": (lambda c: c.mounted("d3", c.shared, "-o", "size=2g"), {("not-shared", ("d3",))}),
    "not shared, on the first": (lambda c: c.mounted("d1", c.shared, "-o", "size=2g"), {("not-shared", ("d1",))}),
    "no shared folder": (lambda c: c.mounted("d2", c.shared.parent, "-o", "size=2g"), {("shared-missing", ("d2",))}),
    "read-only shared folder": (read_only, {("read-only", ("d4",))}),
    "quota": (quota, {("quota", ("d2",))}),
    "slow disk": (slow_disk, {("shared-slow", ("d3",))}),
}


class ExitStackOf(ExitStack):
    """Enters several contexts at once."""

    def __init__(self, *contexts: AbstractContextManager[None]) -> None:
        super().__init__()
        for context in contexts:
            self.enter_context(context)


def found_in(clinic: Clinic, **options: object) -> set[tuple[str, tuple[str, ...]]]:
    """Return (fault, hosts) of all faults; warnings are left aside."""
    report = clinic.examine(**options)  # type: ignore[arg-type]
    print("\n".join(report.lines()))
    return {(f.fault, f.nodes) for f in report.faults}


def test_healthy(clinic: Clinic) -> None:
    assert found_in(clinic) == set()
    assert list(clinic.shared.iterdir()) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(clinic: Clinic, name: str) -> None:
    plant, expected = FAULTS[name]
    with plant(clinic):
        assert found_in(clinic) == expected
