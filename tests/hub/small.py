"""Small models of the five native types, made and saved by transformers, with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from shoal.data.tokens.tokenize import byte_tokenizer

VOCAB = 272  # a few rows more than the tokenizer has
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 256,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
TYPES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


def config(kind: str) -> transformers.PretrainedConfig:
    """Return a config with its type's peculiarity: fused QKV, Llama 3 frequencies, biases, wide heads or a tied head."""
    match kind:
        case "gpt2":
            return transformers.GPT2Config(
                vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0, bos_token_id=256, eos_token_id=256,
            )  # fmt: skip
        case "llama":
            return transformers.LlamaConfig(rope_parameters=LLAMA3, **_COMMON)
        case "mistral":
            return transformers.MistralConfig(sliding_window=None, **_COMMON)
        case "qwen2":
            return transformers.Qwen2Config(tie_word_embeddings=True, **_COMMON)
        case "qwen3":
            return transformers.Qwen3Config(head_dim=24, rms_norm_eps=1e-5, **_COMMON)
    raise AssertionError(kind)


def save(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "60KB") -> Path:
    """Save a folder of random weights, with random biases and norms, so that a skipped tensor is noticed."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(kind)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_json(), encoding="utf-8")
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return a folder's model, loaded by transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
