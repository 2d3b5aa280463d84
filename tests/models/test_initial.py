"""Initial weights are a function of (seed, name, row) only."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from shoal.config.options import Model
from shoal.models.build import build_model, draw_rows, initialize
from shoal.models.family import Initial

from .shapes import GPT2, LLAMA

NORMAL = Initial("normal", 0.02)


def weights(model: Model, seed: int = 0) -> dict[str, Tensor]:
    built = build_model(model, compute_dtype=torch.float32)
    initialize(built, seed, "cpu")
    return {name: p.detach() for name, p in built.named_parameters()}


def test_rows_alone_equal_rows_of_the_whole() -> None:
    whole = draw_rows(NORMAL, 3, "blocks.0.attention.q.weight", (40, 33), 0, 40)
    for start, stop in [(0, 1), (7, 8), (39, 40), (5, 21), (13, 40)]:
        part = draw_rows(NORMAL, 3, "blocks.0.attention.q.weight", (40, 33), start, stop)
        assert torch.equal(part, whole[start:stop])


def test_every_row_name_and_seed_draws_its_own() -> None:
    drawn = [
        draw_rows(NORMAL, seed, name, (50, 16), 0, 50) for seed in (0, 1, 2) for name in ("embed.weight", "head.weight")
    ]
    rows = {tuple(row.tolist()) for tensor in drawn for row in tensor}
    assert len(rows) == 3 * 2 * 50


def test_no_two_rows_are_correlated() -> None:
    drawn = draw_rows(NORMAL, 0, "embed.weight", (64, 4096), 0, 64)
    correlation = torch.corrcoef(drawn) - torch.eye(64)
    assert correlation.abs().max() < 6 / 4096**0.5  # six standard deviations


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=lambda m: m.family)
def test_std_is_as_the_table_says(model: Model) -> None:
    for name, weight in weights(dataclasses.replace(model, init_std=0.03)).items():
        if name.endswith("norm.weight"):
            assert torch.equal(weight, torch.ones_like(weight))
        elif name.endswith("bias"):
            assert not weight.any()
        else:
            # two layers: residual outputs start at 0.03 / sqrt(4)
            wanted = 0.015 if name.endswith(("attention.o.weight", "ffn.down.weight")) else 0.03
            assert abs(weight.std().item() / wanted - 1) < 6 / (2 * weight.numel()) ** 0.5
            assert abs(weight.mean().item()) < 6 * wanted / weight.numel() ** 0.5


def test_other_parameters_do_not_matter() -> None:
    small, large = weights(LLAMA), weights(dataclasses.replace(LLAMA, num_layers=3, qk_norm=True, tie_embeddings=True))
    same = [n for n in small.keys() & large.keys() if not n.endswith(("attention.o.weight", "ffn.down.weight"))]
    assert len(same) > 12
    for name in same:
        assert torch.equal(small[name], large[name]), name


def test_vocab_size_must_be_known() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        build_model(Model(), compute_dtype=torch.float32)
