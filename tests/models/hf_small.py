"""Small models of families that only transformers implements, as it saves them; biases and norms are random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from shoal.config.options import Config
from shoal.resolve.resolve import resolve

VOCAB, SHORT = 272, 24
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 88,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2}

# The comments say what each family tests.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # soft caps on scores and logits, windows on every other layer, scaled embeddings that are the head, 1 + weight norms
    "gemma2": ("gemma2", {
        **GROUPED, "num_hidden_layers": 3, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16,
        "final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0,
    }),
    "gpt_neox": ("gpt_neox", {**COMMON, "rotary_pct": 0.5}),  # one layer for queries, keys and values; other tensor names in files
    "phi": ("phi", {**COMMON, "partial_rotary_factor": 0.5}),  # a bias in the head, attention beside the feed-forward
    "olmo2": ("olmo2", GROUPED),  # norms over all query heads: its plan gathers outputs
    "stablelm": ("stablelm", {**GROUPED, "partial_rotary_factor": 0.5}),  # has no tensor-parallel plan
    "cohere": ("cohere", {**GROUPED, "logit_scale": 0.25}),  # scaled logits
    "qwen3": ("qwen3", {**GROUPED, "head_dim": 16, "tie_word_embeddings": True}),  # norms of each head
    "llama": ("llama", GROUPED),
    "gpt2": ("gpt2", {
        "vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None,
    }),  # its matrices are not Linear layers
    "opt": ("opt", {
        "vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
        "max_position_embeddings": 64, "dropout": 0.0, "word_embed_proj_dim": 48, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 0,
    }),  # builds its mask without positions
    "openai-gpt": ("openai-gpt", {
        "vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }),  # supports neither a KV cache nor bfloat16
    "phi3": ("phi3", {
        **GROUPED, "original_max_position_embeddings": SHORT, "rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0],
        },
    }),  # rotates keys differently in texts longer than SHORT
    "bert": ("bert", COMMON),  # not causal
}  # fmt: skip
FAMILIES = ("gemma2", "gpt_neox", "phi", "olmo2", "stablelm", "cohere", "qwen3", "llama", "gpt2")


def save(name: str, folder: Path, **changes: Any) -> Path:
    """Save a folder of random weights of this family, with `changes` to its config."""
    kind, options = CONFIGS[name]
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**options, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Open a folder with transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def config_of(folder: Path, work: Path, name: str, **options: Any) -> Config:
    """Return a config for the folder. options: further options, such as parallel__tp=2 for `parallel.tp`."""
    values = {
        "model.from": folder, "model.family": "hf", "data.tokenizer": "bytes", "data.corpus": "dummy",
        "data.dummy_documents": 120, "data.seq_len": 32, "data.folder": work / "data", "data.document_mask": "true",
        "train.steps": 4, "train.global_batch": 8, "train.micro_batch": 2, "train.dtype": "float32",
        "optim.clip_norm": 0.0, "optim.schedule": "constant", "metrics.peak_tflops": 1, "launch.runs": work / "runs",
        "launch.name": name,
    }  # fmt: skip
    config = resolve(None, [(key, str(value), "here") for key, value in values.items()]).config
    for key, value in options.items():
        section, _, option = key.partition("__")
        config = config.replace(section, **{option: value})
    return config
