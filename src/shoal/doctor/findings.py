"""What the doctor found: faults with the nodes that have them, and the report. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

# Name of a fault -> its meaning. A name is what scripts compare, so it stays when the wording of a message changes.
FAULTS: Final[dict[str, str]] = {
    "unreachable": "the node cannot be reached by ssh or srun",
    "no-answer": "the node was reached, but a check did not end in time",
    "no-shoal": "this Python or shoal does not exist on the node",
    "same-machine": "two names are one machine",
    "name-unknown": "a node's name has no address",
    "name-loopback": "a node's name is a loopback address, which other nodes cannot reach",
    "name-wrong": "a node's name leads to another machine",
    "interface": "the network interface that a variable names does not exist, is down or has no address",
    "mtu": "the network interfaces have different MTUs",
    "link-speed": "a network interface is slower than those of the other nodes",
    "port-blocked": "no connection between nodes: a firewall or a missing route",
    "large-packets": "connections open, but large packets are lost on the way",
    "port-in-use": "another program listens on a port that runs use",
    "clock": "the clock differs from those of the other nodes",
    "code": "the code of shoal differs",
    "python-version": "the version of Python differs",
    "package-version": "the version of torch, NCCL or another library differs",
    "user": "the user's number differs, so that files of one node are foreign on another",
    "cores": "fewer CPU cores than the other nodes, or than the job asked for",
    "memory": "little memory, or a lower limit than on the other nodes",
    "open-files": "the limit of open files is low",
    "processes": "the limit of processes is low",
    "locked-memory": "the limit of locked memory is low, which InfiniBand needs",
    "infiniband": "an InfiniBand port is down, or a node has fewer ports than the others",
    "shm": "/dev/shm is small, full or cannot be written",
    "tmp": "the folder of temporary files is full or cannot be written",
    "gpu-driver": "nvidia-smi fails, does not answer or has lost a GPU",
    "gpu-count": "fewer GPUs than asked for, or than on the other nodes",
    "gpu-model": "another model of GPU, or with less memory",
    "gpu-driver-version": "the driver's version differs",
    "gpu-ecc": "memory errors that were not corrected, or rows that wait for a reset",
    "gpu-xid": "the driver reported an error of the hardware (Xid)",
    "gpu-throttled": "the clock is lowered by heat or by the power supply",
    "gpu-power": "the power limit is below the default",
    "gpu-busy": "other processes use the GPU, or its memory",
    "gpu-unused": "torch cannot use the GPUs: it was built without CUDA, or the driver is too old",
    "not-shared": "the shared folder is not the same folder on all nodes",
    "shared-missing": "the shared folder does not exist",
    "read-only": "the shared folder cannot be written",
    "disk-full": "the disk of the shared folder is full",
    "inodes": "the disk of the shared folder has hardly any inodes left",
    "quota": "the user's quota of the shared folder is used up",
    "not-exclusive": "two nodes could create the same file",
    "not-renamed": "other nodes do not see a file that replaced another",
    "locks": "a lock of the shared folder does not hold between nodes",
    "shared-slow": "the node writes to the shared folder much slower than the others",
    "slow-node": "the node computes much slower than the others",
    "slow-pair": "the connection between two nodes is much slower than the others",
    "pair-fails": "an all-reduce between two nodes fails",
    "allocation": "the Slurm job has fewer nodes, cores or GPUs than asked for",
    "time-limit": "the Slurm job's time is shorter than a save",
    "no-requeue": "Slurm may not requeue the job",
}


@dataclass(frozen=True)
class Finding:
    """
    A fault, or with `is_warning` something that a run can live with.

    fault: a name in `FAULTS`. nodes: the nodes at fault; two for a bad pair; none if all nodes or the job are at fault.
    text: what was seen, and how to fix it.
    """

    fault: str
    nodes: tuple[str, ...]
    text: str
    is_warning: bool = False

    def __post_init__(self) -> None:
        assert self.fault in FAULTS, self.fault

    def __str__(self) -> str:
        where = f"{', '.join(self.nodes)}: " if self.nodes else ""
        return f"{where}{'warning: ' * self.is_warning}{self.fault}: {self.text}"


@dataclass
class Report:
    """The result of one examination. figures: measurements by name. unchecked: what could not be checked, and why."""

    nodes: Sequence[str]
    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, findings: Iterable[Finding]) -> None:
        """Add findings; one that repeats an earlier one's fault and nodes is dropped."""
        seen = {(f.fault, f.nodes) for f in self.findings}
        for each in findings:
            if (each.fault, each.nodes) not in seen:
                seen.add((each.fault, each.nodes))
                self.findings.append(each)

    @property
    def faults(self) -> list[Finding]:
        return [f for f in self.findings if not f.is_warning]

    def healthy(self) -> list[str]:
        """Return the nodes that remain without faults, after skipping as few nodes as possible."""
        bad = {f.nodes[0] for f in self.faults if len(f.nodes) == 1}
        pairs = [set(f.nodes) for f in self.faults if len(f.nodes) > 1]
        while open_pairs := [p for p in pairs if not p & bad]:
            # the node in most bad pairs; of equal ones the last, because the first node is where a run meets
            bad.add(max(self.nodes, key=lambda node: (sum(node in p for p in open_pairs), self.nodes.index(node))))
        return [node for node in self.nodes if node not in bad]

    def concerns_all(self) -> bool:
        """Return whether a fault concerns all nodes or the job, so that no choice of nodes is without it."""
        return any(not f.nodes for f in self.faults)

    def lines(self) -> list[str]:
        """Return the report as text."""
        found = [str(f) for f in sorted(self.findings, key=lambda f: (f.is_warning, f.nodes))]
        found += [f"{name}: {value}" for name, value in self.figures.items()]
        found += [f"not checked: {text}" for text in self.unchecked]
        return [*found, f"{self._verdict()} ({self.seconds:.1f} s)"]

    def _verdict(self) -> str:
        count, nodes = len(self.faults), len(self.nodes)
        of_nodes = f"{nodes} node{'s' * (nodes > 1)}"
        if not count:
            return f"{of_nodes}: no fault found"
        bad = {node for f in self.faults for node in f.nodes}
        on = f"on {len(bad)} of {of_nodes}" if bad and not self.concerns_all() else f"on {of_nodes}"
        return f"{count} fault{'s' * (count > 1)} found {on}"

    def as_json(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "nodes": list(self.nodes),
            "healthy": self.healthy(),
            "findings": [
                {"fault": f.fault, "nodes": list(f.nodes), "text": f.text, "warning": f.is_warning}
                for f in self.findings
            ],
            "figures": self.figures,
            "unchecked": self.unchecked,
            "seconds": round(self.seconds, 2),
        }


