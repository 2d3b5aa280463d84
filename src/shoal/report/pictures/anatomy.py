"""The weights of a model, by name and shape, and the axes that split them, from the config alone. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from shoal.config.families import FAMILIES
from shoal.config.options import Model
from shoal.config.presets import resolve_shape
from shoal.plan.estimate import folder_shapes

ROWS_OF_A_FOLDER = 3  # weights side by side, of a model whose blocks are known only from its files


@dataclass(frozen=True)
class Weight:
    """
    A weight, and perhaps its bias.

    split: the dimension that tensor parallel splits, with the bias along dimension 0; None: each rank has all of it.
    """

    name: str
    shape: tuple[int, ...]
    split: int | None = None
    bias: int = 0  # elements

    @property
    def parameters(self) -> int:
        """Return the number of elements, the bias included."""
        return prod(self.shape) + self.bias

    def on_a_rank(self, tp: int) -> tuple[int, ...]:
        """Return the shape of one tensor-parallel rank's part; the largest one if `tp` does not divide it."""
        return tuple(-(-size // tp) if dim == self.split else size for dim, size in enumerate(self.shape))


@dataclass(frozen=True)
class Anatomy:
    """A model's weights in the order in which they compute; weights of one row read the same input."""

    before: Sequence[Sequence[Weight]]
    block: Sequence[Sequence[Weight]]  # of each of `layers` blocks
    after: Sequence[Sequence[Weight]]
    layers: int
    parameters: int
    is_split_known: bool = True

    @property
    def block_parameters(self) -> int:
        """Return the parameters of one block."""
        return sum(weight.parameters for row in self.block for weight in row)


def anatomy(model: Model) -> Anatomy:
    """Return the weights of a model. `model.vocab_size` must be known."""
    return _native(resolve_shape(model)) if FAMILIES[model.family].native else _of_folder(model)


def _native(model: Model) -> Anatomy:
    """Return the weights of one of shoal's own families; tests compare them with the model that torch builds."""
    family = FAMILIES[model.family]
    assert model.vocab_size is not None
    before = [Weight("embed", (model.vocab_size, model.dim), 0)]
    if not family.rotary:
        before.append(Weight("position", (model.max_seq_len, model.dim)))
    norm_bias = model.dim * family.biases
    block = [
        [Weight("attention_norm", (model.dim,), bias=norm_bias)],
        *_attention(model),
        [Weight("ffn_norm", (model.dim,), bias=norm_bias)],
        *_feed_forward(model),
    ]
    after = [[Weight("norm", (model.dim,), bias=norm_bias)]]
    if not model.tie_embeddings:
        after.append([Weight("head", (model.vocab_size, model.dim), 0)])
    return _whole([before], block, after, model.num_layers)


def _attention(model: Model) -> list[list[Weight]]:
    assert model.head_dim is not None
    assert model.num_kv_heads is not None
    family = FAMILIES[model.family]
    q, kv, has_bias = (
        model.num_heads * model.head_dim,
        model.num_kv_heads * model.head_dim,
        family.biases or model.qkv_bias,
    )
    norms = [[Weight(f"attention.{x}_norm", (model.head_dim,)) for x in "qk"]] if model.qk_norm else []
    return [
        [Weight(f"attention.{x}", (out, model.dim), 0, out * has_bias) for x, out in (("q", q), ("k", kv), ("v", kv))],
        *norms,
        [Weight("attention.o", (model.dim, q), 1, model.dim * family.biases)],
    ]


def _feed_forward(model: Model) -> list[list[Weight]]:
    assert model.ffn_dim is not None
    family = FAMILIES[model.family]
    wide = (model.ffn_dim, model.dim)
    names = ("gate", "up") if family.gated else ("up",)
    return [
        [Weight(f"ffn.{name}", wide, 0, model.ffn_dim * family.biases) for name in names],
        [Weight("ffn.down", wide[::-1], 1, model.dim * family.biases)],
    ]


def _whole(before: list[list[Weight]], block: list[list[Weight]], after: list[list[Weight]], layers: int) -> Anatomy:
    once = sum(w.parameters for row in (*before, *after) for w in row)
    each = sum(w.parameters for row in block for w in row)
    return Anatomy(before, block, after, layers, once + layers * each)


def _of_folder(model: Model) -> Anatomy:
    """Return the weights of a transformers model, by the names in its folder; the first block is drawn for all of them."""
    shapes = folder_shapes(model)
    numbered = {name: re.search(r"\.(\d+)\.", name) for name in shapes}
    block = [name for name, found in numbered.items() if found and found[1] == "0"]
    outer = [name for name, found in numbered.items() if found is None]
    last = [name for name in outer if re.search(r"(norm|ln_f|head)", name)]
    first = [name for name in outer if name not in last]

    def rows(names: Sequence[str], cut: str) -> list[list[Weight]]:
        weights = [Weight(re.sub(cut, "", name).removesuffix(".weight"), shapes[name]) for name in names]
        return [weights[at : at + ROWS_OF_A_FOLDER] for at in range(0, len(weights), ROWS_OF_A_FOLDER)]

    total = sum(map(prod, shapes.values()))
    return Anatomy(
        rows(first, r"^.*?(?=\w+\.weight)"), rows(block, r"^.*?\.0\."), rows(last, r"^.*?(?=\w+\.weight)"),
        model.num_layers, total, is_split_known=False,
    )  # fmt: skip
