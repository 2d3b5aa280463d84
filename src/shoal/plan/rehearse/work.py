"""What a step computes and sends: the operations and collectives that a rehearsal counts, by kind and size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal[
    "linear", "linear back",  # rows, inputs, outputs
    "attention", "attention back",  # heads of all rows, queries, keys, elements of a head; causal
    "masked attention", "masked attention back",  # the same with a mask in memory
    "rms_norm", "rms_norm back", "layer_norm", "layer_norm back",  # rows, elements of a row
    "softmax",  # rows, elements of a row: the loss and its gradient, in place of logits
    "swiglu", "swiglu back", "gelu", "gelu back", "rotate", "rotate back", "add", "embedding",  # elements of the result
    "embedding back",  # elements of the table
    "sum",  # elements added to a gradient, or along rows
    "copy",  # bytes read and written
    "update",  # parameters: norm and clipping of their gradients, and the optimizer
    "dispatch",  # kernels that selective checkpointing decides about
    "again",  # a block that backward computes again
    "turn", "step",  # a micro-batch, a step
    "call", "function",  # on a CPU, an operation's cost beyond its own time; not counted, as each operation has it
]  # fmt: skip


class Op(NamedTuple):
    """An operation on tensors of given sizes."""

    kind: Kind
    sizes: tuple[int, ...] = ()


def ring_share(kind: str, ranks: int) -> float:
    """Return what a rank of a ring sends in a collective, as a multiple of its size (see `Work.messages`)."""
    if kind == "send":
        return 1.0
    return (1 + (kind in ("all_reduce", "shared_sum"))) * (ranks - 1) / ranks


@dataclass
class Work:
    """
    What a step computes and sends.

    done: operations of all micro-batches. once: those of the step's end. messages: (kind, axis, bytes) -> number of collectives;
    bytes of an all-gather's whole result, of a rank's input otherwise. Numbers are fractions where they come from a line through
    two rehearsals.
    """

    done: Counter[Op] = field(default_factory=Counter)
    once: Counter[Op] = field(default_factory=Counter)
    messages: Counter[tuple[str, str, int]] = field(default_factory=Counter)

    def toward(self, other: Work, far: float) -> Work:
        """Return the work on the line through this one and `other`, at `far` times their distance."""

        def line(a: Mapping[Any, float], b: Mapping[Any, float]) -> Counter[Any]:
            found = {key: a.get(key, 0) + far * (b.get(key, 0) - a.get(key, 0)) for key in {**a, **b}}
            return Counter({key: amount for key, amount in found.items() if amount})

        return Work(
            line(self.done, other.done), line(self.once, other.once), line(self.messages, other.messages)
        )  # fmt: skip

    def times(self, factor: float) -> Work:
        """Return the work for `factor` times as many micro-batches. Gradients are summed once a step, whatever their number."""
        messages: Counter[Any] = Counter()
        for (kind, axis, size), count in self.messages.items():
            is_once = kind in ("reduce_scatter", "exchange") or axis in ("batch", "dp_replicate")
            messages[kind, axis, size] = count if is_once else factor * count  # type: ignore[assignment]  # a fraction
        done: Counter[Any] = Counter({op: factor * count for op, count in self.done.items()})
        return Work(done, self.once, messages)

    def op(self, kind: Kind, *sizes: int, times: int = 1) -> None:
        """Count an operation."""
        self.done[Op(kind, sizes)] += times

    def sent(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """
        Return the bytes that a rank sends along each axis, if each collective is a ring.

        sizes: ranks along the axes.
        """
        found: Counter[str] = Counter()
        for (kind, axis, size), count in self.messages.items():
            found[axis] += int(ring_share(kind, sizes[axis]) * size * count)
        return dict(found)
