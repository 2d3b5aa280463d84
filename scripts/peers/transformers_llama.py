"""transformers' Llama with the spec's shape and weights, for the peers that have no model of their own."""

from __future__ import annotations

from scripts.peers.contract import Spec, load, read_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def llama(spec: Spec) -> nn.Module:
    """Return the model, in training mode."""
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.dim,
        intermediate_size=spec.ffn_dim,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        max_position_embeddings=spec.seq_len,
        rms_norm_eps=spec.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=spec.tie_embeddings,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    load(model, read_weights(spec.weights))
    return model.train()


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the mean loss per token. `shift_labels` are used unchanged: each row's last token is predicted too."""
    loss: Tensor = model(input_ids=batch["input_ids"], labels=batch["labels"], shift_labels=batch["labels"]).loss
    return loss
