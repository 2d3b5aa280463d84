"""The operations of `models/layers.py`, `attention.py`, `rope.py` and `loss.py`, on tensors without contents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from shoal.plan.rehearse.tape import Memory, Space, Tape, Tensor
from shoal.plan.rehearse.work import Kind, Work

FLOAT32: Final = 4
INT64: Final = 8
# As in models/loss.py, which imports torch
CHUNK_BYTES: Final = 256 * 2**20
SLICE_BYTES_CPU: Final = 2 * 2**20


@dataclass(frozen=True)
class Kernels:
    """
    Which kernels a device runs. width: bytes of an element of an activation. tiles: whether a CPU has matrix tiles (AMX).

    copies: whether messages are copied, as gloo does on CPUs.
    """

    cuda: bool
    width: int
    tiles: bool = False
    copies: bool = False


class Layers:
    """Operations with the lifetimes and costs of those of a rank."""

    def __init__(self, memory: Memory, kernels: Kernels) -> None:
        self.tape = Tape(memory)
        self.kernels = kernels
        self.work = Work()

    # --- elements

    def new(self, count: int, width: int | None = None, part: str | None = None) -> Tensor:
        """Allocate a tensor; of forward, it counts as an activation, whether or not backward needs it."""
        part = part or ("activations" if self.tape.recording else "temporary")
        return self.tape.new(count, self.kernels.width if width is None else width, part)

    def copied(self, *tensors: Tensor) -> None:
        """Count one kernel that reads or writes these tensors."""
        self.work.op("copy", sum(t.count * t.width for t in tensors))

    def elementwise(
        self, inputs: Sequence[Tensor], count: int, saved: Sequence[Tensor] = (), width: int | None = None
    ) -> Tensor:
        """One kernel from `inputs` to a new tensor; backward makes a gradient for each input that has one."""
        out = self.new(count, width)
        self.copied(*inputs, out)
        sizes = [(t.count, t.width) for t in inputs]

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            made = [self.new(*size) for size in sizes]
            for each in made:
                self.copied(each, each)
            return [each.space for each in made]

        return self.tape.record(out, inputs, saved, backward)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        out = self.new(a.count, a.width)
        self.work.op("add", a.count)
        return self.tape.record(out, [a, b], [], lambda grads, _: [grads[0], grads[0]])

    def cast(self, x: Tensor, width: int, part: str = "temporary") -> Tensor:
        """`x.to(dtype)`: the same tensor if the dtype is the same."""
        if x.width == width:
            return x
        out = self.new(x.count, width, part)
        self.copied(x, out)
        before = x.width

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            made = self.new(out_count, before)
            self.copied(made, made)
            return [made.space]

        out_count = x.count
        return self.tape.record(out, [x], [], backward)

    def notify(self, x: Tensor, arrived: Callable[[], None]) -> Tensor:
        """Return a view of `x`; `arrived` is called when backward has its gradient."""
        out = Tensor(x.space, x.count, x.width)

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            arrived()
            return grads

        return self.tape.record(out, [x], [], backward)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """`torch.cat`; backward returns views of the gradient."""
        out = self.new(sum(t.count for t in tensors), tensors[0].width)
        self.copied(out, out)
        number = len(tensors)
        return self.tape.record(out, tensors, [], lambda grads, _: [grads[0]] * number)

    def view(self, x: Tensor, count: int, *, fills: int) -> Tensor:
        """Return a part of `x`; backward makes a gradient of `fills` elements, with zeros around the part's."""
        out, width = Tensor(x.space, count, x.width), x.width

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            made = self.new(fills, width)
            self.copied(made, made)
            return [made.space]

        return self.tape.record(out, [x], [], backward)

    def views(self, x: Tensor, counts: Sequence[int], *, sliced: bool = False) -> list[Tensor]:
        """Return all parts of `x`. Their gradients are joined, or if `sliced` put into zeros one by one, and added."""
        if sliced:
            return [self.view(x, count, fills=x.count) for count in counts]
        outs = [Tensor(x.space, count, x.width) for count in counts]
        total, width = x.count, x.width

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            made = self.new(total, width)
            self.copied(made, made)
            return [made.space]

        self.tape.several(outs, x, backward)
        return outs

    # --- products

    def expensive(self, make: Callable[[], Tensor], count: int, width: int) -> Tensor:
        """`Tape.expensive`, for a result of this size."""
        return Tensor(self.tape.expensive(make).space, count, width)

    def linear(self, x: Tensor, weight: Tensor, inputs: int, outputs: int, bias: Tensor | None = None) -> Tensor:
        """`F.linear` of [rows, inputs] and [outputs, inputs]."""
        rows, width = x.count // inputs, x.width
        used = self.cast(weight, width)
        used_bias = None if bias is None else self.cast(bias, width)

        def make() -> Tensor:
            self.work.op("linear", rows, inputs, outputs)
            return self.new(rows * outputs, width)

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            found: list[Space | None] = [self.new(rows * inputs, width).space, self.new(inputs * outputs, width).space]
            self.work.op("linear back", rows, inputs, outputs)
            if used_bias is not None:
                self.work.op("sum", rows * outputs)
                found.append(self.new(outputs, width).space)
            return found

        tensors = [x, used] + ([] if used_bias is None else [used_bias])
        node = self.tape.save(tensors, [x, used], backward)
        out = self.expensive(make, rows * outputs, width)
        out.node = node
        return out

    # --- norms

    def rms_norm(self, x: Tensor, weight: Tensor, dim: int) -> Tensor:
        """`RMSNorm`: shoal's own function on a CPU, torch's kernel on CUDA."""
        rows = x.count // dim
        used = self.cast(weight, x.width)
        out = self.new(x.count, x.width)
        scale = self.new(rows, FLOAT32)
        if not self.kernels.cuda and x.width != FLOAT32:
            wide, product = self.new(x.count, FLOAT32), self.new(x.count, FLOAT32)
            del wide, product
        self.work.op("rms_norm", rows, dim)
        count, width = x.count, x.width

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            self.work.op("rms_norm back", rows, dim)
            if self.kernels.cuda:
                made, d_weight = self.new(count, width), self.new(dim, width)
                return [made.space, d_weight.space]
            wide = [self.new(count, FLOAT32) for _ in range(2)] if width != FLOAT32 else []  # grad, x
            normed = self.new(count, FLOAT32)
            product = self.new(count, FLOAT32)
            d_weight = self.new(dim, FLOAT32)
            d_x = self.new(count, FLOAT32)
            if width != FLOAT32:
                narrow = self.new(count, width)
                return [narrow.space, d_weight.space]
            del wide, normed, product
            return [d_x.space, d_weight.space]

        return self.tape.record(out, [x, used], [x, used, scale], backward)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, dim: int) -> Tensor:
        rows = x.count // dim
        used, shift = self.cast(weight, x.width), self.cast(bias, x.width)
        out = self.new(x.count, x.width)
        mean, scale = self.new(rows, FLOAT32), self.new(rows, FLOAT32)
        self.work.op("layer_norm", rows, dim)
        count, width = x.count, x.width

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            made = [self.new(count, width), self.new(dim, width), self.new(dim, width)]
            self.work.op("layer_norm back", rows, dim)
            return [each.space for each in made]

        return self.tape.record(out, [x, used, shift], [x, used, mean, scale, shift], backward)

    # --- attention

    def rotate(self, x: Tensor, rope: Sequence[Tensor]) -> Tensor:
        """Rotary embedding: a new tensor in both directions. rope: cosines and sines, shared by all layers."""
        out = self.new(x.count, x.width)
        self.work.op("rotate", x.count)
        count, width = x.count, x.width

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            made = self.new(count, width)
            self.work.op("rotate back", count)
            return [made.space]

        return self.tape.record(out, [x], rope, backward)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, batch: int, queries: int, keys: int, heads: int, head_dim: int,
                  mask: Tensor | None) -> Tensor:  # fmt: skip
        """Fused attention: linear in the sequence; its backward recomputes the scores."""
        width = q.width
        if not self.kernels.cuda and not self.kernels.tiles:
            q, k, v = (self.cast(each, FLOAT32) for each in (q, k, v))
        inner = q.width
        sizes = batch * heads, queries, keys, head_dim
        kind: Kind = "attention" if mask is None else "masked attention"
        back: Kind = "attention back" if mask is None else "masked attention back"

        def make() -> Tensor:
            self.work.op(kind, *sizes)
            return self.new(q_count, inner)

        q_count = q.count
        out = self.expensive(make, q_count, inner)
        logsumexp = self.expensive(lambda: self.new(batch * heads * queries, FLOAT32), batch * heads * queries, FLOAT32)
        saved = [q, k, v, out, logsumexp]
        if mask is not None:  # torch makes an additive mask of a boolean one, in each layer
            saved.append(self.new(mask.count, inner))
        counts = [(t.count, t.width) for t in (q, k, v)]

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            made = [self.new(*size) for size in counts]
            self.work.op(back, *sizes)
            return [each.space for each in made]

        self.tape.record(out, [q, k, v], saved, backward)
        del saved
        return self.cast(out, width)

    # --- feed-forward

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        out = self.new(gate.count, gate.width)
        self.work.op("swiglu", gate.count)
        count, width = gate.count, gate.width

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            scaled = self.new(count, width)
            d_gate = self.new(count, width)
            del scaled
            d_up = self.new(count, width)
            self.work.op("swiglu back", count)
            return [d_gate.space, d_up.space]

        return self.tape.record(out, [gate, up], [gate, up], backward)

    def gelu(self, x: Tensor) -> Tensor:
        out = self.new(x.count, x.width)
        self.work.op("gelu", x.count)
        count, width = x.count, x.width

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            made = self.new(count, width)
            self.work.op("gelu back", count)
            return [made.space]

        return self.tape.record(out, [x], [x], backward)

    # --- ends

    def embedding(self, table: Tensor, tokens: int, dim: int) -> Tensor:
        out = self.new(tokens * dim, table.width)
        self.work.op("embedding", out.count)
        rows, width = table.count, table.width

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            made = self.new(rows, width)
            self.work.op("embedding back", rows)
            return [made.space]

        return self.tape.record(out, [table], [], backward)

    def linear_cross_entropy(self, hidden: Tensor, weight: Tensor, rows: int, dim: int) -> Tensor:
        """`linear_cross_entropy_sum`: logits of a chunk of tokens at a time, their gradients in forward."""
        tokens, width = hidden.count // dim, hidden.width
        used = weight if weight.width == width else self.new(weight.count, width)
        loss = self.new(1, FLOAT32)
        d_hidden = self.new(hidden.count, width)
        d_weight: Tensor | None = None
        chunk = max(1, CHUNK_BYTES // (rows * width))
        for start in range(0, tokens, chunk):
            count = min(chunk, tokens - start)
            logits = self.new(count * rows, width, "logits")
            self.work.op("linear", count, dim, rows)
            self.slices(logits, count, rows)
            product = self.new(rows * dim, width)
            self.work.op("linear back", count, dim, rows)
            if d_weight is None:
                d_weight = product if width == FLOAT32 else self.new(rows * dim, FLOAT32)
            else:
                self.work.op("sum", rows * dim)
            del logits, product
        assert d_weight is not None
        d_weight.space.held = not self.kernels.cuda  # a loss that returns what it has saved holds it
        del used
        sizes = (d_hidden.count, width), (d_weight.count, FLOAT32)

        def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
            # a CPU finds that the loss is not scaled, and returns what forward has made
            return [self.new(*size).space for size in sizes] if self.kernels.cuda else [*saved]

        return self.tape.record(loss, [hidden, weight], [d_hidden, d_weight], backward)

    def slices(self, logits: Tensor, count: int, rows: int) -> None:
        """Take the softmax of a chunk, a slice at a time: float32 probabilities, whose gradient replaces the logits."""
        limit = CHUNK_BYTES if self.kernels.cuda else SLICE_BYTES_CPU
        step = max(1, limit // (FLOAT32 * rows))
        size = min(step, count) * rows
        # torch casts other dtypes first
        wide = None if logits.width == FLOAT32 else self.new(size, FLOAT32, "logits")
        self.new(size, FLOAT32, "logits")
        del wide
        self.work.op("softmax", count, rows)
