"""What is wrong with a node, judged from its facts and those of the others. No torch."""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from shoal.doctor.facts import Facts, Space
from shoal.doctor.findings import Finding, differing
from shoal.system.disk import gigabytes

LEAST_FREE_BYTES: Final = 1 << 30  # in /tmp
LEAST_SHM_BYTES: Final = 64 << 20  # a container's usual size; NCCL needs about 10 MB for each pair of GPUs
LEAST_INODES: Final = 1000
LEAST_MEMORY_BYTES: Final = 2 << 30  # free; a worker with torch takes 0.3 GB before the model
LEAST_OPEN_FILES: Final = 1024  # Linux's usual limit
LEAST_PROCESSES: Final = 1024
# Fractions of the other nodes' median below which a node is odd
SMALL_SHARE: Final = 0.75
# Xids that a program causes, not the hardware: its own memory errors, its end, and what follows from another
PROGRAM_XIDS: Final = frozenset({13, 31, 43, 45, 68, 69})


@dataclass(frozen=True)
class Wanted:
    """What the nodes should have; None if nothing was asked for."""

    gpus: int | None = None
    cores: int | None = None


def judge_nodes(facts: Mapping[str, Facts], wanted: Mapping[str, Wanted]) -> list[Finding]:
    """Return what is wrong with each node, alone and compared with the others. facts, wanted: by node."""
    found: list[Finding] = []
    for node, each in facts.items():
        found += _limits(node, each)
        found += _spaces(node, each)
        found += _names(node, each, several=len(facts) > 1)
        found += _gpus(node, each)
        found += _against_what_was_asked(node, each, wanted.get(node, Wanted()))
    return [*found, *_compared(facts)]


def _limits(node: str, facts: Facts) -> Iterator[Finding]:
    files, processes, locked = (facts.limits.get(k) for k in ("open_files", "processes", "locked_bytes"))
    if files is not None and files < LEAST_OPEN_FILES:
        yield Finding(
            "open-files", (node,), f"{files} open files are allowed; set ulimit -n to {LEAST_OPEN_FILES} or more"
        )
    if processes is not None and processes < LEAST_PROCESSES:
        yield Finding(
            "processes", (node,), f"{processes} processes are allowed; set ulimit -u to {LEAST_PROCESSES} or more"
        )
    if facts.infiniband and locked is not None and locked < 1 << 30:
        yield Finding(
            "locked-memory", (node,),
            f"{gigabytes(locked)} of memory may be locked, and there is InfiniBand; set ulimit -l to unlimited",
        )  # fmt: skip
    if down := [port for port, is_active in facts.infiniband.items() if not is_active]:
        yield Finding("infiniband", (node,), f"not active: {', '.join(down)}; see ibstat", is_warning=True)
    if facts.memory_free_bytes < LEAST_MEMORY_BYTES:
        yield Finding(
            "memory", (node,),
            f"{gigabytes(facts.memory_free_bytes)} of {gigabytes(facts.memory_bytes)} of memory are free; end other "
            "programs, or raise the limit of the cgroup (Slurm: --mem)",
        )  # fmt: skip


def _spaces(node: str, facts: Facts) -> Iterator[Finding]:
    for fault, space, least, fix in (
        ("shm", facts.shm, LEAST_SHM_BYTES, "remove old files there, or start the container with a larger --shm-size"),
        ("tmp", facts.tmp, LEAST_FREE_BYTES, "remove files there, or set TMPDIR to another folder"),
    ):
        if why := _lacks(space, least):
            yield Finding(fault, (node,), f"{space.path} {why}; {fix}")


def _lacks(space: Space, least: int) -> str:
    """Return what is wrong with a folder; an empty text if nothing is."""
    if space.inodes_free is not None and space.inodes_free < LEAST_INODES:
        return f"has room for {space.inodes_free} more files (inodes)"
    if space.problem:
        return f"cannot be written ({space.problem})"
    if space.free_bytes < least:
        return f"has {gigabytes(space.free_bytes)} of {gigabytes(space.total_bytes)} free"
    return ""


