"""Invalid values in a `config.json`: all are reported at once, by key, without a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.cli import _run
from shoal.config.options import Model
from shoal.errors import ConfigError, ModelError
from shoal.hub.any_shape import read_any_shape
from shoal.hub.shape import read_shape
from shoal.models.build import build_model
from shoal.resolve.resolve import Resolved, resolve
from tests.hub import small


def said(kind: str, **changes: Any) -> dict[str, Any]:
    return small.config(kind).to_dict() | changes


LLAMA3 = said("llama")["rope_parameters"]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ("llama", {"rope_theta": "abc"}, "rope_theta is 'abc'; it must be a number above 0"),
        ("llama", {"rope_theta": [1e4]}, "rope_theta is [10000.0]"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta is inf"),
        ("llama", {"rope_theta": 10**400}, "it must be a number above 0"),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": "x"}}, "rope_parameters: factor is 'x'"),
        ("llama", {"rope_parameters": LLAMA3 | {"rope_type": ["llama3"]}}, "rope_parameters: rope_type is ['llama3']"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "llama3 without low_freq_factor"),
        ("mistral", {"partial_rotary_factor": "half"}, "partial_rotary_factor is 'half'"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window is '4096'; it must be an integer of at least 0"),
        ("mistral", {"max_position_embeddings": "64", "sliding_window": 32}, "max_position_embeddings is '64'"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'; it must be true or false"),
        ("qwen2", {"layer_types": 5}, "layer_types is 5; it must be a list of texts"),
        ("gpt2", {"resid_pdrop": [0.1]}, "resid_pdrop is [0.1]; it must be a number of at least 0 and below 1"),
        ("gpt2", {"attn_pdrop": {}}, "attn_pdrop is {}"),
        ("gpt2", {"embd_pdrop": None}, "that differ"),
        ("llama", {"hidden_size": "16"}, "hidden_size is '16'; it must be an integer of at least 1"),
        ("llama", {"hidden_size": True}, "hidden_size is True"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ("llama", {"vocab_size": "64"}, "vocab_size is '64'"),
        ("llama", {"model_type": ["llama"]}, "has no model_type"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_value_of_no_meaning_is_named(kind: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match="the config") as error:
        read_shape(said(kind, **changes), "the config")
    assert words in str(error.value)


def test_all_of_them_at_once() -> None:
    with pytest.raises(ModelError) as error:
        read_shape(said("llama", hidden_size=None, vocab_size="64", rope_theta="abc"), "the config")
    assert all(key in str(error.value) for key in ("hidden_size", "vocab_size", "rope_theta"))


@pytest.mark.parametrize(
    "changes", [{"model_type": ["llama"]}, {"num_attention_heads": 0}, {"tie_word_embeddings": "no"}], ids=str
)
def test_a_model_of_any_type_is_looked_at_too(changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=f"{next(iter(changes))} is "):
        read_any_shape(said("llama", **changes), "the config")


def test_no_longest_context_is_no_mistake_there() -> None:
    shape = read_any_shape(said("llama", max_position_embeddings=0), "the config")
    assert shape["max_seq_len"] > 100_000


# --- a folder in a run ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small.save("llama", tmp_path / "llama")


def change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def resolved(folder: Path, *options: tuple[str, str]) -> Resolved:
    given = [("model.from", str(folder)), ("train.steps", "1"), ("data.seq_len", "32"), *options]
    return resolve(None, [(key, value, f"--{key}") for key, value in given])


@pytest.mark.parametrize(
    "changes",
    [{"rms_norm_eps": "x"}, {"num_attention_heads": 5}, {"hidden_act": "nonsense"}, {"rope_parameters": 5}],
    ids=str,
)
def test_what_transformers_finds_wrong_is_said_with_its_cause(folder: Path, changes: dict[str, Any]) -> None:
    change(folder, **changes)
    key = next(iter(changes))
    model = Model(family="hf", from_=str(folder), vocab_size=small.VOCAB)
    with pytest.raises(
        ModelError, match=rf"transformers cannot make a model of {folder}/config.json \(\w+Error: "
    ) as error:
        build_model(model, compute_dtype=torch.float32)
    assert key in str(error.value) or str(changes[key]) in str(error.value)


def test_a_folder_without_a_tokenizer_needs_one_by_name(folder: Path) -> None:
    """Reject a folder with only vocab.json and merges.txt, or tekken.json, instead of silently training a tokenizer."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"--model.from: .* has neither tokenizer.json nor tokenizer.model; set data.tok"
    ):
        resolved(folder)
    for name in ("bpe", "bytes"):
        vocab = ("data.tokenizer_vocab_size", "257")
        assert resolved(folder, ("data.tokenizer", name), vocab).config.data.tokenizer == name


def test_a_key_that_nobody_knows_is_told_of_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolved(folder).notes == ()
    change(folder, logits_scaling=8.0)
    assert "logits_scaling" in resolved(folder).notes[0]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {{from: {folder}}}\ndata: {{seq_len: 32, corpus: dummy}}\ntrain: {{steps: 1}}\n")
    monkeypatch.chdir(tmp_path)
    assert _run(["config", str(recipe)]) == 0
    out, err = capsys.readouterr()
    assert ("logits_scaling" in out, err.count("logits_scaling")) == (False, 1)
    assert _run(["prepare", str(recipe)]) == 0
    out, err = capsys.readouterr()
    assert (out.count("logits_scaling"), "logits_scaling" in err) == (1, False)
