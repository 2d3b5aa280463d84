"""Transformers' models with shoal's shapes and weights, as an independent implementation."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from torch import Tensor

from shoal.config.options import Model
from shoal.models.build import build_model, initialize
from shoal.models.family import LanguageModel

LLAMA_NAMES = [
    (r"^embed\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^head\.", "lm_head."),
    (r"^blocks\.(\d+)\.", r"model.layers.\1."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.attention\.([qk])_norm\.", r".self_attn.\1_norm."),
    (r"\.ffn\.(gate|up|down)\.", r".mlp.\1_proj."),
]
GPT2_NAMES = [
    (r"^embed\.", "transformer.wte."),
    (r"^position\.", "transformer.wpe."),
    (r"^norm\.", "transformer.ln_f."),
    (r"^head\.", "lm_head."),
    (r"^blocks\.(\d+)\.", r"transformer.h.\1."),
    (r"\.attention_norm\.", ".ln_1."),
    (r"\.ffn_norm\.", ".ln_2."),
    (r"\.attention\.o\.", ".attn.c_proj."),
    (r"\.ffn\.up\.", ".mlp.c_fc."),
    (r"\.ffn\.down\.", ".mlp.c_proj."),
]


def random_pair(model: Model, seed: int = 0) -> tuple[LanguageModel, Any]:
    """Return (shoal's, transformers') model in float32 with the same random weights, biases and norms."""
    ours = build_model(model, compute_dtype=torch.float32)
    initialize(ours, seed, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    theirs = transformers.AutoModelForCausalLM.from_config(hf_config(ours.shape))
    missing, unexpected = theirs.load_state_dict(to_hf(ours.shape, dict(ours.named_parameters())), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return ours, theirs.eval()


def hf_config(shape: Model) -> transformers.PretrainedConfig:
    """Return transformers' config of a resolved shape."""
    if shape.family == "gpt2":
        return transformers.GPT2Config(
            vocab_size=shape.vocab_size or 0, n_embd=shape.dim, n_layer=shape.num_layers, n_head=shape.num_heads,
            bos_token_id=None, eos_token_id=None,
            n_inner=shape.ffn_dim, n_positions=shape.max_seq_len, layer_norm_epsilon=shape.norm_eps,
            resid_pdrop=shape.dropout, embd_pdrop=shape.dropout, attn_pdrop=shape.dropout,
            tie_word_embeddings=shape.tie_embeddings,
        )  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rope_theta}
    if shape.rope_factor is not None:
        rope |= {
            "rope_type": "llama3", "factor": shape.rope_factor, "low_freq_factor": shape.rope_low_freq_factor,
            "high_freq_factor": shape.rope_high_freq_factor,
            "original_max_position_embeddings": shape.rope_original_seq_len,
        }  # fmt: skip
    common: dict[str, Any] = {
        "vocab_size": shape.vocab_size, "hidden_size": shape.dim, "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn_dim, "max_position_embeddings": shape.max_seq_len, "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope, "tie_word_embeddings": shape.tie_embeddings,
    }  # fmt: skip
    if shape.qk_norm:
        return transformers.Qwen3Config(attention_bias=shape.qkv_bias, **common)
    if shape.qkv_bias:  # Qwen2's bias is on q, k and v only; Llama's attention_bias is on o too
        return transformers.Qwen2Config(**common)
    return transformers.LlamaConfig(attention_bias=False, **common)


def to_hf(shape: Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert names and layouts to transformers': its GPT-2 has q, k and v in one matrix, and matrices transposed."""
    if shape.family == "llama":
        return {_rename(name, LLAMA_NAMES): tensor.detach() for name, tensor in tensors.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".attention.q." in name:
            parts = [tensors[name.replace(".q.", f".{x}.")] for x in "qkv"]
            hf_name = _rename(name.replace(".attention.q.", ".attn.c_attn."), GPT2_NAMES)
            tensor = torch.cat(parts)
        elif ".attention.k." in name or ".attention.v." in name:
            continue
        else:
            hf_name = _rename(name, GPT2_NAMES)
        transposed = re.search(r"c_(attn|proj|fc)\.weight$", hf_name)
        out[hf_name] = (tensor.t() if transposed else tensor).detach()
    return out


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