def _names(node: str, facts: Facts, *, several: bool) -> Iterator[Finding]:
    own = facts.own_addresses
    if several and not own:
        yield Finding(
            "name-unknown", (node,), f"its own name, {facts.host}, has no address; add it to /etc/hosts or to DNS"
        )
    elif several and all(is_loopback(a) for a in own):
        yield Finding(
            "name-loopback", (node,),
            f"its own name, {facts.host}, is {own[0]}, which other nodes cannot reach; in its /etc/hosts, give the name the "
            "node's network address",
        )  # fmt: skip
    for variable, value in facts.asked_interfaces.items():
        if why := _wrong_interface(facts, value, exact=variable.startswith("GLOO")):
            usable = ", ".join(n for n, i in facts.interfaces.items() if i.is_up and i.addresses) or "none"
            yield Finding("interface", (node,), f"{variable} is {value}, {why}; interfaces with addresses: {usable}")


def _wrong_interface(facts: Facts, value: str, *, exact: bool) -> str:
    """
    Return why no interface fits a variable's value; an empty text if one does.

    exact: whether the value lists names, as for gloo. NCCL's are prefixes, exact names after =, and exclusions after ^.
    """
    if value.startswith("^"):
        return ""
    exact = exact or value.startswith("=")
    names = [name for name in value.lstrip("=").split(",") if name]
    fitting = [
        interface
        for name, interface in facts.interfaces.items()
        if any(name == asked or (not exact and name.startswith(asked)) for asked in names)
    ]
    if not fitting:
        return "an interface that does not exist"
    if not any(i.is_up for i in fitting):
        return "an interface that is down"
    return "" if any(i.is_up and i.addresses for i in fitting) else "an interface without an address"


