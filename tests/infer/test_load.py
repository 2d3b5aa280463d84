"""Loading a folder or a run, in the requested dtype, with all tokens that end a text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from shoal.data.tokens.tokenize import load_tokenizer
from shoal.errors import DataError, ModelError, ShoalError
from shoal.hub import folder as folder_module
from shoal.hub.header import Entry, read_header
from shoal.infer.asked import Wanted
from shoal.infer.load import load_folder
from shoal.models.attention import CPU_HAS_TILES
from shoal.models.generate import generate

from ..hub.small import TYPES, load, save
from .folders import talker

PROMPTS = [[5, 17, 80, 3], [44], [9, 8, 7, 6, 5, 4, 3, 2, 1], [60, 61]]
NEW = 24


@pytest.mark.parametrize("kind", TYPES)
def test_greedy_is_that_of_transformers_for_prompts_of_several_lengths(kind: str, tmp_path: Path) -> None:
    theirs = load(save(kind, tmp_path))
    theirs.generation_config.eos_token_id = None
    longest = max(map(len, PROMPTS))
    expected = theirs.generate(
        torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS]),
        attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS]),
        max_new_tokens=NEW, do_sample=False, pad_token_id=0,
    )[:, longest:].tolist()  # fmt: skip
    ours = load_folder(str(tmp_path), device="cpu", dtype="float32").model
    assert generate(ours, PROMPTS, max_new_tokens=NEW) == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert generate(ours, [prompt], max_new_tokens=NEW) == [tokens]


def test_through_transformers_it_is_the_same_model(tmp_path: Path) -> None:
    save("qwen2", tmp_path)
    ours = load_folder(str(tmp_path), device="cpu", dtype="float32").model
    theirs = load_folder(str(tmp_path), family="hf", device="cpu", dtype="float32").model
    assert type(ours) is not type(theirs)
    assert generate(ours, PROMPTS, max_new_tokens=NEW) == generate(theirs, PROMPTS, max_new_tokens=NEW)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_in_bfloat16_logits_are_those_of_transformers_as_far_as_bfloat16_goes(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path, dtype=torch.bfloat16)
    ours = load_folder(str(tmp_path), device="cpu", dtype="bfloat16").model
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    tokens = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        exact = load(tmp_path)(tokens).logits
        error, theirs = (
            (logits.float() - exact).abs().max().item()
            for logits in (ours.logits(ours(tokens)), load(tmp_path, torch.bfloat16)(tokens).logits)
        )
    assert error <= 1.5 * theirs


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_folders_own_dtype_where_the_device_is_good_at_it(stored: torch.dtype, tmp_path: Path) -> None:
    save("llama", tmp_path, dtype=stored)
    good = stored == torch.float32 or (stored == torch.bfloat16 and CPU_HAS_TILES)
    assert load_folder(str(tmp_path), device="cpu").model.compute_dtype == (stored if good else torch.float32)


def test_what_ends_a_text_is_said_by_tokenizer_and_files(tmp_path: Path) -> None:
    assert load_folder(str(talker(tmp_path)), device="cpu").end_ids == {256, 258}
    (tmp_path / "generation_config.json").write_text("{}")  # then config.json names it
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    assert load_folder(str(tmp_path), device="cpu").end_ids == {256, 7}
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert load_folder(str(tmp_path), device="cpu").end_ids == {256}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match="generation_config"):
        load_folder(str(tmp_path), device="cpu")


def test_a_window_bounds_the_context(tmp_path: Path) -> None:
    save("mistral", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.sliding_window = 32
    config.save_pretrained(tmp_path)
    assert load_folder(str(tmp_path), device="cpu").model.shape.max_seq_len == 32
    config.sliding_window = 4096
    config.save_pretrained(tmp_path)
    assert load_folder(str(tmp_path), device="cpu").model.shape.max_seq_len == 128


@pytest.mark.parametrize("said", [{}, [[1]], -1, [True], 2**40], ids=str)
def test_an_end_that_is_no_token(tmp_path: Path, said: object) -> None:
    save("llama", tmp_path)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": said}))
    with pytest.raises(DataError, match=r"config.json has eos_token_id .*; it must be a token id"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    with pytest.raises(ModelError, match=r"config.json has eos_token_id .*; it must be a token id"):
        load_folder(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "cannot be shared evenly"),
        ({"head_dim": 13}, "set model.head_dim to an even number"),
        ({"head_dim": None, "num_attention_heads": 5}, "5 heads do not divide dim 48"),
    ],
    ids=str,
)
def test_a_shape_that_no_model_has(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    save("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=f"config.json(.|\n)*{says}"):
        load_folder(str(tmp_path), device="cpu")


def test_each_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("llama", tmp_path)
    read: list[Path] = []

    def counted(file: Path) -> dict[str, Entry]:
        read.append(file)
        return read_header(file)

    monkeypatch.setattr(folder_module, "read_header", counted)
    load_folder(str(tmp_path), device="cpu")
    assert sorted(read) == sorted(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "set RUN or --model.from"),
        ({"target": "a", "folder": "b"}, "two models"),
        ({"folder": "b", "step": 3}, "--step 3"),
        ({"target": "a", "family": "hf"}, "--model.family hf"),
    ],
    ids=str,
)
def test_it_is_a_run_or_a_folder(asked: dict[str, str | int], says: str, tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match=says):
        Wanted(tmp_path, **asked)  # type: ignore[arg-type]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        Wanted(tmp_path, folder=str(tmp_path / "nowhere")).check()


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    save("llama", tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_folder(str(tmp_path), device="cpu").need_tokenizer()
