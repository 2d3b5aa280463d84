"""GPT-2 (Radford et al. 2019, section 2.3): pre-LayerNorm blocks, a learned position embedding, GELU, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.config.options import Model
from shoal.models.attention import Attend, LayerCache, attend, document_mask
from shoal.models.family import Initial, LanguageModel, TensorParallelStyle
from shoal.models.layers import Embedding, LayerNorm, Linear


class Attention(nn.Module):
    """Causal multi-head self-attention, with dropout on the attention probabilities."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.head_dim = shape.dim // shape.num_heads
        self.dropout = shape.dropout
        self.attend: Attend = attend
        self.q = Linear(shape.dim, shape.dim, bias=True)
        self.k = Linear(shape.dim, shape.dim, bias=True)
        self.v = Linear(shape.dim, shape.dim, bias=True)
        self.o = Linear(shape.dim, shape.dim, bias=True)

    def forward(self, x_BTD: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        # -1 heads: a tensor-parallel rank holds only some of them.
        q_BTHd = self.q(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTHd = self.k(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTHd = self.v(x_BTD).unflatten(-1, (-1, self.head_dim))
        if cache is not None:
            k_BTHd, v_BTHd = cache.append(k_BTHd, v_BTHd)
        dropout = self.dropout if self.training else 0.0
        out: Tensor = self.o(self.attend(q_BTHd, k_BTHd, v_BTHd, mask, dropout=dropout))
        return out


class FeedForward(nn.Module):
    """down(gelu(up x)), with the tanh approximation of GELU that GPT-2 was trained with (arXiv:1606.08415, section 2)."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        assert shape.ffn_dim is not None
        self.up = Linear(shape.dim, shape.ffn_dim, bias=True)
        self.down = Linear(shape.ffn_dim, shape.dim, bias=True)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x_BTD), approximate="tanh"))
        return out


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x), with dropout on both branches."""

    def __init__(self, shape: Model) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.attention_norm = LayerNorm(shape.dim, shape.norm_eps)
        self.attention = Attention(shape)
        self.ffn_norm = LayerNorm(shape.dim, shape.norm_eps)
        self.ffn = FeedForward(shape)

    def forward(self, x_BTD: Tensor, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        x_BTD = x_BTD + self._drop(self.attention(self.attention_norm(x_BTD), mask, cache))
        return x_BTD + self._drop(self.ffn(self.ffn_norm(x_BTD)))

    def _drop(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(x_BTD, self.dropout, self.training) if self.dropout else x_BTD


class GPT2(LanguageModel):
    """embed + position -> blocks -> norm (-> the tied embedding, or a head)."""

    TENSOR_PARALLEL: ClassVar[Mapping[str, TensorParallelStyle]] = {
        "embed": "vocab_parallel",
        "position": "local_positions",
        "blocks.*.attention": "gather_reduce_scatter",
        "blocks.*.attention.q": "colwise",
        "blocks.*.attention.k": "colwise",
        "blocks.*.attention.v": "colwise",
        "blocks.*.attention.o": "rowwise",
        "blocks.*.*_norm": "sequence_parallel",
        "blocks.*.ffn": "gather_reduce_scatter",
        "blocks.*.ffn.up": "colwise",
        "blocks.*.ffn.down": "rowwise",
        "norm": "sequence_parallel",
        "head": "vocab_parallel",
    }

    def __init__(self, shape: Model, compute_dtype: torch.dtype) -> None:
        super().__init__()
        assert shape.vocab_size is not None
        self.shape = shape
        self.compute_dtype = compute_dtype
        self.make_mask = document_mask
        self.embed = Embedding(shape.vocab_size, shape.dim)
        self.position = Embedding(shape.max_seq_len, shape.dim)
        self.blocks = nn.ModuleDict({str(index): Block(shape) for index in range(shape.num_layers)})
        self.norm = LayerNorm(shape.dim, shape.norm_eps)
        self.head = None if shape.tie_embeddings else Linear(shape.dim, shape.vocab_size)

    def enter(self, tokens_BT: Tensor, positions: Tensor) -> Tensor:
        x_BTD = (self.embed(tokens_BT) + self.position(positions)).to(self.compute_dtype)
        return F.dropout(x_BTD, self.shape.dropout, self.training) if self.shape.dropout else x_BTD

    @staticmethod
    def initial(name: str, shape: Model) -> Initial:
        """
        Return a parameter's initialization.

        | parameter | initialization |
        | --- | --- |
        | norm weights | ones |
        | biases | zeros |
        | attention.o, ffn.down (they write to the residual stream) | normal, init_std / sqrt(2 num_layers) |
        | all other matrices, including the position embedding | normal, init_std |
        """
        if name.endswith("norm.weight"):
            return Initial("ones")
        if name.endswith(".bias"):
            return Initial("zeros")
        if name.endswith(("attention.o.weight", "ffn.down.weight")):
            # The residual stream sums 2 num_layers such outputs: its variance then does not grow with depth
            # (Radford et al. 2019, section 2.3).
            return Initial("normal", shape.init_std / (2 * shape.num_layers) ** 0.5)
        return Initial("normal", shape.init_std)
