"""The forward of each family of models on one rank, on tensors without contents: `models/llama.py` and `models/gpt2.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.config.families import FAMILIES
from shoal.config.options import Model
from shoal.plan.rehearse.collectives import Along
from shoal.plan.rehearse.context import Heads, across
from shoal.plan.rehearse.layers import FLOAT32, Layers
from shoal.plan.rehearse.tape import Tensor

Weights = Mapping[str, Tensor]  # a block's, by name inside the block
Shape = tuple[int, int]  # rows, elements of a row; a vector has rows of one element


@dataclass(frozen=True)
class Part:
    """
    What a rank computes of a micro-batch.

    seq_len: tokens of a row on this rank, before tensor parallel splits them further. tp, cp: axes of several ranks, or None.
    """

    rows: int
    seq_len: int
    tp: Along | None = None
    cp: Along | None = None
    cp_method: str = "allgather"

    @property
    def tokens(self) -> int:
        return self.rows * self.seq_len

    def split(self, size: int) -> int:
        """Divide by `tp`; the first rank has the most."""
        return size if self.tp is None else -(-size // self.tp.size)


@dataclass(frozen=True)
class Around:
    """What all blocks share: cosines and sines, empty without rotary positions, and the document mask."""

    rope: Sequence[Tensor]
    mask: Tensor | None


@dataclass(frozen=True)
class Sizes:
    """The numbers of a resolved `Model` that a forward needs."""

    family: str
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    num_layers: int
    max_seq_len: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool

    @classmethod
    def of(cls, model: Model) -> Sizes:
        assert model.num_kv_heads is not None
        assert model.head_dim is not None
        assert model.ffn_dim is not None
        assert model.vocab_size is not None
        return cls(
            family=model.family, dim=model.dim, heads=model.num_heads, kv_heads=model.num_kv_heads,
            head_dim=model.head_dim, ffn_dim=model.ffn_dim, vocab_size=model.vocab_size, num_layers=model.num_layers,
            max_seq_len=model.max_seq_len, tied=model.tie_embeddings, qkv_bias=model.qkv_bias, qk_norm=model.qk_norm,
        )  # fmt: skip

    @property
    def has_biases(self) -> bool:
        return FAMILIES[self.family].biases

    def block(self) -> dict[str, Shape]:
        """Return the shape of each parameter of a block, in the model's order."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = self._norm("attention_norm")
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            found |= self._linear(f"attention.{name}", rows, self.dim, bias=self.has_biases or self.qkv_bias)
        found |= self._linear("attention.o", self.dim, q, bias=self.has_biases)
        if self.qk_norm:
            found |= {"attention.q_norm.weight": (self.head_dim, 1), "attention.k_norm.weight": (self.head_dim, 1)}
        found |= self._norm("ffn_norm")
        for name in gate_names(self.family):
            found |= self._linear(f"ffn.{name}", self.ffn_dim, self.dim, bias=self.has_biases)
        return found | self._linear("ffn.down", self.dim, self.ffn_dim, bias=self.has_biases)

    def before(self) -> dict[str, Shape]:
        """Return the shape of each parameter before the blocks."""
        found = {"embed.weight": (self.vocab_size, self.dim)}
        return found if FAMILIES[self.family].rotary else found | {"position.weight": (self.max_seq_len, self.dim)}

    def after(self) -> dict[str, Shape]:
        """Return the shape of each parameter after the blocks."""
        return self._norm("norm") | ({} if self.tied else {"head.weight": (self.vocab_size, self.dim)})

    def _norm(self, name: str) -> dict[str, Shape]:
        return {f"{name}.weight": (self.dim, 1)} | ({f"{name}.bias": (self.dim, 1)} if self.has_biases else {})

    @staticmethod
    def _linear(name: str, outputs: int, inputs: int, *, bias: bool) -> dict[str, Shape]:
        return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs, 1)} if bias else {})


def gate_names(family: str) -> tuple[str, ...]:
    """Return the projections into the feed-forward's inner width."""
    return ("gate", "up") if FAMILIES[family].gated else ("up",)


def block_forward(layers: Layers, sizes: Sizes, part: Part, weights: Weights, x: Tensor, around: Around) -> Tensor:
    """Run one block on `x`, [tokens, dim]; with tensor parallel on this rank's tokens."""

    def norm(name: str, x: Tensor) -> Tensor:
        if sizes.has_biases:
            return layers.layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], sizes.dim)
        return layers.rms_norm(x, weights[f"{name}.weight"], sizes.dim)

    def sublayer(name: str, row: str, x: Tensor) -> Tensor:
        if part.tp is not None:
            x = part.tp.all_gather(x)
        out = (
            _attention(layers, sizes, part, weights, x, around)
            if name == "attention"
            else _ffn(layers, sizes, part, weights, x)
        )
        del x
        if part.tp is None:
            return out
        return part.tp.reduce_scatter(out, weights.get(f"{name}.{row}.bias"))

    x = layers.add(x, sublayer("attention", "o", norm("attention_norm", x)))
    return layers.add(x, sublayer("ffn", "down", norm("ffn_norm", x)))


