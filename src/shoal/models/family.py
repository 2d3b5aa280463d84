"""The interface of a model family: an abstract model, and the tables that parallelization reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from shoal.config.options import Model
from shoal.models.attention import KVCache
from shoal.models.layers import Embedding, Linear, linear
from shoal.models.loss import linear_cross_entropy_sum


@dataclass(frozen=True)
class Initial:
    """Initialization of a parameter: drawn from N(0, std^2), or constant."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


# How a module's weights are split by tensor parallel, and which collectives surround it (`parallel/tensor.py`).
#
# With sequence parallel (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2), as shoal's own families use it:
#   gather_reduce_scatter           all-gathers its input along the sequence and reduce-scatters its output. It contains
#                                   'colwise' layers and one 'rowwise' layer, which run no collective of their own
#   colwise                         splits the weight's outputs
#   rowwise                         splits the weight's inputs, so that the output is a partial sum
#   vocab_parallel                  splits the rows of an embedding or head
#   sequence_parallel               replicates the weight; its input is this rank's part of the sequence
#   local_positions                 replicates the weight, and looks up this rank's part of the positions
#
# Without sequence parallel, as in the plans of transformers, each layer has its own collectives and all else is replicated:
#   colwise_grad_allreduce          as 'colwise'; all-reduces the gradient of its input
#   rowwise_allreduce               as 'rowwise'; all-reduces its output
#   colwise_gather_output           as 'colwise_grad_allreduce'; all-gathers its output
#   rowwise_split_input             as 'rowwise_allreduce'; its input is replicated, and it uses this rank's part
#   replicated                      replicates the weight; every rank computes the same, so that gradients agree
#   replicated_with_grad_allreduce  replicates the weight, which is applied to split heads: gradients are partial sums
TensorParallelStyle = Literal[
    "gather_reduce_scatter", "colwise", "rowwise", "vocab_parallel", "sequence_parallel", "local_positions",
    "colwise_grad_allreduce", "rowwise_allreduce", "colwise_gather_output", "rowwise_split_input", "replicated",
    "replicated_with_grad_allreduce",
]  # fmt: skip


class LanguageModel(nn.Module, ABC):
    """
    Decoder-only model, tokens -> hidden states; single-device code.

    Sharding, checkpointing and compilation are applied from outside, to `blocks`. `compute_dtype` is the dtype of the
    residual stream and of all products (see `layers.py`); parameters remain float32. A pipeline stage is a model without
    some of its modules: the first stage has `embed`, the last has `norm`, and `blocks` keep their names. If the head is tied
    to `embed`, the last stage has a copy of `embed`.
    """

    TENSOR_PARALLEL: ClassVar[Mapping[str, TensorParallelStyle]]  # pattern of a module's name -> its style

    shape: Model
    compute_dtype: torch.dtype
    embed: Embedding
    blocks: nn.ModuleDict  # "0", "1", ...: forward(x, *context, mask, layer's cache)
    norm: nn.Module
    head: Linear | None
    make_mask: Callable[[Tensor], Tensor]  # documents [B, T] -> the mask that `attend` takes
    why_not_cut: str | None = None  # why tensor parallel cannot shard this model; None if it can
    other_names: Mapping[str, str] = MappingProxyType({})  # other names of parameters in files -> the name here
    begins: bool = True  # False on pipeline stages whose input is hidden states
    ends: bool = True  # False on pipeline stages without the last norm

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """
        Return hidden states [B, T, D] after the last norm, in `compute_dtype`, for `logits` or `loss`.

        tokens_BT: on a later pipeline stage, the hidden states [B, T, D] of the previous one.
        positions_BT: each token's position in its document; None: consecutive positions, from the cache's length or 0.
        document_ids_BT: a token attends only to tokens with the same id; None: each row is one document.
        cache: keys and values of earlier tokens, to which this call appends.
        """
        positions = self._positions(tokens_BT, positions_BT, cache)
        context = self.context(positions)
        mask = self._mask(tokens_BT, document_ids_BT, cache)
        x_BTD = self.enter(tokens_BT, positions) if self.begins else tokens_BT
        for index, block in enumerate(self.blocks.values()):
            x_BTD = block(x_BTD, *context, mask, cache.layers[index] if cache else None)
        return self.norm(x_BTD) if self.ends else x_BTD

    @abstractmethod
    def enter(self, tokens_BT: Tensor, positions: Tensor) -> Tensor:
        """Return the first block's input, [B, T, D] in `compute_dtype`; positions are [T] or [B, T]."""

    def context(self, positions: Tensor) -> tuple[object, ...]:
        """Return each block's inputs besides the residual stream and the mask, from positions [T] or [B, T]."""
        return ()

    @staticmethod
    @abstractmethod
    def initial(name: str, shape: Model) -> Initial:
        """Return the initialization of the parameter with this global name."""

    @property
    def architecture(self) -> str | None:
        """Return the name of this model's class in transformers; None if the family determines it."""
        return None

    def constants(self) -> dict[str, Tensor]:
        """Return the tensors that this model's files contain besides parameters, by their name in the files."""
        return {}

    def head_weight(self) -> Tensor:
        """Return the output layer's weight [V, D], float32; without a head, the tied embedding's weight."""
        return self.embed.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V] from [..., D], in the dtype of `hidden`."""
        return linear(hidden, self.head_weight().to(hidden.dtype))

    def loss(
        self, hidden_BTD: Tensor, labels_BT: Tensor, scale: Tensor | float = 1.0, each_BT: Tensor | None = None
    ) -> Tensor:
        """
        Return scale * the cross-entropy summed over labels that are not -100; float32, 0-d.

        each_BT: a float32 buffer that gets each token's term of the sum, without a gradient.
        """
        return linear_cross_entropy_sum(hidden_BTD, self.head_weight(), labels_BT, scale, each_BT)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """Return an empty KV cache for `batch` rows of up to `capacity` tokens, on the device of the weights."""
        shape = self.shape
        assert shape.num_kv_heads is not None
        assert shape.head_dim is not None
        return KVCache(
            num_layers=shape.num_layers, batch=batch, capacity=capacity, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim, dtype=self.compute_dtype, device=self.embed.weight.device,
        )  # fmt: skip

    def _positions(self, tokens_BT: Tensor, given: Tensor | None, cache: KVCache | None) -> Tensor:
        """Return the given positions, or [T] counted from the cache's length. Call before extending the cache."""
        if given is not None:
            return given
        start = cache.length if cache else 0
        return torch.arange(start, start + tokens_BT.shape[1], device=tokens_BT.device)

    def _mask(self, tokens_BT: Tensor, document_ids_BT: Tensor | None, cache: KVCache | None) -> Tensor | None:
        """Return the mask as `attend` takes it; reserves positions in the cache, if there is one."""
        if cache is not None:
            return cache.extend(tokens_BT.shape[1], document_ids_BT)
        return None if document_ids_BT is None else self.make_mask(document_ids_BT)