def is_loopback(address: str) -> bool:
    """Return whether an address reaches only its own machine."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _gpus(node: str, facts: Facts) -> Iterator[Finding]:
    gpus = facts.gpus
    if gpus.get("problem"):
        yield Finding("gpu-driver", (node,), f"nvidia-smi: {gpus['problem']}; reload the driver or reboot the node")
    for number, card in enumerate(gpus.get("cards", [])):
        for fault, text, is_warning in _card(card):
            yield Finding(fault, (node,), f"GPU {number} ({card['name']}, {card['address']}): {text}", is_warning)
    serious = [(address, int(xid), text) for address, xid, text in gpus.get("xids", []) if int(xid) not in PROGRAM_XIDS]
    if serious:
        address, xid, text = serious[-1]
        more = f", and {len(serious) - 1} earlier" if len(serious) > 1 else ""
        yield Finding(
            "gpu-xid", (node,), f"Xid {xid} of the GPU at {address}: {text.strip()}{more}; drain the node and reset it"
        )


def _card(card: dict[str, object]) -> Iterator[tuple[str, str, bool]]:
    """Yield (fault, text, whether it is a warning) for one GPU."""
    if card["uncorrected"]:
        yield (
            "gpu-ecc",
            f"{card['uncorrected']} uncorrected memory errors since the driver started; reset the GPU",
            False,
        )
    elif card["waits_for_reset"]:
        yield "gpu-ecc", "memory rows wait for a reset; reset the GPU when no job uses it", False
    if slow := card["slowdowns"]:
        assert isinstance(slow, list)
        reasons = ", ".join(str(reason).replace("_", " ") for reason in slow)
        yield "gpu-throttled", f"its clock is lowered ({reasons}); check cooling and power", False
    watts, default = card["watts"], card["default_watts"]
    if isinstance(watts, float) and isinstance(default, float) and watts < 0.95 * default:
        yield "gpu-power", f"its limit is {watts:.0f} W, the default {default:.0f} W", True
    processes, used, total = card["processes"], card["used_mebibytes"], card["mebibytes"]
    assert isinstance(processes, list)
    if processes:
        shown = ", ".join(f"{name} (process {pid})" for pid, name in processes[:3])
        yield "gpu-busy", f"used by {shown}; end them, or take another node", False
    elif isinstance(used, float) and isinstance(total, float) and used > max(2048.0, 0.05 * total):
        yield "gpu-busy", f"{used:.0f} of {total:.0f} MiB of its memory are used, by no process listed; reset it", False


def _against_what_was_asked(node: str, facts: Facts, wanted: Wanted) -> Iterator[Finding]:
    cards = len(facts.gpus.get("cards", []))
    if wanted.gpus is not None and cards < wanted.gpus:
        lost = "" if cards else "; check nvidia-smi there"
        yield Finding("gpu-count", (node,), f"{cards} GPUs are visible, {wanted.gpus} were asked for{lost}")
    if wanted.cores is not None and facts.cores < wanted.cores:
        yield Finding(
            "cores", (node,),
            f"{facts.cores} CPU cores may be used, {wanted.cores} were asked for; give srun --cpus-per-task, or set "
            "SRUN_CPUS_PER_TASK",
        )  # fmt: skip


def _compared(facts: Mapping[str, Facts]) -> Iterator[Finding]:
    """Yield what differs between nodes that should be alike."""
    copy = "start all nodes from one installation on a shared disk, or install the same everywhere"
    yield from differing("code", "the code of shoal", {n: f"{f.shoal} ({f.code})" for n, f in facts.items()}, copy)
    yield from differing("python-version", "Python", {n: f.python for n, f in facts.items()}, copy)
    for package in dict.fromkeys(name for f in facts.values() for name in f.packages):
        versions = {n: f.packages.get(package, "missing") for n, f in facts.items()}
        yield from differing("package-version", package, versions, copy)
    users = {n: f.user for n, f in facts.items()}
    yield from differing("user", "the user's number", users, "give the user one number on all nodes")
    drivers = {n: f.gpus.get("driver") for n, f in facts.items() if f.gpus.get("driver")}
    yield from differing("gpu-driver-version", "the driver", drivers, "install one driver on all nodes")
    yield from differing("gpu-count", "the number of GPUs", _with_driver(facts), "check nvidia-smi there")
    models = {n: _models(f) for n, f in facts.items() if f.gpus.get("cards")}
    yield from differing("gpu-model", "the model of GPUs", models, "take nodes with equal GPUs")
    yield from differing(
        "infiniband", "the number of InfiniBand ports", {n: len(f.infiniband) for n, f in facts.items()}, "see ibstat"
    )
    yield from small("cores", {n: f.cores for n, f in facts.items()}, lambda v: f"{v:.0f} CPU cores may be used")
    memory = {n: f.memory_bytes for n, f in facts.items()}
    yield from small("memory", memory, lambda v: f"{gigabytes(int(v))} of memory may be used")
    clocks = [n for n, f in facts.items() if f.clock_synced is False]
    if clocks and len(clocks) < len(facts):
        yield from (
            Finding("clock", (n,), "its clock is not synchronized (NTP); see timedatectl", is_warning=True)
            for n in clocks
        )


def _with_driver(facts: Mapping[str, Facts]) -> dict[str, int]:
    """Return the number of GPUs by node; empty if no node has any."""
    counts = {n: len(f.gpus.get("cards", [])) for n, f in facts.items()}
    return counts if any(counts.values()) else {}


def _models(facts: Facts) -> str:
    names = {f"{card['name']} with {card['mebibytes'] or 0:.0f} MiB" for card in facts.gpus["cards"]}
    return " and ".join(sorted(names))


def small(fault: str, values: Mapping[str, float], describe: Callable[[float], str]) -> Iterator[Finding]:
    """Yield a finding for each node whose value is below `SMALL_SHARE` of the others' median. describe: formats a value."""
    for node, value in values.items():
        others = [v for n, v in values.items() if n != node]
        if others and value < SMALL_SHARE * statistics.median(others):
            yield Finding(
                fault, (node,), f"{describe(value)}; on the other nodes {describe(statistics.median(others))}"
            )
