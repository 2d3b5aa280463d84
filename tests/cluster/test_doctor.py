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
from shoal.doctor.judge_node import Wanted
from shoal.system.cpu import count_cores
from tests.cluster.clinic import NAMES, Clinic
from tests.cluster.cures import cpu_share, memory_limit
from tests.cluster.host import kill, lacking
from tests.disks import small_disk
from tests.doctor.recorded import NO_DRIVER, XID_31, XID_79, process, smi

pytestmark = pytest.mark.skipif(bool(why := lacking()), reason=why)
needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="firewalls need the package nftables")
FAKETIME = Path("/usr/lib") / f"{os.uname().machine}-linux-gnu" / "faketime" / "libfaketimeMT.so.1"
SOURCE = Path(shoal.__file__).parents[1]

Fault = Callable[[Clinic], AbstractContextManager[object]]


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    """Four hosts, which also share two small disks: `full` and `crowded`."""
    folder = tmp_path_factory.mktemp("clinic")
    full, crowded = small_disk(folder / "full", "1m"), small_disk(folder / "crowded", "2g,nr_inodes=60")
    with full, crowded, Clinic(folder) as clinic:
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
            kill(process)

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


def patched(clinic: Clinic, name: str, code: str) -> AbstractContextManager[None]:
    """Let Python begin with `code` on a host."""
    folder = clinic.hosts[name].folder / "patch"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return clinic.profile(name, f"export PYTHONPATH={folder}")


# A disk that needs a second whenever much is flushed to it
SLOW_DISK = """
import os, time
plain = os.fsync
def slow(fd):
    time.sleep(os.fstat(fd).st_size > 1000)
    plain(fd)
os.fsync = slow
"""
# A file system that lets a second node create a file that exists
NOT_EXCLUSIVE = """
import os
plain = os.open
os.open = lambda path, flags, *rest, **more: plain(path, flags & ~os.O_EXCL, *rest, **more)
"""
# A cache that keeps the first content of a file
STALE = """
import pathlib
plain, kept = pathlib.Path.read_text, {}
def read_text(self, *rest, **more):
    text = plain(self, *rest, **more)
    return kept.setdefault(self, text) if self.name == "word" else text
pathlib.Path.read_text = read_text
"""
# A network card that found only a slow partner: a pair of virtual ones always reports 10 Gbit/s
SLOW_LINK = """
import psutil
plain = psutil.net_if_stats
psutil.net_if_stats = lambda: {name: each._replace(speed=100) for name, each in plain().items()}
"""
# The limit of locked memory that InfiniBand needs; the tests may not raise it themselves
LOCKS_MEMORY = """
import resource
plain = resource.getrlimit
resource.getrlimit = lambda kind: (-1, -1) if kind == resource.RLIMIT_MEMLOCK else plain(kind)
"""
# Locks that end at the node
LOCAL_LOCKS = "import fcntl\nfcntl.flock = fcntl.lockf = lambda *_: None\n"


def unknown_to_all(clinic: Clinic) -> ExitStackOf:
    return ExitStackOf(*(clinic.known(name, d3=None) for name in ("d1", "d2", "d4")))


def other_user(clinic: Clinic) -> AbstractContextManager[None]:
    """Let d2's probe see another number as its user's; what it may read and write remains."""
    line = '#!/bin/sh\nexec unshare --user --map-user=4242 /usr/bin/env "$@"\n'
    return clinic.program("d2", "env", line)


