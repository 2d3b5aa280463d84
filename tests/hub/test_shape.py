"""Supported values of a `config.json`, and those rejected by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shoal.errors import ConfigError, ModelError
from shoal.hub.shape import MODEL_TYPES, read_shape, write_shape
from shoal.infer.load import load_folder
from shoal.models.build import build_model
from shoal.resolve.resolve import resolve
from shoal.training.assemble import folder_weights
from tests.hub import small


def said(kind: str, **changes: Any) -> dict[str, Any]:
    return small.config(kind).to_dict() | changes


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope scaling of type yarn"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of type dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "llama3 without low_freq_factor"),
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("gpt2", {"activation_function": "relu"}, "activation_function relu"),
        ("gpt2", {"attn_pdrop": 0.1}, "one model.dropout"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling of type yarn"),
        ("qwen2", {"is_causal": False}, "is_causal False"),
        ("gpt2", {"num_attention_heads": 2}, "num_attention_heads 2 beside n_head 4"),
        ("llama", {"hidden_size": None}, "lacks hidden_size"),
        ("llama", {"model_type": "mamba"}, "shoal implements llama, mistral, qwen2, qwen3, gpt2"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_refused_by_name(kind: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match="the config") as error:
        read_shape(said(kind, **changes), "the config")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": {**small.LLAMA3, "factor": 2.0}},  # beside rope_parameters
        {"original_max_position_embeddings": 32},  # beside the value inside rope_parameters
    ],
    ids=str,
)
def test_of_two_that_say_it_the_one_counts_that_transformers_takes(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = small.save("llama", tmp_path / "llama")
    (folder / "config.json").write_text(json.dumps(said("llama", **changes)))
    model = load_folder(str(folder), device="cpu", dtype="float32").model
    tokens = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = small.load(folder)(tokens).logits
        torch.testing.assert_close(model.logits(model(tokens)), expected, atol=1e-4, rtol=0)


def test_all_reasons_at_once() -> None:
    with pytest.raises(ModelError) as error:
        read_shape(said("llama", attention_bias=True, mlp_bias=True), "the config")
    assert "attention_bias" in str(error.value)
    assert "mlp_bias" in str(error.value)


def test_a_key_that_nobody_knows_is_told_of() -> None:
    assert "speed_of_light" in read_shape(said("llama", speed_of_light=3), "the config").notes[0]
    assert read_shape(said("llama"), "the config").notes == ()


@pytest.mark.parametrize("kind", small.TYPES)
def test_older_and_newer_spellings_say_the_same(kind: str) -> None:
    """Compare spellings: `write_shape` writes the one of transformers 4, and the folder has the one of transformers 5."""
    from shoal.config.options import Model

    values = read_shape(said(kind), "new").values
    assert read_shape(write_shape(Model(**values)) | {"model_type": kind}, "old").values == values


def test_keys_left_out_have_the_default_of_their_type() -> None:
    """Check defaults: Mistral has a window of 4096 tokens and Qwen3 heads 128 wide."""
    bare = {k: said("mistral")[k] for k in MODEL_TYPES["mistral"].keys if k not in ("head_dim", "num_key_value_heads")}
    shape = read_shape({**bare, "model_type": "mistral", "max_position_embeddings": 32_768}, "x")
    assert (shape.window, shape.values["num_kv_heads"]) == (4096, 8)
    assert read_shape({**bare, "model_type": "qwen3", "num_key_value_heads": 2}, "x").values["head_dim"] == 128


@pytest.mark.parametrize(
    ("kind", "changes", "window"),
    [
        ("mistral", {"sliding_window": 64}, 64),
        ("mistral", {"sliding_window": 4096}, 4096),  # wider than the context, which may be raised
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, None),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3}, 64),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "layer_types": None}, 64),
        ("gpt2", {"sliding_window": 64}, None),  # gpt2 has no windows
    ],
)
def test_a_sliding_window_is_one_only_where_it_is_on(kind: str, changes: dict[str, Any], window: int | None) -> None:
    assert read_shape(said(kind, **changes), "x").window == window


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save("llama", tmp_path_factory.mktemp("models") / "llama")


def resolved(folder: Path, **options: str) -> Any:
    overrides = [
        ("model.from", str(folder), "--model.from"),
        ("train.steps", "1", ""),
        ("data.seq_len", "32", ""),
        ("data.tokenizer", "bytes", ""),
    ]
    given = [(k.replace("__", "."), v, f"--{k.replace('__', '.')}") for k, v in options.items()]
    return resolve(None, [*overrides, *given]).config


def test_a_window_is_honoured_by_staying_inside(tmp_path: Path, llama: Path) -> None:
    folder = small.save("mistral", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 64}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"set model\.max_seq_len to 64 or less"):
        resolved(folder)
    assert resolved(folder, model__max_seq_len="64").model.max_seq_len == 64
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 256}))
    assert resolved(folder).model.max_seq_len == 128
    with pytest.raises(ConfigError, match=r"set model\.max_seq_len to 256 or less"):
        resolved(folder, model__max_seq_len="512")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_window_that_is_on_and_left_out_has_the_default_of_transformers(kind: str) -> None:
    config = said(kind, use_sliding_window=True)
    del config["sliding_window"], config["layer_types"]
    assert read_shape(config, "x").window == 4096
    assert transformers.AutoConfig.for_model(kind, use_sliding_window=True).sliding_window == 4096


def test_nothing_else_may_say_the_shape(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.dim 256 differs from .*, which has 48; remove it"):
        resolved(llama, model__dim="256")
    with pytest.raises(ConfigError, match="both define the shape"):
        resolved(llama, model__preset="gpt2")
    assert resolved(llama, model__dim="48", model__init_std="0.3").model.init_std == 0.3


def test_of_a_recipes_preset_and_a_flags_folder_the_flag_counts(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {preset: tiny, dim: 64, qk_norm: true}\ntrain: {steps: 1}\ndata: {seq_len: 32, tokenizer: bytes}\n"
    )
    found = resolve(recipe, [("model.from", str(llama), "--model.from")])
    started = found.config
    recipe.write_text(f"model: {{from: {llama}}}\ntrain: {{steps: 1}}\ndata: {{seq_len: 32}}\n")
    assert (started.model, started.data) == (resolve(recipe).config.model, resolve(recipe).config.data)
    assert all(key in found.notes[0] for key in ("--model.from", "model.preset", "model.dim", "data.tokenizer"))
    recipe.write_text(f"model: {{from: {llama}}}\ntrain: {{steps: 1}}\ndata: {{seq_len: 32}}\n")
    assert resolve(recipe, [("model.preset", "tiny", "--model.preset")]).config.model.from_ is None


def damaged(folder: Path, target: Path, change: Any) -> Path:
    """Write a copy of `folder` to `target`, with changed tensors in one file; return `target`."""
    tensors = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    change(tensors)
    target.mkdir()
    (target / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "has no weight model.norm.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(47)}),
            r"has shape \[47\], but config.json implies \[48\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}), "is I8; readable dtypes are"),
        (lambda t: t.update({"model.adapter.weight": torch.zeros(4)}), "does not use: model.adapter.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}), ""),
    ],
    ids=["missing", "shape", "dtype", "name", "computed"],
)
def test_weights_that_are_not_the_config_s(llama: Path, tmp_path: Path, change: Any, words: str) -> None:
    folder = damaged(llama, tmp_path / "damaged", change)
    model = build_model(resolved(llama).model, compute_dtype=torch.float32)
    if not words:
        folder_weights(model, str(folder))
        return
    with pytest.raises(ModelError, match=words):
        folder_weights(model, str(folder))


def test_a_tied_head_is_the_embedding_or_refused(tmp_path: Path) -> None:
    """Accept a tied Qwen2 whose files repeat the embedding as head; reject a head that differs from the embedding."""
    folder = small.save("qwen2", tmp_path / "tied")
    model = build_model(resolved(folder).model, compute_dtype=torch.float32)
    embed = "model.embed_tokens.weight"
    same = damaged(folder, tmp_path / "same", lambda t: t.update({"lm_head.weight": t[embed].clone()}))
    folder_weights(model, str(same))
    other = damaged(folder, tmp_path / "other", lambda t: t.update({"lm_head.weight": t[embed] + 1}))
    with pytest.raises(ModelError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        folder_weights(model, str(other))


def test_names_without_the_base_model_s_prefix(tmp_path: Path) -> None:
    """Load names as in the hub's GPT-2: `wte.weight`, with mask buffers among the weights."""
    folder = small.save("gpt2", tmp_path / "a")

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)

    short = damaged(folder, tmp_path / "b", shorten)
    model = build_model(resolved(folder).model, compute_dtype=torch.float32)
    fills = [folder_weights(model, str(f)) for f in (folder, short)]
    for name, parameter in model.named_parameters():
        found = [torch.empty(parameter.shape) for _ in fills]
        for fill, out in zip(fills, found, strict=True):
            fill(out, name, tuple(parameter.shape), tuple(slice(0, n) for n in parameter.shape))
        assert torch.equal(*found)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "blocks.1.ffn.down.weight"),
        ("gpt2", "blocks.2.attention.k.weight"),
        ("gpt2", "blocks.0.ffn.up.weight"),
    ],
)
def test_a_region_is_the_slice_of_the_whole(tmp_path: Path, kind: str, name: str) -> None:
    """Read regions of plain, fused and transposed matrices."""
    folder = small.save(kind, tmp_path / kind)
    model = build_model(resolved(folder).model, compute_dtype=torch.float32)
    fill, shape = folder_weights(model, str(folder)), tuple(model.get_parameter(name).shape)
    whole, part = torch.empty(shape), torch.empty(7, 20)
    fill(whole, name, shape, (slice(0, shape[0]), slice(0, shape[1])))
    fill(part, name, shape, (slice(5, 12), slice(10, 30)))
    assert torch.equal(part, whole[5:12, 10:30])
