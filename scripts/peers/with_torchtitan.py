"""
torchtitan: its Llama 3 model, loss, optimizer container, schedule and clipping, in the order of its `Trainer.train_step`.

Its `Trainer` needs a GPU, and so do the two kinds of attention that it offers language models. Here its module for torch's
fused attention is used. On one process without FSDP, bfloat16 is torch's autocast.
"""

from __future__ import annotations

import contextlib

import torch
from scripts.peers.contract import Recorder, Spec, answer, batches, load, read_weights, steps
from torch import nn
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
from torchtitan.components.optimizer.optimizer import ParamGroupConfig
from torchtitan.distributed import utils as distributed
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.common.config_utils import make_ffn_config, make_gqa_config
from torchtitan.models.common.param_init import skip_param_init
from torchtitan.models.llama3.model import Llama3Model, Llama3TransformerBlock
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

LOADED = {"weight": skip_param_init}  # every weight is loaded


def llama3(spec: Spec) -> Llama3Model:
    """Return torchtitan's model with the spec's shape and weights."""
    rope = ComplexRoPE.Config(dim=spec.dim // spec.num_heads, max_seq_len=spec.seq_len, theta=spec.rope_theta)
    norm = RMSNorm.Config(normalized_shape=spec.dim, eps=spec.norm_eps, param_init=LOADED)
    block = Llama3TransformerBlock.Config(
        attention_norm=norm,
        ffn_norm=norm,
        attention=make_gqa_config(
            dim=spec.dim,
            n_heads=spec.num_heads,
            wqkv_param_init=LOADED,
            wo_param_init=LOADED,
            inner_attention=ScaledDotProductAttention.Config(),
            fuse_qkv=True,
            rope=rope,
        ),
        feed_forward=make_ffn_config(
            dim=spec.dim, hidden_dim=spec.ffn_dim, w1_param_init=LOADED, w2w3_param_init=LOADED
        ),
    )
    config = Llama3Model.Config(
        dim=spec.dim,
        vocab_size=spec.vocab_size,
        enable_weight_tying=spec.tie_embeddings,
        tok_embeddings=Embedding.Config(num_embeddings=spec.vocab_size, embedding_dim=spec.dim, param_init=LOADED),
        norm=norm,
        lm_head=Linear.Config(in_features=spec.dim, out_features=spec.vocab_size, param_init=LOADED),
        layers=[block] * spec.num_layers,
    )
    model: Llama3Model = config.build()
    load(model, Llama3StateDictAdapter(config, None).from_hf(read_weights(spec.weights)))
    return model


def optimizers_of(model: nn.Module, spec: Spec) -> OptimizersContainer:
    """Return torchtitan's container with fused AdamW; norms do not decay."""
    options = {"lr": spec.lr, "betas": (spec.beta1, spec.beta2), "eps": spec.eps}
    groups = [
        ParamGroupConfig(
            pattern=pattern, optimizer_name="AdamW", optimizer_kwargs={**options, "weight_decay": weight_decay}
        )
        for pattern, weight_decay in (("norm", 0.0), (".*", spec.weight_decay))
    ]
    return OptimizersContainer.Config(param_groups=groups, implementation="fused").build(model_parts=[model])


def train(spec: Spec, recorder: Recorder) -> nn.Module:
    """Take the steps; return the model."""
    model: nn.Module = llama3(spec)
    optimizers = optimizers_of(model, spec)
    schedule = LRSchedulersContainer.Config(warmup_steps=0, decay_ratio=0.0).build(
        optimizers=optimizers, training_steps=spec.steps
    )
    loss_of = CrossEntropyLoss.Config(global_vocab_size=spec.vocab_size).build(compile_config=None)
    mixed = torch.autocast("cpu", torch.bfloat16) if spec.dtype == "bfloat16" else contextlib.nullcontext()
    for batch in steps(spec, recorder, batches(spec)):
        optimizers.zero_grad()
        labels = batch["labels"]
        with mixed:
            loss, _ = loss_of(model(batch["input_ids"]), labels, torch.tensor(labels.numel()))
        loss.backward()
        distributed.clip_grad_norm_(list(model.parameters()), spec.clip_norm, foreach=True)
        optimizers.step()
        schedule.step()
        recorder.step(loss.detach())
    return model


if __name__ == "__main__":
    answer(train, ["torchtitan"])
