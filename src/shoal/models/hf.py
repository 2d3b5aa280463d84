"""
Any `AutoModelForCausalLM` of transformers as a `LanguageModel`: `model.family: hf`, with `model.from`.

Transformers' code computes each layer and names the parameters. Mixed precision is shoal's (see `layers.py`): parameters are
float32, a block's parameters are cast while the block runs, embeddings are looked up in float32 and cast, and the residual
stream is in the compute dtype. This is the same on one rank, replicated or sharded, since FSDP2 casts a block's
parameters by the same rule. Within a block, transformers' code decides what it rounds.

Transformers detects packed documents by their positions, and builds the mask of each kind of layer from them, including
sliding windows. Not every family reads positions, so `hf_check.py` tests before the first step whether
documents are separated.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from shoal.config.options import Model
from shoal.errors import ModelError
from shoal.models.casting import cast_output, cast_while_running
from shoal.models.family import Initial, LanguageModel, TensorParallelStyle
from shoal.models.hf_head import Head
from shoal.models.hf_open import attention_of, faster_attention_of, open_causal_lm
from shoal.models.hf_plan import read_plan
from shoal.system.torch_private import require


@dataclass(frozen=True)
class _Theirs:
    """Transformers' objects, hidden from `nn.Module`, which would register their modules under a second name."""

    causal_lm: Any
    decoder: Any  # tokens -> hidden states after the last norm
    head: Head
    blocks: Mapping[str, nn.Module]
    buffers: Mapping[str, Tensor]  # as computed at construction, on the CPU
    tied: Mapping[str, str]  # a parameter's other names -> its name
    table: Mapping[str, TensorParallelStyle]


class HuggingFaceCache:
    """
    Cache for decoding: transformers' KV cache, and which positions are padding.

    A model whose cache would hold anything but keys and values recomputes all tokens at each call.
    """

    def __init__(self, past: Any) -> None:
        self.past = past
        self.length = 0
        self.tokens_BS: Tensor | None = None  # all tokens so far, if `past` is None
        self.documents_BS: Tensor | None = None

    def extend(self, tokens_BT: Tensor, documents_BT: Tensor | None) -> None:
        """Append these tokens and their document ids."""
        if documents_BT is None and self.documents_BS is not None:
            raise ValueError("this cache holds several documents: pass documents_BT")
        if documents_BT is not None:
            earlier = [self.documents_BS] if self.documents_BS is not None else []
            if not earlier and self.length:
                raise ValueError("this cache holds one document: pass documents_BT from the first call on")
            self.documents_BS = torch.cat([*earlier, documents_BT], dim=1)
        if self.past is None:
            self.tokens_BS = tokens_BT if self.tokens_BS is None else torch.cat([self.tokens_BS, tokens_BT], dim=1)
        self.length += tokens_BT.shape[1]


