"""Counts against real parameters, published figures and PyTorch's FLOP counter."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shoal.config.options import Model
from shoal.config.presets import PRESETS, resolve_shape
from shoal.models.build import build_model, initialize
from shoal.models.loss import linear_cross_entropy_sum
from shoal.plan.estimate import flops_per_token, matmul_parameter_count, parameter_count

from ..models.hf_weights import hf_config
from ..models.shapes import SHAPES

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


def preset(name: str) -> Model:
    return Model(**({"vocab_size": 4096} | PRESETS[name]))


def test_every_preset_with_a_vocabulary_has_a_published_count() -> None:
    assert {name for name, values in PRESETS.items() if "vocab_size" in values} == PUBLISHED.keys()


@pytest.mark.parametrize("name", [*PRESETS, *SHAPES])
def test_parameter_count(name: str) -> None:
    model = preset(name) if name in PRESETS else SHAPES[name]
    counted = sum(p.numel() for p in build_model(model, compute_dtype=torch.float32).parameters())
    assert parameter_count(model) == counted == PUBLISHED.get(name, counted)


@pytest.mark.parametrize("name", [*PRESETS, *SHAPES])
def test_transformers_has_as_many_parameters(name: str) -> None:
    model = preset(name) if name in PRESETS else SHAPES[name]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(hf_config(resolve_shape(model)))
    assert parameter_count(model) == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_flops_equal_the_flop_counter(name: str) -> None:
    model = build_model(SHAPES[name], compute_dtype=torch.float32)
    initialize(model, 0, "cpu")
    tokens = torch.zeros((2, 24), dtype=torch.long)
    # The math kernel consists of products that the counter knows. It computes all pairs of positions: the "full" convention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        linear_cross_entropy_sum(model(tokens), model.head_weight(), tokens).backward()
    assert flops_per_token(SHAPES[name], 24, "full") * 2 * 24 == counter.get_total_flops()


def test_causal_attention_is_half() -> None:
    shape = SHAPES["qwen3"]
    products = 6 * matmul_parameter_count(shape)
    assert 2 * (flops_per_token(shape, 24) - products) == flops_per_token(shape, 24, "full") - products


def test_a_tied_head_costs_as_much_as_its_own() -> None:
    tied = SHAPES["smollm2"]
    untied = dataclasses.replace(tied, tie_embeddings=False)
    assert flops_per_token(tied, 24) == flops_per_token(untied, 24)


def test_vocab_size_must_be_known() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        parameter_count(Model())


def test_plan_does_not_import_torch() -> None:
    code = (
        "import sys, shoal.plan.estimate, shoal.plan.hardware, shoal.config.presets; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
