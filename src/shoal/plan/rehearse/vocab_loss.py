"""The loss of `parallel/vocab_loss.py`, whose vocabulary is sharded over ranks."""

from __future__ import annotations

from shoal.plan.rehearse.collectives import Along
from shoal.plan.rehearse.layers import CHUNK_BYTES, FLOAT32, Layers
from shoal.plan.rehearse.tape import Space, Tensor


def vocab_parallel_loss(layers: Layers, along: Along, hidden: Tensor, weight: Tensor, rows: int, dim: int) -> Tensor:
    """`vocab_parallel_cross_entropy_sum` on the gathered hidden states; `rows` of the head are here."""
    hidden = along.all_gather(hidden)
    tokens, width = hidden.count // dim, hidden.width
    used = weight if weight.width == width else layers.new(weight.count, width)
    loss = layers.new(1, FLOAT32)
    d_hidden, d_weight = layers.new(hidden.count, width), layers.new(rows * dim, FLOAT32)
    chunk = max(1, CHUNK_BYTES // (FLOAT32 * rows))
    for start in range(0, tokens, chunk):
        count = min(chunk, tokens - start)
        logits = layers.new(count * rows, width, "logits")
        layers.work.op("linear", count, dim, rows)
        if width != FLOAT32:
            wide = layers.new(count * rows, FLOAT32, "logits")
            del logits
            logits = wide
            del wide
        layers.work.op("softmax", count, rows)
        along.tell("all_reduce", FLOAT32 * count)
        along.gather_parts(2 * count, FLOAT32, first=True)
        d_logits = logits if width == FLOAT32 else layers.new(count * rows, width, "logits")
        del logits
        product = layers.new(rows * dim, width)
        layers.work.op("linear back", count, dim, rows)
        layers.work.op("sum", rows * dim)
        del product, d_logits
    del used
    sizes = (d_hidden.count, width), (d_weight.count, FLOAT32)

    def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
        return [layers.new(*size).space for size in sizes]

    return layers.tape.record(loss, [hidden, weight], [d_hidden, d_weight], backward)