class HuggingFaceModel(LanguageModel):
    """Transformers' modules under their own names, with the interface of `LanguageModel`."""

    def __init__(self, shape: Model, compute_dtype: torch.dtype) -> None:
        super().__init__()
        require("hf")
        causal_lm, in_files = open_causal_lm(shape)
        decoder = causal_lm.get_decoder()
        self.shape, self.compute_dtype = shape, compute_dtype
        _check_dtype(causal_lm, compute_dtype)
        table, no_plan = read_plan(causal_lm)
        self._theirs = _Theirs(
            causal_lm, decoder, Head(causal_lm, decoder), find_blocks(decoder),
            {name: buffer.detach().clone() for name, buffer in causal_lm.named_buffers()},
            dict(_tied(causal_lm)), table,
        )  # fmt: skip
        self.why_not_cut = no_plan
        tied = self._theirs.tied
        self.other_names = {
            **{name: name for name in self._theirs.buffers}, **tied,
            **{name: tied.get(first, first) for name, first in in_files.items()},
        }  # fmt: skip
        # shared with `causal_lm`: names are transformers' own, and sharding or moving a parameter here changes it there too
        for registry in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[registry] = causal_lm.__dict__[registry]
        takes = inspect.signature(type(decoder).forward).parameters
        self.takes_positions = "position_ids" in takes
        # the usual implementation, and a faster one for rows without document ids
        self._attention: tuple[str, str | None] = (attention_of(type(causal_lm)), None)
        self._cast()

    # --- interface of `LanguageModel` ----------------------------------------------------------------------

    @property
    def embed(self) -> Any:  # type: ignore[override]
        return self._theirs.causal_lm.get_input_embeddings()

    @property
    def blocks(self) -> Mapping[str, nn.Module]:  # type: ignore[override]
        return self._theirs.blocks

    @property
    def TENSOR_PARALLEL(self) -> Mapping[str, TensorParallelStyle]:  # type: ignore[override]
        return self._theirs.table

    @staticmethod
    def initial(name: str, shape: Model) -> Initial:
        raise ModelError("model.family hf needs weights to start from; set model.from to their folder")

    def enter(self, tokens_BT: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError("transformers' decoder is not split into pipeline stages")

    def train(self, mode: bool = True) -> Self:
        self._theirs.causal_lm.training = mode
        return super().train(mode)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """Allocate as `nn.Module.to_empty`, but keep the buffers' values and the ties of parameters."""
        super().to_empty(device=device, recurse=recurse)
        faster = faster_attention_of(type(self._theirs.causal_lm), torch.device(device), self.compute_dtype)
        self._attention = (self._attention[0], faster)
        for name, value in self._theirs.buffers.items():
            owner, leaf = self._owner(name)
            owner._buffers[leaf] = value.to(device, copy=True)
        for name, first in self._theirs.tied.items():
            (owner, leaf), (one, its_leaf) = self._owner(name), self._owner(first)
            owner._parameters[leaf] = one._parameters[its_leaf]
        return self

    # --- arithmetic ----------------------------------------------------------------------------------------

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Compute `LanguageModel.forward`. Positions of packed documents restart at 0 in each document."""
        theirs = self._theirs
        self._follow(tokens_BT.device)
        usual, faster = self._attention
        if faster is not None:
            theirs.causal_lm.config._attn_implementation = faster if document_ids_BT is None else usual
        given: dict[str, Any] = {"input_ids": tokens_BT, "use_cache": False}
        if cache is not None:
            given |= self._from_cache(cache, tokens_BT, document_ids_BT)
        elif document_ids_BT is not None and not self.takes_positions:
            raise ModelError(
                f"a {theirs.causal_lm.config.model_type} reads no positions, so it cannot separate documents"
            )
        if positions_BT is not None and self.takes_positions and len(given["input_ids"][0]) == positions_BT.shape[-1]:
            given["position_ids"] = positions_BT
        hidden_BTD: Tensor = theirs.decoder(**given)[0]
        if hidden_BTD.shape[1] > tokens_BT.shape[1]:  # without a KV cache all tokens were recomputed
            hidden_BTD = hidden_BTD[:, -tokens_BT.shape[1] :]
        if hidden_BTD.dtype != self.compute_dtype:
            raise ModelError(
                f"the code of a {theirs.causal_lm.config.model_type} returns {hidden_BTD.dtype}, but train.dtype is "
                f"{self.compute_dtype}; set train.dtype to float32"
            )
        return hidden_BTD

    def _from_cache(self, cache: HuggingFaceCache, tokens_BT: Tensor, documents_BT: Tensor | None) -> dict[str, Any]:
        """Extend the cache and return the decoder's arguments. Positions outside the newest document are padding."""
        cache.extend(tokens_BT, documents_BT)
        seen = cache.documents_BS
        if cache.past is None:
            if seen is not None:
                raise ModelError(
                    "this model's state would include padding: give prompts of one length, or one at a time"
                )
            return {"input_ids": cache.tokens_BS}
        mask = None if seen is None else (seen == seen[:, -1:]).long()
        return {"past_key_values": cache.past, "use_cache": True, "attention_mask": mask}

    def new_cache(self, batch: int, capacity: int) -> Any:
        from transformers import DynamicCache

        causal_lm = self._theirs.causal_lm
        keeps = "past_key_values" in inspect.signature(type(self._theirs.decoder).forward).parameters
        if not keeps or getattr(type(causal_lm), "_is_stateful", False) or _turns_again(causal_lm.config, capacity):
            return HuggingFaceCache(None)
        return HuggingFaceCache(DynamicCache(config=causal_lm.config))

    @property
    def architecture(self) -> str:
        return type(self._theirs.causal_lm).__name__

    def constants(self) -> dict[str, Tensor]:
        kept = self._theirs.causal_lm.state_dict()
        return {name: value for name, value in self._theirs.buffers.items() if name in kept}

    def head_weight(self) -> Tensor:
        weight = self._theirs.head.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def logits(self, hidden: Tensor) -> Tensor:
        return self._theirs.head.logits(hidden)

    def loss(
        self, hidden_BTD: Tensor, labels_BT: Tensor, scale: Tensor | float = 1.0, each_BT: Tensor | None = None
    ) -> Tensor:
        return self._theirs.head.loss(hidden_BTD, labels_BT, scale, each_BT)

    # --- construction --------------------------------------------------------------------------------------

    def _cast(self) -> None:
        """Cast each block's parameters together. Elsewhere, cast each module's own parameters, and the output of embeddings."""
        if self.compute_dtype == torch.float32:
            return
        inside = {id(m) for block in self.blocks.values() for m in block.modules()}
        for block in self.blocks.values():
            cast_while_running(block, self.compute_dtype, inside=True)
        for module in self.modules():
            if id(module) in inside or module is self:
                continue
            if isinstance(module, nn.Embedding):
                cast_output(module, self.compute_dtype)
            elif any(True for _ in module.parameters(recurse=False)):
                cast_while_running(module, self.compute_dtype, inside=False)

    def _follow(self, device: torch.device) -> None:
        """Move the buffers to `device`, once. FSDP2 itself moves parameters that are offloaded to the CPU."""
        for name in self._theirs.buffers:
            owner, leaf = self._owner(name)
            buffer = owner._buffers[leaf]
            if buffer is None or buffer.device == device:
                return
            owner._buffers[leaf] = buffer.to(device)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.get_submodule(path), leaf


def _turns_again(config: Any, places: int) -> bool:
    """Return whether cached and new keys could differ in rotation: LongRoPE selects one of two sets of angles by length."""
    rope = getattr(config, "rope_parameters", None) or {}
    first = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    kinds = [part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)]
    return "longrope" in kinds and places > (first or config.max_position_embeddings)


