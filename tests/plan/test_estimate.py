"""The formulas against built models, published counts and transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from shoal.config import Model
from shoal.models.build import build_model
from shoal.plan.estimate import flops_per_token, matmul_parameter_count, parameter_count
from shoal.presets import PRESETS, resolve_shape
from tests.models.hf_weights import hf_config
from tests.models.shapes import SHAPES

# What safetensors' headers on the hub add up to, a tied head counted once.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
}
ALL = SHAPES | {name: Model(**({"vocab_size": 4096} | values)) for name, values in PRESETS.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    assert parameter_count(ALL[name]) == PUBLISHED[name]


@pytest.mark.parametrize("name", ALL)
def test_built(name: str) -> None:
    model = build_model(ALL[name], compute_dtype=torch.float32)
    assert parameter_count(ALL[name]) == sum(p.numel() for p in model.parameters())
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith(("embed", "position"))
    )
    assert matmul_parameter_count(ALL[name]) == matrices + (model.head is None) * model.embed.weight.numel()


@pytest.mark.parametrize("name", ALL)
def test_transformers(name: str) -> None:
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(hf_config(resolve_shape(ALL[name])))
    assert parameter_count(ALL[name]) == sum(p.numel() for p in theirs.parameters())


def test_flops_by_hand() -> None:
    """A llama of dim 8, 2 heads of 4, ffn 16, vocabulary 10, one layer, 6 tokens, untied."""
    model = Model(vocab_size=10, dim=8, num_layers=1, num_heads=2, ffn_dim=16)
    matrices = 4 * 8 * 8 + 3 * 8 * 16 + 10 * 8
    assert flops_per_token(model, 6, "full") == 6 * matrices + 12 * 2 * 4 * 6
    assert flops_per_token(model, 6) == 6 * matrices + 6 * 2 * 4 * 6


def test_a_tied_head_costs_what_an_untied_one_does() -> None:
    untied = Model(vocab_size=100)
    tied = dataclasses.replace(untied, tie_embeddings=True)
    assert flops_per_token(tied, 64) == flops_per_token(untied, 64)
    assert parameter_count(untied) - parameter_count(tied) == 100 * untied.dim


def test_flops_against_torch_counter() -> None:
    """torch's own counter of the products in forward, for what is not attention."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = SHAPES["llama3"]
    model = build_model(shape, compute_dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.zeros(1, 32, dtype=torch.long, device="meta")))
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert products == 32 * 2 * matmul_parameter_count(shape)


def test_vocabulary_must_be_known() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        parameter_count(Model())
