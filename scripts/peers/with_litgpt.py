"""
litgpt: its GPT and its cross entropy in Fabric's loop, as `litgpt pretrain` trains.

Two differences: no `torch.compile`, as in all contenders; and fused AdamW, which litgpt uses on CUDA only.
"""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer
from scripts.peers.contract import Recorder, Spec, answer, batches, decay_groups, load, read_weights, steps
from torch import Tensor, nn


def named_here(theirs: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return the weights under litgpt's names; one matrix projects queries, keys and values."""
    parts = {
        "norm_1": "input_layernorm", "norm_2": "post_attention_layernorm", "attn.proj": "self_attn.o_proj",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    }  # fmt: skip
    found = {
        "transformer.wte.weight": theirs["model.embed_tokens.weight"],
        "transformer.ln_f.weight": theirs["model.norm.weight"],
        "lm_head.weight": theirs.get("lm_head.weight", theirs["model.embed_tokens.weight"]),
    }
    for layer in range(num_layers):
        ours, prefix = f"transformer.h.{layer}.", f"model.layers.{layer}."
        found |= {f"{ours}{name}.weight": theirs[f"{prefix}{part}.weight"] for name, part in parts.items()}
        found[f"{ours}attn.qkv.weight"] = torch.cat([theirs[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv"])
    return found


def gpt(spec: Spec) -> GPT:
    """Return litgpt's model, a Llama of the spec's shape and weights."""
    config = Config(
        block_size=spec.seq_len,
        vocab_size=spec.vocab_size,
        padded_vocab_size=spec.vocab_size,
        n_layer=spec.num_layers,
        n_head=spec.num_heads,
        n_embd=spec.dim,
        intermediate_size=spec.ffn_dim,
        rotary_percentage=1.0,
        rope_base=int(spec.rope_theta),
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=spec.norm_eps,
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    if spec.tie_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    load(model, named_here(read_weights(spec.weights), spec.num_layers))
    return model


def train(spec: Spec, recorder: Recorder) -> nn.Module:
    """Take the steps; return the model."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if spec.dtype == "bfloat16" else "32-true")
    fabric.launch()
    module: nn.Module = gpt(spec)
    model = fabric.setup(module)
    options = {"lr": spec.lr, "betas": (spec.beta1, spec.beta2), "eps": spec.eps, "fused": True}
    optimizer = instantiate_torch_optimizer("AdamW", decay_groups(module, spec.weight_decay), **options)
    optimizer = fabric.setup_optimizers(optimizer)
    loader = fabric.setup_dataloaders(batches(spec))
    for batch in steps(spec, recorder, loader):
        with fabric.no_backward_sync(model, enabled=False):
            loss = chunked_cross_entropy(model(batch["input_ids"]), batch["labels"])
            fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=spec.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        recorder.step(loss.detach())
    return module


if __name__ == "__main__":
    answer(train, ["litgpt", "lightning"])
