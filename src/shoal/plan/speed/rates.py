"""The time of each operation and message of a step on a device: from a measurement, or from the device's data sheet. No torch."""

from __future__ import annotations

import functools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from shoal.plan.machine import Machine
from shoal.plan.rehearse.work import Kind, Op, ring_share

WIDTHS: Final = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of an element
# Shares of the peak and of the bandwidth that good kernels reach (Dao 2023, arXiv:2307.08691, figures 4 to 6; NVIDIA's deep
# learning performance guide): of large matrix products, of attention forward and backward, of memory, of a link
PRODUCTS, ATTENTION, ATTENTION_BACK, MEMORY, LINK = 0.65, 0.55, 0.45, 0.85, 0.8
# Seconds of the smallest kernel on a GPU; of the host's work for one, with autograd; of one on a CPU
KERNEL, HOST, KERNEL_CPU = 3e-6, 8e-6, 10e-6
HOST_MESSAGE: Final = 6e-5  # of the host's work for a message, with FSDP2's hooks
LATENCY: Final = {True: (8e-6, 15e-6), False: (1e-4, 1e-4)}  # of a message on GPUs and CPUs: in a node, between nodes
# The bytes that a kind moves for each element: in the activations' width, and in any case; and its kernels
COSTS: Final[dict[Kind, tuple[float, float, int]]] = {
    "linear": (0, 0, 1), "linear back": (0, 0, 2), "attention": (0, 0, 1), "attention back": (0, 0, 3),
    "masked attention": (0, 0, 1), "masked attention back": (0, 0, 3),
    "rms_norm": (2, 0, 1), "rms_norm back": (4, 0, 2), "layer_norm": (2, 0, 1), "layer_norm back": (4, 0, 2),
    "softmax": (2, 24, 12), "swiglu": (5, 0, 2), "swiglu back": (11, 0, 4), "gelu": (2, 0, 1), "gelu back": (3, 0, 1),
    "rotate": (5, 0, 3), "rotate back": (5, 0, 3), "add": (3, 0, 1), "embedding": (0, 8, 1), "embedding back": (0, 8, 2),
    "sum": (0, 12, 1), "copy": (0, 1, 1), "update": (0, 40, 3),
}  # fmt: skip
# Host seconds outside kernels: a micro-batch's own, a step's own, a decision of selective checkpointing, a block computed again;
# on a CPU, an operation's beyond its own time, where torch has it and where it is an autograd function of shoal's in Python
OWN: Final[dict[Kind, float]] = {
    "turn": 5e-4, "step": 2e-3, "dispatch": 5e-5, "again": 5e-4, "call": 1e-5, "function": 5e-5,
}  # fmt: skip
FUNCTIONS: Final = ("rms_norm", "rms_norm back", "swiglu", "swiglu back", "rotate", "rotate back")


@dataclass(frozen=True)
class Curve:
    """
    The measured seconds of one kind of operation or message.

    axes: the sizes along each dim at which it was measured, ascending. seconds: of all combinations, the last axis fastest.
    powers: the exponent with which the work grows with each size; empty: 1.
    """

    axes: Sequence[Sequence[int]]
    seconds: Sequence[float]
    powers: Sequence[int] = ()

    def at(self, sizes: Sequence[float]) -> float:
        """
        Return the seconds for other sizes: the time per element is interpolated between the logarithms of the sizes.

        Beyond the last measured size the time per element stays; below the first, the time of the whole.
        """
        powers = self.powers or [1] * len(self.axes)
        corners = [(1.0, 0, 1)]  # weight, index, work
        for axis, size, power in zip(self.axes, sizes, powers, strict=True):
            low, share = _span(axis, size)
            corners = [
                (weight * part, index * len(axis) + low + up, work * axis[low + up] ** power)
                for weight, index, work in corners
                for up, part in ((0, 1 - share), (1, share))
                if part > 0
            ]
        logs = sum(weight * math.log(self.seconds[index] / work) for weight, index, work in corners)
        for axis, size, power in zip(self.axes, sizes, powers, strict=True):
            logs += power * math.log(max(size, axis[0]))
        return math.exp(logs)


def _span(axis: Sequence[int], size: float) -> tuple[int, float]:
    """Return the index of the last measured size that is not larger, and how far `size` is to the next, 0 to 1."""
    if size <= axis[0]:
        return 0, 0.0
    low = bisect_right(axis, size) - 1
    if low == len(axis) - 1:
        return low, 0.0
    return low, math.log(size / axis[low]) / math.log(axis[low + 1] / axis[low])


