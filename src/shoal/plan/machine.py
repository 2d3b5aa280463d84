"""The devices that a plan is made for: `8xH100-80GB`, `2xcpu-12GB`, or by memory alone, `8x40GB`. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from typing import Final

from shoal.errors import ShoalError
from shoal.plan.hardware import peak_flops

GIB: Final = 2**30


@dataclass(frozen=True)
class Card:
    """
    A GPU. mebibytes: what nvidia-smi reports, less than the name says where error correction takes some. card: its name in
    hardware.py. memory: GB/s of its memory. link: GB/s to another GPU of its node, in one direction. network: Gbit/s that a node
    usually has for each such GPU.
    """

    mebibytes: int
    card: str
    memory: float
    link: float
    network: float


# NVIDIA's data sheets: memory and NVLink bandwidth, PCI Express for cards without NVLink
KNOWN: Final[dict[str, Card]] = {
    "GB200-186GB": Card(189_471, "GB200", 8000, 900, 400), "B200-180GB": Card(183_359, "B200", 7700, 900, 400),
    "H200-141GB": Card(143_771, "H200", 4800, 450, 400), "H100-80GB": Card(81_559, "H100 80GB HBM3", 3350, 450, 400),
    "H100-94GB": Card(95_830, "H100 NVL", 3900, 300, 400), "A100-80GB": Card(81_920, "A100-SXM4-80GB", 2039, 300, 200),
    "A100-40GB": Card(40_960, "A100-SXM4-40GB", 1555, 300, 200), "A10-24GB": Card(23_028, "A10", 600, 25, 25),
    "A10G-24GB": Card(23_028, "A10G", 600, 25, 25), "A30-24GB": Card(24_576, "A30", 933, 25, 50),
    "A40-48GB": Card(46_068, "A40", 696, 25, 50), "A6000-48GB": Card(49_140, "RTX A6000", 768, 25, 10),
    "L4-24GB": Card(23_034, "L4", 300, 12, 25), "L40-48GB": Card(46_068, "L40", 864, 25, 50),
    "L40S-48GB": Card(46_068, "L40S", 864, 25, 50), "RTX3090-24GB": Card(24_576, "GeForce RTX 3090", 936, 12, 10),
    "RTX4090-24GB": Card(24_564, "GeForce RTX 4090", 1008, 12, 10),
    "RTX5090-32GB": Card(32_607, "GeForce RTX 5090", 1792, 25, 10),
}  # fmt: skip
UNKNOWN_GPU: Final = "A40-48GB"  # whose speed is assumed of a device that is given by its memory alone
# Of a process on a CPU, if it was not calibrated: FLOP/s, GB/s of memory, GB/s between processes, Gbit/s between nodes
CPU: Final = (5e10, 10.0, 1.0, 10.0)
# Taken by CUDA itself, its libraries' workspaces and NCCL's buffers. From others' reports: not measured by shoal
CUDA_BYTES: Final = 2 * GIB
# Of the rest, the share that a run may use; an allocator that rounds up and reuses pieces cannot fill a device
USABLE: Final = 0.94


@dataclass(frozen=True)
class Machine:
    """
    Equal nodes. memory_bytes: of each device. cuda: whether they are GPUs. flops: a GPU's peak in bfloat16, or what a process on a
    CPU reaches. memory, link and network: bytes/s of a device's memory, to one in its node, and to other nodes.
    """

    name: str
    per_node: int
    nodes: int
    memory_bytes: int
    cuda: bool
    flops: float
    memory: float
    link: float
    network: float
    card: str = ""  # the GPU's name in hardware.py
    guessed: bool = False  # whether its speed is another's

    @property
    def world_size(self) -> int:
        return self.per_node * self.nodes

    @property
    def usable_bytes(self) -> int:
        """What a process's tensors may take."""
        return int(USABLE * (self.memory_bytes - CUDA_BYTES)) if self.cuda else self.memory_bytes

    def __str__(self) -> str:
        on = f" on each of {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.per_node} x {self.name}{on}"


def find_machine(text: str, nodes: int, network: float | None = None) -> Machine:
    """
    Return the devices that `text` names. Raises `ShoalError` if it does not name any.

    network: Gbit/s between nodes for each GPU, or for each node of CPUs; None: what such nodes usually have.
    """
    found = re.fullmatch(r"(?:(\d+) ?x ?)?(.+)", text.strip(), re.IGNORECASE)
    count = int(found[1] or 1) if found else 0
    if found is None or count == 0 or nodes < 1:
        raise ShoalError(f"--devices {text}: give a number and a device, such as 8xH100-80GB")
    name, upper = found[2], found[2].upper()
    if by_memory := re.fullmatch(r"(CPU-)?(\d+(?:\.\d+)?) ?G(?:I?B)?", upper):
        is_cpu, size = bool(by_memory[1]), int(float(by_memory[2]) * GIB)
        shown = f"{'cpu' if is_cpu else 'device'} with {by_memory[2]} GiB"
        if not is_cpu:
            known = _machine(shown, KNOWN[UNKNOWN_GPU], count, nodes, network)
            return dataclasses.replace(known, memory_bytes=size, card="", guessed=True)
        return _cpus(shown, count, nodes, size, network)
    fitting = [known for known in KNOWN if known.upper() == upper or known.upper().partition("-")[0] == upper]
    if len(fitting) == 1:
        return _machine(fitting[0], KNOWN[fitting[0]], count, nodes, network)
    if fitting:
        raise ShoalError(f"--devices {text}: {name} is {' or '.join(fitting)}")
    near = difflib.get_close_matches(upper, KNOWN, 1)
    hint = f"did you mean {near[0]}? Or give" if near else "give"
    raise ShoalError(
        f"--devices {text}: {name} is not in the table; {hint} the memory of one device instead, such as {count}x48GB, or "
        f"{count}xcpu-12GB for processes on CPUs"
    )


def machine_of(device: str, per_node: int, nodes: int, memory_bytes: int, *, cuda: bool) -> Machine | None:
    """
    Return the machine on which a run trains; None for a GPU that is not in the table.

    device: the GPU's name as CUDA reports it. memory_bytes: of each process on a CPU.
    """
    if not cuda:
        return _cpus("cpu", per_node, nodes, memory_bytes, None)
    card = device.removeprefix("NVIDIA ")
    found = [(name, known) for name, known in KNOWN.items() if known.card == card]
    return _machine(*found[0], per_node, nodes, None) if found else None


def _cpus(name: str, count: int, nodes: int, memory_bytes: int, network: float | None) -> Machine:
    flops, memory, link, usual = CPU
    between = (network or usual) * 1e9 / 8 / count
    return Machine(name, count, nodes, memory_bytes, False, flops, memory * 1e9, link * 1e9, between, guessed=True)


def _machine(name: str, card: Card, count: int, nodes: int, network: float | None) -> Machine:
    peak = peak_flops(card.card, "bfloat16")
    assert peak is not None, card
    between = (network or card.network) * 1e9 / 8
    return Machine(
        name, count, nodes, card.mebibytes * 2**20, True, peak, card.memory * 1e9, card.link * 1e9, between, card.card
    )  # fmt: skip
