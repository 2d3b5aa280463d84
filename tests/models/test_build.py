"""Models on meta, and weights that depend on seed, name and row alone."""

from __future__ import annotations

import fnmatch

import pytest
import torch

from shoal.config import Model
from shoal.models.build import build_model, draw_rows, global_name, global_parameters, initialize
from shoal.models.family import Initial, LanguageModel
from shoal.models.loss import linear_cross_entropy_sum

from .shapes import SHAPES


def built(model: Model, seed: int = 0) -> LanguageModel:
    ours = build_model(model, compute_dtype=torch.float32)
    initialize(ours, seed, "cpu")
    return ours


def test_build_is_on_meta() -> None:
    model = build_model(SHAPES["llama3"], compute_dtype=torch.bfloat16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not list(model.buffers())  # nothing that to_empty could leave uninitialised


def test_vocabulary_must_be_known() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        build_model(Model(), compute_dtype=torch.float32)


@pytest.mark.parametrize("name", ["llama3", "qwen2", "gpt2-untied"])
def test_every_row_is_drawn_alone(name: str) -> None:
    model = built(SHAPES[name], seed=7)
    for parameter_name, parameter in model.named_parameters():
        initial = model.initial(parameter_name, model.shape)
        for start, stop in ((0, 1), (3, 11), (len(parameter) - 2, len(parameter))):
            rows = draw_rows(initial, 7, parameter_name, parameter.shape, start, stop)
            assert torch.equal(rows, parameter.detach()[start:stop]), parameter_name


def test_seed_name_and_row_all_matter() -> None:
    normal = Initial("normal", 1.0)
    rows = draw_rows(normal, 0, "a", (1000, 8), 0, 1000)
    assert len(torch.unique(rows, dim=0)) == 1000
    assert not torch.equal(rows, draw_rows(normal, 1, "a", (1000, 8), 0, 1000))
    assert not torch.equal(rows, draw_rows(normal, 0, "b", (1000, 8), 0, 1000))


def test_initial_distributions() -> None:
    model = built(Model(vocab_size=512, dim=256, num_layers=2, init_std=0.03))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        std = 0.03 / 2 if name.endswith((".o.weight", ".down.weight")) else 0.03  # sqrt(2 layers * 2) = 2
        assert parameter.std().item() == pytest.approx(std, rel=0.02), name
        assert abs(parameter.mean().item()) < 0.02 * std, name


def test_initialize_ignores_what_memory_held() -> None:
    first, second = built(SHAPES["qwen3"]), built(SHAPES["qwen3"], seed=1)
    initialize(second, 0, "cpu")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_names_are_global() -> None:
    model = build_model(SHAPES["llama3"], compute_dtype=torch.float32)
    names = [name for name, _ in global_parameters(model)]
    assert global_name("module.blocks.0._checkpoint_wrapped_module._orig_mod.ffn.up.weight") == "blocks.0.ffn.up.weight"
    for block in model.blocks:
        block.compile()
    assert [name for name, _ in global_parameters(model)] == names


@pytest.mark.parametrize("name", SHAPES)
def test_tables_name_every_module_with_weights(name: str) -> None:
    model = build_model(SHAPES[name], compute_dtype=torch.float32)
    for parameter_name, _ in model.named_parameters():
        module = parameter_name.rpartition(".")[0]
        assert any(fnmatch.fnmatch(module, pattern) for pattern in model.TENSOR_PARALLEL), module
    assert all(isinstance(block, model.BLOCK) for block in model.blocks)


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_blocks_compile_without_graph_breaks(name: str) -> None:
    """Tracing only (`aot_eager`): no compiler is needed to find a break."""
    plain, compiled = built(SHAPES[name]), built(SHAPES[name])
    for block in compiled.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    tokens = torch.randint(0, 97, (2, 17))
    for model in (plain, compiled):
        hidden = model(tokens[:, :-1])
        linear_cross_entropy_sum(hidden, model.head_weight(), tokens[:, 1:]).backward()
    for (parameter, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=parameter)


def test_dropout_is_drawn_in_training_only() -> None:
    model = built(Model(family="gpt2", vocab_size=97, dim=32, num_layers=1, num_heads=2, max_seq_len=16, dropout=0.3))
    tokens = torch.randint(0, 97, (2, 16))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
