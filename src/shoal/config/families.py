"""
One table per model family: everything that shoal needs to know about it besides its code. Pure data, no torch.

A new family is one file in `models/` and one entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple

FamilyName = Literal["llama", "gpt2", "hf"]

Json = Mapping[str, Any]


class Stored(NamedTuple):
    """The location of our parameter in a Hugging Face checkpoint: a tensor, perhaps transposed, or one of its equal parts."""

    name: str
    transposed: bool = False
    part: int = 0  # index among the `parts` equal parts, concatenated along dim 0 before any transpose
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class ModelType:
    """The meaning of one `model_type` of a Hugging Face config.json."""

    architecture: str  # the class of transformers that its checkpoints name
    keys: Mapping[str, str]  # Hugging Face's key -> our option
    defaults: Json  # values of keys that a config may lack
    always: Json = field(default_factory=dict)  # our options that are fixed for all models of this type
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # key -> the values that shoal implements
    written: Json = field(default_factory=dict)  # further keys that an export gets, with their values
    copied: Mapping[str, str] = field(default_factory=dict)  # further keys that an export gets -> our option
    dropouts: tuple[str, ...] = ()  # keys that must agree: together they are our model.dropout
    twins: Mapping[str, str] = field(default_factory=dict)  # another name that transformers accepts -> the key
    window_switch: str | None = None  # the key that enables sliding windows; None: a given window is enabled


@dataclass(frozen=True, kw_only=True)
class Family:
    """The properties of a family that its options, its cost and its files depend on."""

    summary: str  # for help and error messages
    code: str  # its LanguageModel, as a dotted name below `shoal.models`
    native: bool = True  # False: transformers computes it, and the folder model.from defines its shape
    unused: tuple[str, ...] = ()  # options of `Model` that it lacks
    rotary: bool = True  # RoPE; False: learned position embeddings, a table of max_seq_len rows
    gated: bool = True  # the feed-forward has three matrices, gate, up and down; False: up and down
    biases: bool = False  # every linear layer and norm has a bias; False: only q, k and v, if `qkv_bias`
    free_heads: bool = True  # num_kv_heads and head_dim may be set; False: they are num_heads and dim / num_heads
    tensors: Mapping[str, Stored] = field(default_factory=dict)  # by our parameter's name, with `N` for a block's index
    types: Mapping[str, ModelType] = field(default_factory=dict)  # by model_type; an export prefers the first that fits


ROPE_SCALING: Final = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_seq_len")

_LLAMA_TENSORS: Final = {
    "embed.weight": Stored("model.embed_tokens.weight"),
    "norm.weight": Stored("model.norm.weight"),
    "head.weight": Stored("lm_head.weight"),
    "blocks.N.attention_norm.weight": Stored("model.layers.N.input_layernorm.weight"),
    "blocks.N.ffn_norm.weight": Stored("model.layers.N.post_attention_layernorm.weight"),
    **{f"blocks.N.attention.{x}.{y}": Stored(f"model.layers.N.self_attn.{x}_proj.{y}")
       for x in "qkvo" for y in ("weight", "bias")},
    **{f"blocks.N.attention.{x}_norm.weight": Stored(f"model.layers.N.self_attn.{x}_norm.weight") for x in "qk"},
    **{f"blocks.N.ffn.{x}.weight": Stored(f"model.layers.N.mlp.{x}_proj.weight") for x in ("gate", "up", "down")},
}  # fmt: skip
_LLAMA_KEYS: Final = {
    "vocab_size": "vocab_size", "hidden_size": "dim", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim",
    "intermediate_size": "ffn_dim", "max_position_embeddings": "max_seq_len", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std",
}  # fmt: skip
_LLAMA_DEFAULTS: Final = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "initializer_range": 0.02,
}  # fmt: skip
_LLAMA_ONLY: Final = {"hidden_act": ("silu", None), "attention_dropout": (0, None), "is_causal": (True,)}
_LLAMA_WRITTEN: Final = {"hidden_act": "silu", "attention_dropout": 0.0}
_NO_BIASES: Final = {"attention_bias": (False, None), "mlp_bias": (False, None)}
_LLAMA_TYPES: Final = {
    "llama": ModelType(
        architecture="LlamaForCausalLM", keys=_LLAMA_KEYS,
        defaults={"max_position_embeddings": 2048, **_LLAMA_DEFAULTS},
        only={**_LLAMA_ONLY, **_NO_BIASES}, written={**_LLAMA_WRITTEN, "attention_bias": False},
    ),
    "mistral": ModelType(
        architecture="MistralForCausalLM", keys=_LLAMA_KEYS,
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096,
                  **{k: v for k, v in _LLAMA_DEFAULTS.items() if k != "num_key_value_heads"}},
        only=_LLAMA_ONLY, written=_LLAMA_WRITTEN,
    ),
    "qwen2": ModelType(
        architecture="Qwen2ForCausalLM", keys=_LLAMA_KEYS,
        defaults={"max_position_embeddings": 32_768, "sliding_window": 4096, **_LLAMA_DEFAULTS},
        always={"qkv_bias": True}, only=_LLAMA_ONLY, written=_LLAMA_WRITTEN, window_switch="use_sliding_window",
    ),
    "qwen3": ModelType(
        architecture="Qwen3ForCausalLM", keys=_LLAMA_KEYS,
        defaults={"max_position_embeddings": 32_768, "sliding_window": 4096, **_LLAMA_DEFAULTS, "head_dim": 128},
        always={"qk_norm": True}, only={**_LLAMA_ONLY, **_NO_BIASES},
        written={**_LLAMA_WRITTEN, "attention_bias": False}, window_switch="use_sliding_window",
    ),
}  # fmt: skip

_GPT2_TENSORS: Final = {
    "embed.weight": Stored("transformer.wte.weight"),
    "position.weight": Stored("transformer.wpe.weight"),
    "head.weight": Stored("lm_head.weight"),
    **{f"{ours}.{x}": Stored(f"transformer.{theirs}.{x}")
       for ours, theirs in (("norm", "ln_f"), ("blocks.N.attention_norm", "h.N.ln_1"), ("blocks.N.ffn_norm", "h.N.ln_2"))
       for x in ("weight", "bias")},
    # GPT-2 stores matrices as [in, out], and concatenates those of query, key and value.
    **{f"blocks.N.attention.{x}.weight": Stored("transformer.h.N.attn.c_attn.weight", True, part, 3)
       for part, x in enumerate("qkv")},
    **{f"blocks.N.attention.{x}.bias": Stored("transformer.h.N.attn.c_attn.bias", False, part, 3)
       for part, x in enumerate("qkv")},
    **{f"blocks.N.{ours}.{x}": Stored(f"transformer.h.N.{theirs}.{x}", x == "weight")
       for ours, theirs in (("attention.o", "attn.c_proj"), ("ffn.up", "mlp.c_fc"), ("ffn.down", "mlp.c_proj"))
       for x in ("weight", "bias")},
}  # fmt: skip
_GPT2_TYPES: Final = {
    "gpt2": ModelType(
        architecture="GPT2LMHeadModel",
        keys={
            "vocab_size": "vocab_size", "n_embd": "dim", "n_layer": "num_layers", "n_head": "num_heads",
            "n_inner": "ffn_dim", "n_positions": "max_seq_len", "layer_norm_epsilon": "norm_eps",
            "tie_word_embeddings": "tie_embeddings", "initializer_range": "init_std", "resid_pdrop": "dropout",
        },
        defaults={
            "n_inner": None, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "initializer_range": 0.02,
            "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
        },
        only={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", None), "scale_attn_weights": (True, None),
            "scale_attn_by_inverse_layer_idx": (False, None), "add_cross_attention": (False, None), "is_causal": (True,),
        },
        written={"activation_function": "gelu_new"},
        copied={"embd_pdrop": "dropout", "attn_pdrop": "dropout", "n_ctx": "max_seq_len"},  # llama.cpp reads n_ctx
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        twins={
            "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        },
    ),
}  # fmt: skip

FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(
        summary="RMSNorm, RoPE, SwiGLU", code="llama.Llama", unused=("dropout",),
        tensors=_LLAMA_TENSORS, types=_LLAMA_TYPES,
    ),
    "gpt2": Family(
        summary="LayerNorm, learned positions, GELU", code="gpt2.GPT2",
        unused=("rope_theta", "rope_factor", *ROPE_SCALING, "qk_norm"),
        rotary=False, gated=False, biases=True, free_heads=False, tensors=_GPT2_TENSORS, types=_GPT2_TYPES,
    ),
    "hf": Family(summary="the model in model.from, through transformers", code="hf.HuggingFaceModel", native=False),
}  # fmt: skip
