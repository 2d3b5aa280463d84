"""Times the operations of a step by kind and size, on this machine: the rates from which `shoal plan` predicts a step's time."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.models.attention import attend
from shoal.models.layers import LayerNorm, RMSNorm, linear
from shoal.models.llama import gated
from shoal.models.loss import softmax_loss
from shoal.models.rope import rotate
from shoal.plan.rehearse.work import Kind
from shoal.plan.speed.rates import Curve

TURNS: Final = 2  # measurements of each operation in a round
# An operation is measured many times in a row on tensors of its own, as in a model: one backward runs them all, and weights leave
# the processor's caches between two uses. As many as take ABOUT seconds, at most MOST_COPIES
MOST_COPIES: Final = 24
ABOUT: Final = 4e-3
MOST_ROUNDS: Final = 9
ROWS: Final = (64, 512, 4096)
WIDTHS: Final = (64, 256, 1024)
ELEMENTS: Final = (2**12, 2**16, 2**19, 2**22)
# Sizes at which each kind is measured: all combinations
GRIDS: Final[dict[Kind, tuple[tuple[int, ...], ...]]] = {
    "linear": (ROWS, WIDTHS, WIDTHS),
    "attention": ((4, 32), (64, 256, 1024), (32, 128)),
    "masked attention": ((4, 32), (64, 256, 1024), (32, 128)),
    "rms_norm": (ROWS, WIDTHS),
    "layer_norm": (ROWS, WIDTHS),
    "softmax": ((64, 1024), (256, 4096, 32768)),
    "swiglu": (ELEMENTS,),
    "gelu": (ELEMENTS,),
    "rotate": (ELEMENTS,),
    "embedding": (ELEMENTS,),
    "add": (ELEMENTS,),
    "sum": (ELEMENTS,),
    "copy": (ELEMENTS,),
    "update": (ELEMENTS,),
}
POWERS: Final[dict[Kind, tuple[int, ...]]] = {"attention": (1, 2, 1), "masked attention": (1, 2, 1)}


@dataclass(frozen=True)
class Timed:
    """An operation to time, and the tensors whose gradients its backward computes."""

    run: Callable[[], Tensor]
    inputs: Sequence[Tensor] = ()


class Operations:
    """Makes the operations of a step, as the models call them."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._noise = torch.randn(2**18, device=device)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a leaf with contents like activations': a GPU's clock depends on them."""
        count = math.prod(shape)
        noise = self._noise.repeat(-(-count // len(self._noise)))[:count]
        return noise.view(shape).to(dtype or self._dtype, copy=True).requires_grad_()

    def make(self, kind: Kind, sizes: Sequence[int]) -> Timed:
        """Return the operation of these sizes; its method is named as its kind."""
        found: Timed = getattr(self, f"_{kind.replace(' ', '_')}")(*sizes)
        return found

    def _linear(self, rows: int, inputs: int, outputs: int) -> Timed:
        x, weight = self.tensor(rows, inputs), self.tensor(outputs, inputs)
        return Timed(lambda: linear(x, weight), [x, weight])

    def _attention(self, heads: int, length: int, head_dim: int, mask: Tensor | None = None) -> Timed:
        q, k, v = (self.tensor(1, length, heads, head_dim) for _ in range(3))
        return Timed(lambda: attend(q, k, v, mask), [q, k, v])

    def _masked_attention(self, heads: int, length: int, head_dim: int) -> Timed:
        ids = torch.arange(length, device=self._device) * 3 // length
        mask = (ids[:, None] == ids) & torch.ones(length, length, dtype=torch.bool, device=self._device).tril()
        return self._attention(heads, length, head_dim, mask[None, None])

    def _rms_norm(self, rows: int, dim: int) -> Timed:
        norm, x = RMSNorm(dim, 1e-5).to(self._device), self.tensor(rows, dim)
        torch.nn.init.ones_(norm.weight)
        return Timed(lambda: norm(x), [x, norm.weight])

    def _layer_norm(self, rows: int, dim: int) -> Timed:
        norm, x = LayerNorm(dim, 1e-5).to(self._device), self.tensor(rows, dim)
        torch.nn.init.ones_(norm.weight)
        torch.nn.init.zeros_(norm.bias)
        return Timed(lambda: norm(x), [x, norm.weight, norm.bias])

    def _softmax(self, rows: int, vocabulary: int) -> Timed:
        logits = self.tensor(rows, vocabulary).detach()
        labels = torch.randint(vocabulary, (rows,), device=self._device)
        return Timed(lambda: softmax_loss(logits, labels, 1.0, None, to_gradient=True))

    def _swiglu(self, elements: int) -> Timed:
        gate, up = self.tensor(elements), self.tensor(elements)
        return Timed(lambda: gated(gate, up), [gate, up])

    def _gelu(self, elements: int) -> Timed:
        x = self.tensor(elements)
        return Timed(lambda: F.gelu(x, approximate="tanh"), [x])

    def _rotate(self, elements: int) -> Timed:
        x = self.tensor(1, elements // 512, 8, 64)
        cos, sin = self.tensor(1, elements // 512, 1, 64).detach(), self.tensor(1, elements // 512, 1, 32).detach()
        return Timed(lambda: rotate(x, (cos, sin)), [x])

    def _embedding(self, elements: int) -> Timed:
        table = self.tensor(elements // 64, 64, dtype=torch.float32)
        ids = torch.randint(elements // 64, (elements // 64,), device=self._device)
        return Timed(lambda: F.embedding(ids, table), [table])

    def _add(self, elements: int) -> Timed:
        a, b = self.tensor(elements).detach(), self.tensor(elements).detach()
        return Timed(lambda: a + b)

    def _sum(self, elements: int) -> Timed:
        a, b = self.tensor(elements, dtype=torch.float32).detach(), self.tensor(elements, dtype=torch.float32).detach()
        return Timed(lambda: a.add_(b))

    def _copy(self, size: int) -> Timed:
        a, b = self.tensor(max(1, size // 8)).detach(), self.tensor(max(1, size // 8)).detach()
        return Timed(lambda: a.copy_(b))

    def _update(self, elements: int) -> Timed:
        weight, grad = self.tensor(elements, dtype=torch.float32), self.tensor(elements, dtype=torch.float32).detach()
        weight.grad = grad
        optimizer = torch.optim.AdamW([weight], fused=True)

        def step() -> Tensor:
            norm: Tensor = torch.linalg.vector_norm(grad)
            torch._foreach_mul_([grad], (1 / norm).clamp(max=1.0))
            optimizer.step()
            return norm

        return Timed(step)


def curves(device: torch.device, dtype: torch.dtype, seconds: float) -> dict[Kind, Curve]:
    """
    Return the measured seconds of each kind of operation, forward and backward.

    All are measured in turn, round after round until `seconds` have passed, and the median over the rounds counts: whatever slows
    the machine for a moment then slows a few rounds of many operations. A size that would take too long is skipped, and counts as
    slow per element as the largest one measured.
    """
    operations = Operations(device, dtype)
    points = [(kind, sizes) for kind, axes in GRIDS.items() for sizes in itertools.product(*axes)]
    found: dict[tuple[Kind, tuple[int, ...]], list[tuple[float, float]]] = {point: [] for point in points}
    end, slowest = time.perf_counter() + seconds, seconds / 50
    for number in range(MOST_ROUNDS):
        for kind, sizes in points:
            so_far = found[kind, sizes]
            if number and (not so_far or time.perf_counter() > end):
                continue
            if not number and _expected(kind, sizes, found) > slowest:
                continue
            so_far.append(_measure(partial(operations.make, kind, sizes), device))
    return {name: curve for kind in GRIDS for name, curve in _curves_of(kind, found)}


def _expected(kind: Kind, sizes: tuple[int, ...], found: Mapping[Any, Sequence[tuple[float, float]]]) -> float:
    """Return the seconds that a size may take, from the largest smaller one of its kind; 0 if it is the first."""
    work = _work(kind, sizes)
    smaller = [
        (_work(kind, other), sum(times[0])) for (k, other), times in found.items()
        if k == kind and times and _work(kind, other) < work
    ]  # fmt: skip
    if not smaller:
        return 0.0
    known, seconds = max(smaller)
    return seconds * work / known


def _work(kind: Kind, sizes: Sequence[int]) -> int:
    return math.prod(size**power for size, power in zip(sizes, POWERS.get(kind, (1, 1, 1)), strict=False))


def _curves_of(
    kind: Kind, found: Mapping[tuple[Kind, tuple[int, ...]], Sequence[tuple[float, float]]]
) -> Iterator[tuple[Kind, Curve]]:
    """Yield the curve of a kind's forward, and of its backward if it has one."""
    for name, way in ((kind, 0), (f"{kind} back", 1)):
        seconds: list[float] = []
        per_work = 0.0
        for sizes in itertools.product(*GRIDS[kind]):
            measured = [times[way] for times in found[kind, sizes]]
            seconds.append(statistics.median(measured) if measured else per_work * _work(kind, sizes))
            per_work = seconds[-1] / _work(kind, sizes)
        if all(seconds):
            yield cast("Kind", name), Curve(GRIDS[kind], seconds, POWERS.get(kind, ()))


def _measure(make: Callable[[], Timed], device: torch.device) -> tuple[float, float]:
    """Return the seconds of an operation's forward, and of its backward; 0 without one. The best of a few turns counts."""
    copies = [make()]
    once = _best(copies[0].run, device)
    copies += [make() for _ in range(min(MOST_COPIES, int(ABOUT / once)) - 1)]
    count = len(copies)

    def run_all() -> None:
        for each in copies:
            each.run()

    forward = _best(run_all, device) / count
    if not copies[0].inputs:
        return forward, 0.0
    outs, inputs = [each.run() for each in copies], [tensor for each in copies for tensor in each.inputs]
    grads = [torch.ones_like(out) for out in outs]
    return forward, _best(lambda: torch.autograd.grad(outs, inputs, grads, retain_graph=True), device) / count


def _best(run: Callable[[], object], device: torch.device) -> float:
    run()
    times = []
    for _ in range(TURNS):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)
