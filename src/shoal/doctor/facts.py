"""What a node reports about itself: versions, limits, memory, disks, network interfaces, GPUs. No torch, no judgment."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import os
import platform
import resource
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

import psutil

import shoal
from shoal.doctor.gpus import look_at_gpus
from shoal.system.cpu import cgroups, count_cores

PACKAGES: Final = ("torch", "numpy", "safetensors", "tokenizers", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
# Variables that name network interfaces; each value lists names, prefixes of names, or with = exact names.
INTERFACE_VARIABLES: Final = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_ADJTIMEX_ERROR: Final = 5  # adjtimex(2): the clock is not synchronized
_NO_LIMIT: Final = 1 << 60  # cgroup v1 writes a number like this for "no limit"


@dataclass(frozen=True)
class Space:
    """Room in a folder. problem: why it cannot be written; empty if it can. inodes_free: None if the disk has no limit."""

    path: str
    total_bytes: int = 0
    free_bytes: int = 0
    inodes_free: int | None = None
    problem: str = ""


@dataclass(frozen=True)
class Interface:
    """A network interface. mbit: megabits per second; 0 if unknown."""

    is_up: bool
    mtu: int
    mbit: int
    addresses: list[str]


@dataclass(frozen=True)
class Facts:
    """
    The facts of one node.

    machine: equal on one machine only. own_addresses: what the node's own name leads to. limits: of `ulimit`, None if unlimited.
    infiniband: {device and port: whether it is active}. clock_synced: None if unknown. slurm: variables of the step.
    """

    host: str
    machine: str
    own_addresses: list[str]
    user: int
    shoal: str
    code: str
    python: str
    packages: dict[str, str]
    interfaces: dict[str, Interface]
    asked_interfaces: dict[str, str]
    infiniband: dict[str, bool]
    cores: int
    memory_bytes: int
    memory_free_bytes: int
    limits: dict[str, int | None]
    shm: Space
    tmp: Space
    clock_synced: bool | None
    gpus: dict[str, Any] = field(default_factory=dict)
    slurm: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Self:
        """Return the facts that a probe sent; fields that another version of shoal added are ignored."""
        known = {f.name: found[f.name] for f in fields(cls) if f.name in found}
        known["interfaces"] = {name: Interface(**each) for name, each in found["interfaces"].items()}
        return cls(**{**known, "shm": Space(**found["shm"]), "tmp": Space(**found["tmp"])})


def facts_of_this_node() -> dict[str, Any]:
    """Return this node's facts for JSON. Takes as long as nvidia-smi does, at most 15 seconds."""
    total, free = _memory()
    host = socket.gethostname()
    return asdict(
        Facts(
            host=host,
            machine=_machine(host),
            own_addresses=addresses_of(host),
            user=os.getuid(),
            shoal=shoal.__version__,
            code=_digest_of_code(),
            python=platform.python_version(),
            packages=_packages(),
            interfaces=_interfaces(),
            asked_interfaces={name: os.environ[name] for name in INTERFACE_VARIABLES if os.environ.get(name)},
            infiniband=_infiniband(),
            cores=count_cores(),
            memory_bytes=total,
            memory_free_bytes=free,
            limits=_limits(),
            shm=space(Path("/dev/shm")),
            tmp=space(Path(os.environ.get("TMPDIR") or "/tmp")),
            clock_synced=_clock_synced(),
            gpus=look_at_gpus(),
            slurm={k: v for k, v in os.environ.items() if k.startswith("SLURM_")},
        )
    )


def addresses_of(name: str) -> list[str]:
    """Return the addresses of a name on this node, IPv4 first as torch uses them; empty if it has none."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in sorted(found, key=lambda f: f[0])))


def space(folder: Path) -> Space:
    """Return the room in a folder, after writing a small file there."""
    try:
        found = os.statvfs(folder)
        problem = ""
        try:
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".shoal-doctor-") as file:
                file.write(b"x" * 4096)
                file.flush()
        except OSError as error:
            problem = error.strerror or str(error)
    except OSError as error:
        return Space(str(folder), problem=error.strerror or str(error))
    inodes = found.f_favail if found.f_files else None
    return Space(str(folder), found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, inodes, problem)


def _machine(host: str) -> str:
    """Return a text that is equal on one machine only: its boot, and within it the network and name that this process sees."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/net')}"
    except OSError:
        return host


def _digest_of_code() -> str:
    """Return a short digest of shoal's source files."""
    root = Path(shoal.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _interfaces() -> dict[str, Interface]:
    stats = psutil.net_if_stats()
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: Interface(
            stats[name].isup, stats[name].mtu, stats[name].speed, [a.address for a in each if a.family in families]
        )
        for name, each in psutil.net_if_addrs().items()
        if name in stats
    }


def _infiniband(root: Path = Path("/sys/class/infiniband")) -> dict[str, bool]:
    found = {}
    for port in sorted(root.glob("*/ports/*/state")):
        try:
            found[f"{port.parts[-4]}:{port.parts[-2]}"] = "ACTIVE" in port.read_text(encoding="ascii")
        except OSError:
            continue
    return found


def _memory() -> tuple[int, int]:
    """Return (bytes, free bytes) of memory: the machine's, or less if a cgroup limits this process."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used in _memory_groups():
        total, free = min(total, limit), min(free, limit - used)
    return total, max(0, free)


def _memory_groups() -> list[tuple[int, int]]:
    """Return (limit, used) in bytes of each cgroup that limits this process's memory, of both versions of cgroups."""
    found = []
    for folder in cgroups("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            try:
                bound = int((folder / limit).read_text())
                if bound < _NO_LIMIT:
                    found.append((bound, _without_cache(folder, int((folder / used).read_text()))))
            except (OSError, ValueError):  # another version of cgroups, or "max"
                continue
    return found


def _without_cache(folder: Path, used: int) -> int:
    """Return the bytes in use without the cache of files, which the kernel gives up when memory is short."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return used
    counts = dict(line.split() for line in lines)
    cached = counts.get("total_inactive_file") or counts.get("inactive_file") or 0
    return max(0, used - int(cached))


def _limits() -> dict[str, int | None]:
    kinds = {"open_files": "RLIMIT_NOFILE", "processes": "RLIMIT_NPROC", "locked_bytes": "RLIMIT_MEMLOCK"}
    found: dict[str, int | None] = {}
    for name, kind in kinds.items():
        number = getattr(resource, kind, None)
        if number is not None:
            soft, _ = resource.getrlimit(number)
            found[name] = None if soft == resource.RLIM_INFINITY else soft
    return found


def _clock_synced() -> bool | None:
    """Return whether the kernel considers its clock synchronized (NTP, PTP); None if it does not tell."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        # struct timex: all zero reads the state; 208 bytes on 64-bit Linux, with room to spare
        state = libc.adjtimex(ctypes.create_string_buffer(512))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _ADJTIMEX_ERROR
