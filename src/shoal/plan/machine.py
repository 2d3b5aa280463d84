"""The devices that a plan is made for: `8xH100-80GB`, `2xcpu-12GB`, or by memory alone, `8x40GB`. No torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Final

from shoal.errors import ShoalError
from shoal.plan.hardware import peak_flops

GIB: Final = 2**30
# Name -> memory that nvidia-smi reports, MiB (less than the name says where error correction takes some); name in hardware.py
KNOWN: Final[dict[str, tuple[int, str]]] = {
    "GB200-186GB": (189_471, "GB200"), "B200-180GB": (183_359, "B200"), "H200-141GB": (143_771, "H200"),
    "H100-80GB": (81_559, "H100 80GB HBM3"), "H100-94GB": (95_830, "H100 NVL"), "A100-80GB": (81_920, "A100-SXM4-80GB"),
    "A100-40GB": (40_960, "A100-SXM4-40GB"), "A10-24GB": (23_028, "A10"), "A10G-24GB": (23_028, "A10G"),
    "A30-24GB": (24_576, "A30"), "A40-48GB": (46_068, "A40"), "A6000-48GB": (49_140, "RTX A6000"),
    "L4-24GB": (23_034, "L4"), "L40-48GB": (46_068, "L40"), "L40S-48GB": (46_068, "L40S"),
    "RTX3090-24GB": (24_576, "GeForce RTX 3090"), "RTX4090-24GB": (24_564, "GeForce RTX 4090"),
    "RTX5090-32GB": (32_607, "GeForce RTX 5090"),
}  # fmt: skip
UNKNOWN_GPU: Final = "A100-SXM4-80GB"  # whose speed orders the layouts of a device that is given by its memory
CPU_FLOPS: Final = 1e11
# Taken by CUDA itself, its libraries' workspaces and NCCL's buffers. From others' reports: not measured by shoal
CUDA_BYTES: Final = 2 * GIB
# Of the rest, the share that a run may use; an allocator that rounds up and reuses pieces cannot fill a device
USABLE: Final = 0.94


@dataclass(frozen=True)
class Machine:
    """Equal nodes. memory_bytes: of each device. cuda: whether they are GPUs."""

    name: str
    per_node: int
    nodes: int
    memory_bytes: int
    cuda: bool
    flops: float  # peak, bfloat16, on a GPU

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


def find_machine(text: str, nodes: int) -> Machine:
    """Return the devices that `text` names. Raises `ShoalError` if it does not name any."""
    found = re.fullmatch(r"(?:(\d+) ?x ?)?(.+)", text.strip(), re.IGNORECASE)
    count = int(found[1] or 1) if found else 0
    if found is None or count == 0 or nodes < 1:
        raise ShoalError(f"--devices {text}: give a number and a device, such as 8xH100-80GB")
    name, upper = found[2], found[2].upper()
    if by_memory := re.fullmatch(r"(CPU-)?(\d+(?:\.\d+)?) ?G(?:I?B)?", upper):
        is_cpu = bool(by_memory[1])
        shown = f"{'cpu' if is_cpu else 'device'} with {by_memory[2]} GiB"
        flops = CPU_FLOPS if is_cpu else _peak(UNKNOWN_GPU)
        return Machine(shown, count, nodes, int(float(by_memory[2]) * GIB), not is_cpu, flops)
    fitting = [known for known in KNOWN if known.upper() == upper or known.upper().partition("-")[0] == upper]
    if len(fitting) == 1:
        mebibytes, card = KNOWN[fitting[0]]
        return Machine(fitting[0], count, nodes, mebibytes * 2**20, True, _peak(card))
    if fitting:
        raise ShoalError(f"--devices {text}: {name} is {' or '.join(fitting)}")
    near = difflib.get_close_matches(upper, KNOWN, 1)
    hint = f"did you mean {near[0]}? Or give" if near else "give"
    raise ShoalError(
        f"--devices {text}: {name} is not in the table; {hint} the memory of one device instead, such as {count}x48GB, or "
        f"{count}xcpu-12GB for processes on CPUs"
    )


def _peak(card: str) -> float:
    peak = peak_flops(card, "bfloat16")
    assert peak is not None, card
    return peak
