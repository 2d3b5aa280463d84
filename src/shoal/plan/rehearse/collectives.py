"""The collectives of `parallel/collectives.py` along an axis: their memory, and the bytes they send."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from shoal.plan.rehearse.layers import FLOAT32, Layers
from shoal.plan.rehearse.tape import Space, Tensor

Kind = Literal["all_gather", "all_to_all", "all_reduce"]


@dataclass(frozen=True)
class Along:
    """An axis of several ranks."""

    layers: Layers
    name: str
    size: int

    def tell(self, kind: Kind, size: int) -> None:
        """Count a collective. size: bytes of the whole result of an all-gather, of this rank's input otherwise."""
        self.layers.work.messages[kind, self.name, size] += 1

    def gather_parts(self, count: int, width: int, *, first: bool = False) -> Tensor:
        """All-gather `count` elements of each rank. first: along the first dim, so that nothing is put in order."""
        parts = self.layers.new(self.size * count, width)
        self.tell("all_gather", parts.space.size)
        if self.layers.kernels.copies:  # gloo gathers into one buffer of its own
            self.layers.new(self.size * count, width, "messages")
        if first:
            return parts
        out = self.layers.new(parts.count, width)
        self.layers.copied(parts, out)
        return out

    def exchange(self, count: int, width: int) -> Tensor:
        """All-to-all of `count` elements; each rank keeps its part of all."""
        sent = self.layers.new(count, width)
        got = self.layers.new(count, width)
        self.layers.copied(sent, sent)
        self.tell("all_to_all", sent.space.size)
        return got

    def sum_parts(self, count: int, width: int) -> Tensor:
        """Reduce-scatter `count` elements, added in float32."""
        got = self.exchange(count, width)
        total = self.layers.new(count // self.size, FLOAT32)
        self.layers.copied(got, total, total)
        if width == FLOAT32:
            return total
        return self.layers.new(count // self.size, width)

    def all_gather(self, x: Tensor, *, first: bool = False) -> Tensor:
        count, width = x.count, x.width
        out = self.gather_parts(count, width, first=first)
        return self.record(out, x, lambda: self.sum_parts(count * self.size, width))

    def reduce_scatter(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        count, width = x.count, x.width
        out = self.sum_parts(count, width)
        return self.record(out, x, lambda: self.gather_parts(count // self.size, width), bias)

    def all_to_all(self, x: Tensor) -> Tensor:
        count, width = x.count, x.width

        def swap() -> Tensor:
            got = self.exchange(count, width)
            out = self.layers.new(count, width)
            self.layers.copied(got, out)
            return out

        return self.record(swap(), x, swap)

    def record(self, out: Tensor, x: Tensor, back: Callable[[], Tensor], bias: Tensor | None = None) -> Tensor:
        count, width = out.count, out.width

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            if bias_size is None:
                return [back().space]
            if width != FLOAT32:
                self.layers.new(count, FLOAT32)
            d_bias = self.layers.new(bias_size, FLOAT32).space
            return [back().space, d_bias]

        bias_size = None if bias is None else bias.count
        return self.layers.tape.record(out, [x] if bias is None else [x, bias], [], backward)