def _attention(layers: Layers, sizes: Sizes, part: Part, weights: Weights, x: Tensor, around: Around) -> Tensor:
    dim, d = sizes.dim, sizes.head_dim
    heads, kv_heads = part.split(sizes.heads), part.split(sizes.kv_heads)
    q, k, v = (
        layers.linear(x, weights[f"attention.{n}.weight"], dim, count * d, weights.get(f"attention.{n}.bias"))
        for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    if sizes.qk_norm:
        q = layers.rms_norm(q, weights["attention.q_norm.weight"], d)
        k = layers.rms_norm(k, weights["attention.k_norm.weight"], d)
    if around.rope:
        q, k = layers.rotate(q, around.rope), layers.rotate(k, around.rope)
    out = attend(layers, part, q, k, v, heads=heads, kv_heads=kv_heads, head_dim=d, mask=around.mask)
    del q, k, v, x
    bias = None if part.tp is not None else weights.get("attention.o.bias")
    return layers.linear(out, weights["attention.o.weight"], heads * d, dim, bias)


def attend(layers: Layers, part: Part, q: Tensor, k: Tensor, v: Tensor, *, heads: int, kv_heads: int, head_dim: int,
           mask: Tensor | None) -> Tensor:  # fmt: skip
    """`attend`, or what context parallel does in its place."""
    size = {"batch": part.rows, "head_dim": head_dim}
    if part.cp is None:
        return layers.attention(q, k, v, queries=part.seq_len, keys=part.seq_len, heads=heads, mask=mask, **size)
    here = Heads(part.rows, part.seq_len, heads, kv_heads, head_dim)
    return across(layers, part.cp, part.cp_method, here, q, k, v, mask)


def _ffn(layers: Layers, sizes: Sizes, part: Part, weights: Weights, x: Tensor) -> Tensor:
    ffn_dim = part.split(sizes.ffn_dim)
    gates = [
        layers.linear(x, weights[f"ffn.{name}.weight"], sizes.dim, ffn_dim, weights.get(f"ffn.{name}.bias"))
        for name in gate_names(sizes.family)
    ]
    inside = layers.swiglu(*gates) if len(gates) > 1 else layers.gelu(*gates)
    del x, gates
    bias = None if part.tp is not None else weights.get("ffn.down.bias")
    return layers.linear(inside, weights["ffn.down.weight"], ffn_dim, sizes.dim, bias)


def enter(layers: Layers, sizes: Sizes, part: Part, weights: Weights) -> Tensor:
    """Look up a micro-batch's embeddings; return the first block's input."""
    x = _lookup(layers, sizes, part, weights)
    if "position.weight" in weights:
        positions = layers.embedding(weights["position.weight"], part.split(part.tokens), sizes.dim)
        x = layers.add(x, positions)
        del positions
    return layers.cast(x, layers.kernels.width)


def _lookup(layers: Layers, sizes: Sizes, part: Part, weights: Weights) -> Tensor:
    if part.tp is None:
        return layers.embedding(weights["embed.weight"], part.tokens, sizes.dim)
    here = layers.new(part.tokens, 1)
    found = layers.embedding(weights["embed.weight"], part.tokens, sizes.dim)
    found = layers.elementwise([found], found.count, [here], FLOAT32)
    return part.tp.reduce_scatter(found)


def rope(layers: Layers, sizes: Sizes, part: Part) -> list[Tensor]:
    """Return cosines and sines, shared by all blocks of a micro-batch; empty without rotary positions."""
    if not FAMILIES[sizes.family].rotary:
        return []
    count, width = part.tokens * sizes.head_dim, layers.kernels.width
    return [layers.new(count, width, "activations"), layers.new(count // 2, width, "activations")]


def document_mask(layers: Layers, part: Part) -> Tensor:
    """Return the causal mask within documents, a byte for each pair of tokens of a row."""
    pairs = part.seq_len * part.seq_len
    causal, same = layers.new(pairs, 1), layers.new(part.rows * pairs, 1)
    mask = layers.new(part.rows * pairs, 1, "activations")
    layers.copied(causal, same, same, mask)
    return mask


def leave(layers: Layers, sizes: Sizes, weights: Weights, x: Tensor) -> Tensor:
    """Apply the last norm."""
    if sizes.has_biases:
        return layers.layer_norm(x, weights["norm.weight"], weights["norm.bias"], sizes.dim)
    return layers.rms_norm(x, weights["norm.weight"], sizes.dim)