def odd_ones(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """
    Return the value that most nodes have, and the others: {node: value}.

    values: {node: value}. If several values are equally frequent, the first node's counts as usual, because a run meets there;
    of two nodes that differ, both are returned.
    """
    counts: dict[Any, int] = {}
    for value in values.values():
        counts[value] = counts.get(value, 0) + 1
    usual = max(counts, key=lambda value: counts[value], default=None)  # of equal counts the first
    if len(values) == 2 and len(counts) == 2:
        return usual, dict(values)
    return usual, {node: value for node, value in values.items() if value != usual}


def differing(fault: str, what: str, values: Mapping[str, Any], fix: str) -> list[Finding]:
    """Return a finding for each node whose value of `what` is unusual, or one for both of two nodes that differ."""
    usual, others = odd_ones(values)
    if len(others) == len(values) == 2:
        seen = " and ".join(f"{value} on {node}" for node, value in values.items())
        return [Finding(fault, tuple(values), f"{what} is {seen}; {fix}")]
    return [
        Finding(fault, (node,), f"{what} is {value} here and {usual} on most nodes; {fix}")
        for node, value in others.items()
    ]


def blame(bad: Collection[tuple[str, str]], nodes: Sequence[str]) -> list[tuple[str, ...]]:
    """
    Return who is at fault for bad ordered pairs (from, to) of nodes: single nodes first, then pairs.

    A node is at fault if it is bad towards all others, or all others towards it, and there are at least three nodes.
    """
    rest = set(bad)
    found: list[tuple[str, ...]] = []
    for node in nodes if len(nodes) > 2 else ():
        others = [n for n in nodes if n != node]
        if all((o, node) in bad for o in others) or all((node, o) in bad for o in others):
            found.append((node,))
            rest = {pair for pair in rest if node not in pair}
    if found and len(found) == len(nodes):
        return [()]
    pairs = {(a, b) if nodes.index(a) < nodes.index(b) else (b, a) for a, b in rest}
    return found + sorted(pairs)