FAULTS: dict[str, tuple[Fault, set[tuple[str, tuple[str, ...]]]]] = {
    "no shoal": (lambda c: c.mounted("d2", SOURCE / "shoal"), {("no-shoal", ("d2",))}),
    "one host does not know another": (lambda c: c.known("d1", d3=None), {("name-unknown", ("d1", "d3"))}),
    "no host knows another": (unknown_to_all, {("name-unknown", ("d3",))}),
    "own name is loopback": (lambda c: c.known("d2", d2="127.0.1.1"), {("name-loopback", ("d2",))}),
    "name of another host": (lambda c: c.known("d4", d2=c.addresses["d3"]), {("name-wrong", ("d2", "d4"))}),
    "no such interface": (lambda c: c.profile("d3", "export GLOO_SOCKET_IFNAME=eth7"), {("interface", ("d3",))}),
    "interface is down": (
        lambda c: ExitStackOf(
            c.done("d1", "ip link add ib0 type veth peer name ib1", "ip link del ib0"),
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
    "another Python": (
        lambda c: patched(c, "d3", "import platform\nplatform.python_version = lambda: '3.10.0'\n"),
        {("python-version", ("d3",))},
    ),
    "few open files": (lambda c: c.profile("d2", "ulimit -n 256"), {("open-files", ("d2",))}),
    "few processes": (lambda c: c.profile("d2", "prlimit --pid $$ --nproc=100"), {("processes", ("d2",))}),
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
    # On two hosts: a single one that comes first to every file would create each alone
    "files that two can create": (
        lambda c: ExitStackOf(patched(c, "d2", NOT_EXCLUSIVE), patched(c, "d3", NOT_EXCLUSIVE)),
        {("not-exclusive", ())},
    ),
    "a cache that keeps old content": (lambda c: patched(c, "d4", STALE), {("not-renamed", ("d4",))}),
    "slow link": (lambda c: patched(c, "d2", SLOW_LINK), {("link-speed", ("d2",))}),
    "slow disk": (lambda c: patched(c, "d3", SLOW_DISK), {("shared-slow", ("d3",))}),
}


class ExitStackOf(ExitStack):
    """Enters several contexts at once."""

    def __init__(self, *contexts: AbstractContextManager[None]) -> None:
        super().__init__()
        for context in contexts:
            self.enter_context(context)


def found_in(clinic: Clinic, **options: object) -> set[tuple[str, tuple[str, ...]]]:
    """Return (fault, hosts) of all faults, without warnings."""
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


def warned_of(clinic: Clinic) -> set[tuple[str, tuple[str, ...]]]:
    """Return (fault, hosts) of all warnings, if there are no faults. Whether the clock is synchronized depends on the machine."""
    report = clinic.examine()
    print("\n".join(report.lines()))
    assert report.faults == []
    return {(f.fault, f.nodes) for f in report.findings if f.fault != "clock"}


def test_locks_that_end_at_a_node_are_a_warning(clinic: Clinic) -> None:
    with patched(clinic, "d3", LOCAL_LOCKS):
        assert warned_of(clinic) == {("locks", ())}


def test_a_gpu_with_a_low_power_limit_is_a_warning(clinic: Clinic) -> None:
    with recorded(clinic, "d3", smi(changed={"watts": "400.00"})):
        assert warned_of(clinic) == {("gpu-power", ("d3",))}


@contextlib.contextmanager
def infiniband(clinic: Clinic, *, low: str = "", **states: str) -> Iterator[None]:
    """
    Let the kernel of all hosts list two InfiniBand ports, of which the second of some has another state, or does not exist.

    low: the host that may lock 4 MiB of memory; the others may lock any amount.
    """
    with ExitStack() as stack:
        for name in NAMES:
            stack.enter_context(clinic.mounted(name, "/sys/class"))
            limit = clinic.profile(name, "ulimit -l 4096") if name == low else patched(clinic, name, LOCKS_MEMORY)
            stack.enter_context(limit)
            for port, state in (("1", "4: ACTIVE"), ("2", states.get(name, "4: ACTIVE"))):
                folder = f"/sys/class/infiniband/mlx5_0/ports/{port}"
                if state:
                    clinic.hosts[name].run("sh", "-c", f"mkdir -p {folder} && echo '{state}' >{folder}/state")
        yield


def test_infiniband(clinic: Clinic) -> None:
    with infiniband(clinic, low="d2"):
        assert found_in(clinic) == {("locked-memory", ("d2",))}
    with infiniband(clinic, d3=""):
        assert found_in(clinic) == {("infiniband", ("d3",))}
    with infiniband(clinic, d4="1: DOWN"):
        assert warned_of(clinic) == {("infiniband", ("d4",))}


@needs_nft
@pytest.mark.parametrize(
    ("host", "rule", "expected"),
    [
        ("d3", "tcp dport 29400 drop", ("port-blocked", ("d3",))),
        ("d2", "tcp dport 30000-65535 reject", ("port-blocked", ("d2",))),
        ("d1", "ip saddr 10.66.0.13 tcp dport 29500 drop", ("port-blocked", ("d1", "d3"))),
        ("d4", "ip length > 1000 drop", ("large-packets", ("d4",))),
    ],
)
def test_a_firewall_is_found(clinic: Clinic, host: str, rule: str, expected: tuple[str, tuple[str, ...]]) -> None:
    with firewall(clinic, host, rule):
        assert found_in(clinic) == {expected}


@pytest.mark.skipif(not FAKETIME.exists(), reason="false clocks need the package libfaketime")
@pytest.mark.parametrize(
    ("names", "expected"), [(NAMES, {("clock", ("d3",))}), (("d1", "d3"), {("clock", ("d1", "d3"))})]
)
def test_a_clock_an_hour_ahead(
    clinic: Clinic, names: tuple[str, ...], expected: set[tuple[str, tuple[str, ...]]]
) -> None:
    with clinic.profile("d3", f"export LD_PRELOAD={FAKETIME} FAKETIME=+1h FAKETIME_DONT_FAKE_MONOTONIC=1"):
        assert found_in(clinic, names=names) == expected


def test_fewer_cores(clinic: Clinic) -> None:
    if count_cores() < 2:
        pytest.skip("one core cannot become fewer")
    with clinic.profile("d2", "taskset --pid --cpu-list 0 $$ >&2"):
        assert found_in(clinic) == {("cores", ("d2",))}
        assert found_in(clinic, names=("d2",), wanted=Wanted(cores=2)) == {("cores", ("d2",))}


def test_a_host_that_does_not_exist_and_one_named_twice(clinic: Clinic) -> None:
    twin = clinic.folder / "twin"
    twin.mkdir()
    (twin / "pid").write_text(str(clinic.hosts["d1"].pid))
    (twin / "profile").write_text("")
    found = found_in(clinic, names=("d1", "d2", "d9", "twin"))
    assert found == {("unreachable", ("d9",)), ("same-machine", ("twin",))}


def test_a_host_that_does_not_answer(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.doctor.examine.START_SECONDS", 10.0)
    with clinic.profile("d4", "cat >&2"):
        assert found_in(clinic) == {("unreachable", ("d4",))}


@pytest.mark.parametrize(("disk", "fill", "fault"), [("full", "head -c 2m /dev/zero >fill", "disk-full"),
                                                     ("crowded", "seq 100 | xargs touch", "inodes")])  # fmt: skip
def test_a_full_disk_is_a_fault_of_all(clinic: Clinic, disk: str, fill: str, fault: str) -> None:
    folder = clinic.folder / disk
    subprocess.run(["sh", "-c", fill], cwd=folder, stderr=subprocess.DEVNULL, check=False)
    report = clinic.examine(shared=folder)
    print("\n".join(report.lines()))
    assert {(f.fault, f.nodes) for f in report.faults} == {(fault, ())}
    assert report.concerns_all()


def test_a_disk_that_becomes_full_while_written(clinic: Clinic) -> None:
    for file in (clinic.folder / "full").iterdir():
        file.unlink()
    assert ("disk-full", ()) in found_in(clinic, shared=clinic.folder / "full")


@contextlib.contextmanager
def recorded(clinic: Clinic, name: str, output: str, *, log: str = "", ends: str = "exit 0") -> Iterator[None]:
    """Give all hosts two healthy GPUs, as far as nvidia-smi tells, and let it print `output` on one. log: of its kernel."""
    with ExitStack() as stack:
        for host in NAMES:
            folder = clinic.hosts[host].folder
            (folder / "smi.xml").write_text(output if host == name else smi())
            (folder / "kernel.log").write_text(log if host == name else "")
            clinic.script(folder / "bin" / "dmesg", f"#!/bin/sh\ncat {folder}/kernel.log\n")
            ending = ends if host == name else "exit 0"
            stack.enter_context(clinic.program(host, "nvidia-smi", f"#!/bin/sh\ncat {folder}/smi.xml\n{ending}\n"))
        yield
        for host in NAMES:
            (clinic.hosts[host].folder / "bin" / "dmesg").unlink()


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (smi(count=1), "gpu-count"),
        (smi(driver="535.104.05"), "gpu-driver-version"),
        (smi(changed={"name": "NVIDIA A100-SXM4-80GB", "watts": "400.00"}), "gpu-model"),
        (smi(changed={"uncorrectable": "2"}), "gpu-ecc"),
        (smi(changed={"remapped": "Yes"}), "gpu-ecc"),
        (smi(changed={"hw_slowdown": "Active", "hw_thermal": "Active"}), "gpu-throttled"),
        (smi(changed={"processes": process(4242, "/usr/bin/python3"), "used": "61441"}), "gpu-busy"),
        (smi(changed={"used": "70000"}), "gpu-busy"),
    ],
)
def test_a_gpu_is_ill(clinic: Clinic, output: str, fault: str) -> None:
    with recorded(clinic, "d3", output):
        assert found_in(clinic) == {(fault, ("d3",))}


def test_the_driver_fails_or_reports_an_error(clinic: Clinic) -> None:
    with recorded(clinic, "d2", NO_DRIVER, ends="exit 9"):
        assert ("gpu-driver", ("d2",)) in found_in(clinic)
    with recorded(clinic, "d2", smi(), log=f"{XID_31}\n{XID_79}\n"):
        assert found_in(clinic) == {("gpu-xid", ("d2",))}
    with recorded(clinic, "d2", smi(), log=f"{XID_31}\n"):
        assert found_in(clinic) == set()


def test_gpus_that_were_asked_for(clinic: Clinic) -> None:
    assert found_in(clinic, names=("d1",), wanted=Wanted(gpus=8)) == {("gpu-count", ("d1",))}
    with recorded(clinic, "d1", smi()):
        assert found_in(clinic, wanted=Wanted(gpus=2)) == set()


@contextlib.contextmanager
def slow_cable(clinic: Clinic, one: str, other: str) -> Iterator[None]:
    """Join two hosts by a second cable of 50 Mbit/s, through which they reach each other."""
    a, b = clinic.hosts[one], clinic.hosts[other]
    # Only the network of one host is entered: in its pid namespace, the number of the other's process means nothing
    link = ["nsenter", "--target", str(a.pid), "--net", "--", "ip", "link", "add", "slow0"]
    subprocess.run([*link, *f"type veth peer name slow0 netns {b.pid}".split()], check=True)
    try:
        for host, peer in ((a, b), (b, a)):
            host.run("ip", "link", "set", "slow0", "up")
            host.run("sh", "-c", "tc qdisc add dev slow0 root tbf rate 50mbit burst 64kb latency 100ms")
            host.run("ip", "route", "add", f"{peer.address}/32", "dev", "slow0", "src", host.address)
        yield
    finally:
        a.run("ip", "link", "del", "slow0")


def test_the_command_prints_the_healthy_hosts(clinic: Clinic) -> None:
    command = [sys.executable, "-m", "shoal", "doctor", "--hosts", ",".join(NAMES), "--ssh", f"{clinic.reach} {{host}}"]
    command += ["--quick", "--shared", str(clinic.shared), "--leave-out", "--min-nodes"]
    with clinic.profile("d2", "ulimit -n 256"):
        for least, code in (("3", 0), ("4", 1)):
            done = subprocess.run([*command, least], capture_output=True, text=True, check=False)
            assert (done.returncode, done.stdout) == (code, "d1,d3,d4\n"), done.stderr
            assert "d2: open-files: 256 open files are allowed" in done.stderr


@contextlib.contextmanager
def ssh_servers(clinic: Clinic, *names: str) -> Iterator[Path]:
    """Run OpenSSH's server on hosts; yield the client's configuration."""
    folder = clinic.folder / "ssh"
    folder.mkdir()
    Path("/run/sshd").mkdir(exist_ok=True)  # the server demands it
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "server").write_text(
        f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\nPidFile none\nUsePAM no\n"
        "PermitRootLogin prohibit-password\n"
    )
    (folder / "client").write_text(
        f"IdentityFile {folder}/user\nUserKnownHostsFile /dev/null\nStrictHostKeyChecking no\nBatchMode yes\nLogLevel ERROR\n"
    )
    servers = [clinic.hosts[n].start("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "server")) for n in names]
    try:
        for server in servers:
            assert server.stdout is not None
            assert "listening" in server.stdout.readline()
        yield folder / "client"
    finally:
        for server in servers:
            kill(server)


@pytest.mark.skipif(
    not Path("/usr/sbin/sshd").exists(), reason="reaching hosts by ssh needs the package openssh-server"
)
def test_hosts_are_reached_by_ssh(clinic: Clinic) -> None:
    with ssh_servers(clinic, "d1", "d3") as client:
        code, output = clinic.hosts["d2"].attempt(
            sys.executable, "-m", "shoal", "doctor", "--hosts", "d1,root@d3,d4", "--ssh", f"ssh -F {client} {{host}}",
            "--quick", "--shared", str(clinic.shared),
        )  # fmt: skip
    assert code == 1, output
    assert "d4: unreachable: ssh: connect to host d4 port 22: Connection refused" in output
    assert "1 fault found on 1 of 3 nodes" in output


def test_setup_checks_all_hosts(clinic: Clinic) -> None:
    command = [sys.executable, "-m", "shoal", "setup", "--shared", str(clinic.shared), "--project", "mine"]
    command += ["--hosts", ",".join(NAMES), "--ssh", f"{clinic.reach} {{host}}"]
    environment = os.environ | {"CONDA_PREFIX": sys.prefix}
    with clinic.mounted("d4", clinic.shared.parent, "-o", "size=2g"):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "d4: shared-missing" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"setup: ready; next: cd {clinic.shared}/mine" in done.stdout


def test_healthy_with_torch(clinic: Clinic) -> None:
    report = clinic.examine(quick=False)
    print("\n".join(report.lines()))
    assert report.faults == []
    assert [name for name in report.figures if name.startswith("matrix product")] == [
        f"matrix product on {n}" for n in NAMES
    ]
    assert "all-reduce in pairs" in report.figures


def test_a_slow_host(clinic: Clinic) -> None:
    with cpu_share(clinic, "d3", 0.15):
        # what is left of one core counts as one core
        assert found_in(clinic, quick=False) == {("slow-node", ("d3",)), ("cores", ("d3",))}


def test_a_slow_cable_between_two_hosts(clinic: Clinic) -> None:
    with slow_cable(clinic, "d2", "d4"):
        assert found_in(clinic, quick=False, names=("d1", "d2", "d4")) == {("slow-pair", ("d2", "d4"))}


@pytest.mark.slow
@needs_nft
def test_a_pair_whose_packets_are_lost_under_load(clinic: Clinic) -> None:
    rule = f"ip saddr {clinic.addresses['d2']} limit rate over 20 kbytes/second burst 2 mbytes drop"
    with firewall(clinic, "d4", rule):
        assert found_in(clinic, quick=False, names=("d1", "d2", "d4")) == {("pair-fails", ("d2", "d4"))}


def test_gpus_that_torch_cannot_use(clinic: Clinic) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine's GPUs are used")
    with recorded(clinic, "d1", smi()):
        assert found_in(clinic, quick=False, names=("d1",)) == {("gpu-unused", ("d1",))}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_healthy_examinations(clinic: Clinic) -> None:
    for _ in range(50):
        assert found_in(clinic, quick=False) == set()
