"""Attention over a sequence that several ranks share, as `parallel/context.py` computes it."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.plan.rehearse.collectives import Along
from shoal.plan.rehearse.layers import Layers
from shoal.plan.rehearse.tape import Space, Tensor


@dataclass(frozen=True)
class Heads:
    """The sizes of an attention on this rank. tokens: of a row on this rank."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int


def across(
    layers: Layers, along: Along, method: str, size: Heads, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Return the attention of this rank's queries. Ring attention is counted as the all-gather, whose peak it does not exceed."""
    return (_ulysses if method == "ulysses" else _all_gather)(layers, along, size, q, k, v, mask)


def _ulysses(layers: Layers, along: Along, size: Heads, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    counts = [q.count, k.count, v.count]
    width = q.width
    joined = layers.join([q, k, v])
    own = along.all_to_all(joined)
    del joined, q, k, v
    parts = layers.views(own, counts)
    del own
    out = layers.attention(
        *parts, batch=size.rows, queries=size.tokens * along.size, keys=size.tokens * along.size,
        heads=size.heads // along.size, head_dim=size.head_dim, mask=mask,
    )  # fmt: skip
    del parts
    assert out.width == width
    return along.all_to_all(out)


def _all_gather(
    layers: Layers, along: Along, size: Heads, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """Gather the keys and values of all ranks for two chunks of queries: this rank's early and its late one."""
    whole = _whole_sequence(layers, along, layers.join([k, v]))
    del k, v
    length = size.tokens // 2
    ends = (length, (2 * along.size) * length)  # of the first rank, which has the last chunk
    outs = []
    row = 2 * size.kv_heads * size.head_dim  # elements of a token's keys and values
    for half, end in zip(layers.views(q, [q.count // 2] * 2, sliced=True), ends, strict=True):
        seen = layers.view(whole, size.rows * end * row, fills=whole.count)
        keys, values = layers.views(seen, [seen.count // 2] * 2)
        del seen
        own = layers.new(length * end, 1) if mask is None and end != length else mask
        outs.append(
            layers.attention(
                half,
                keys,
                values,
                batch=size.rows,
                queries=length,
                keys=end,
                heads=size.heads,
                head_dim=size.head_dim,
                mask=own,
            )
        )
        del half, keys, values, own
    del whole, q
    return layers.join(outs)


def _whole_sequence(layers: Layers, along: Along, x: Tensor) -> Tensor:
    """Gather all chunks, and put them in the order of the sequence."""
    parts = along.all_gather(x, first=True)
    out = layers.new(parts.count, parts.width)
    layers.copied(parts, out)
    count, width = parts.count, parts.width

    def backward(grads: list[Space | None], saved: list[Space]) -> list[Space | None]:
        early, late = layers.new(count // 2, width), layers.new(count - count // 2, width)
        grads.clear()
        joined = layers.new(count, width)
        layers.copied(early, late, joined, joined)
        return [joined.space]

    return layers.tape.record(out, [parts], [], backward)