def find_blocks(decoder: nn.Module) -> dict[str, nn.Module]:
    """
    Return a decoder's layers by index: the longest list of modules that has one of the classes in `_no_split_modules`.

    If no list has one, return the longest list. Raises `ModelError` if the decoder has no list of modules.
    """
    names = set(getattr(decoder, "_no_split_modules", None) or ())
    lists: list[list[nn.Module]] = [list(m) for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    fitting: list[list[nn.Module]] = [
        layers for layers in lists if any(type(layer).__name__ in names for layer in layers)
    ] or lists
    if not fitting:
        raise ModelError(
            f"{type(decoder).__name__} has no list of layers, which sharding and activation checkpointing need"
        )
    longest: list[nn.Module] = max(fitting, key=len)
    return {str(index): layer for index, layer in enumerate(longest)}


def _tied(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (other name, first name) of each parameter that has several names."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            yield name, first[id(parameter)]
        first.setdefault(id(parameter), name)


def _check_dtype(causal_lm: Any, dtype: torch.dtype) -> None:
    kept = [
        *(getattr(causal_lm, "_keep_in_fp32_modules", None) or ()),
        *(getattr(causal_lm, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    if kept and dtype != torch.float32:
        raise ModelError(
            f"a {causal_lm.config.model_type} keeps {', '.join(map(str, kept))} in float32, which shoal does not support; "
            "set train.dtype to float32"
        )
    if scalars := [name for name, p in causal_lm.named_parameters() if p.ndim == 0]:
        raise ModelError(f"{scalars[0]} is a parameter without dimensions, which cannot be sharded")