@dataclass(frozen=True)
class Rates:
    """
    The rates of a machine's processes, in a dtype of `width` bytes.

    curves: measured seconds of operations; those that are missing follow from the data sheet. links: measured seconds of messages
    inside a node by the ranks and the bytes that one sends. waits: by axis, how many times as long as these its messages take in
    a step, by the ranks. stretch: how many times as long all takes as was measured. sharing: how many times as long all takes
    because other processes work at the same time.
    """

    machine: Machine
    width: int
    curves: Mapping[Kind, Curve] = field(default_factory=dict)
    links: Mapping[str, Curve] = field(default_factory=dict)
    waits: Mapping[str, Curve] = field(default_factory=dict)
    stretch: float = 1.0
    sharing: float = 1.0

    @property
    def measured(self) -> bool:
        """Whether the rates come from a calibration."""
        return bool(self.curves)

    def device(self, op: Op) -> float:
        """Return the seconds of an operation on the device."""
        seconds = self._known.get(op)
        if seconds is None:
            seconds = self._known[op] = self._seconds(op)
        return seconds

    @functools.cached_property
    def _known(self) -> dict[Op, float]:
        """Seconds of operations: many layouts have the same."""
        return {}

    def _seconds(self, op: Op) -> float:
        kind, sizes = op
        if kind in self.curves:
            return self.stretch * self.curves[kind].at(_axes_of(op))
        machine = self.machine
        if kind in OWN:
            return 0.0 if machine.cuda else OWN[kind]
        of_width, always, kernels = COSTS[kind]
        flops, share = _flops(op)
        moved = (of_width * self.width + always) * math.prod(sizes)
        if kind.startswith("linear"):
            rows, inputs, outputs = sizes
            moved = self.width * (rows * inputs + inputs * outputs + rows * outputs) * kernels
        compute = flops / ((share if machine.cuda else 1.0) * machine.flops)
        least = (KERNEL if machine.cuda else KERNEL_CPU) * kernels
        return max(compute, moved / (MEMORY * machine.memory), least)

    def host(self, op: Op) -> float:
        """Return the seconds in which the host prepares an operation: on a GPU beside others, on a CPU before it."""
        if op.kind in OWN:
            return OWN[op.kind] if self.machine.cuda else 0.0
        return HOST * COSTS[op.kind][2] if self.machine.cuda else self.device(Op(beyond(op)))

    def message(self, kind: str, axis: str, ranks: int, size: int, *, far: bool) -> float:
        """Return the seconds of a collective over `ranks`, as a ring. size: as in `Work.messages`. far: whether it crosses nodes."""
        sent = size * ring_share(kind, ranks)
        if not far and kind in self.links:
            waits = self.waits[axis].at([ranks]) if axis in self.waits else 1.0
            return self.stretch * waits * self.links[kind].at([ranks, max(1.0, sent)])
        rate = self.machine.network if far else self.machine.link
        # a tree needs fewer rounds than a ring for what is small
        latency = LATENCY[self.machine.cuda][far] * (1 + math.log2(max(2, ranks)))
        return latency + sent / (LINK * rate)


def beyond(op: Op) -> Kind:
    """Return the kind of the seconds that an operation takes on a CPU beyond its own."""
    return "function" if op.kind in FUNCTIONS else "call"


def _flops(op: Op) -> tuple[int, float]:
    """Return an operation's FLOPs, and the share of the peak that it reaches."""
    kind, sizes = op
    if kind.startswith("linear"):
        return 2 * math.prod(sizes) * COSTS[kind][2], PRODUCTS
    if "attention" in kind:
        seen = 1 if "masked" in kind or sizes[1] != sizes[2] else 2  # causal: half of all pairs
        back = kind.endswith("back")
        return 2 * (5 if back else 2) * math.prod(sizes) // seen, ATTENTION_BACK if back else ATTENTION
    return 0, 1.0


def _axes_of(op: Op) -> Sequence[float]:
    """Return an operation's sizes along the axes of its curve."""
    if "attention" not in op.kind:
        return op.sizes
    heads, queries, keys, head_dim = op.sizes
    return heads, math.sqrt(queries * keys), head_dim
