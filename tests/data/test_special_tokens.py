"""Special tokens of a tokenizer folder: its two config files may contradict each other. Compared with transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer

from shoal.data.tokens.chat_template import ChatTemplate
from shoal.data.tokens.tokenize import load_tokenizer, train_bpe
from shoal.data.tokens.tokenizer_ends import special_tokens
from shoal.errors import DataError

DECODER = {"added_tokens_decoder": {"300": {"content": "<B>", "special": True}}}
# (tokenizer_config, special_tokens_map, expected token)
CASES: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({"token": "<A>"}, {"token": "<B>"}, "<B>"),
    ({}, {"token": "<B>"}, "<B>"),
    ({}, {"token": {"content": "<B>", "lstrip": False}}, "<B>"),
    ({"token": None}, {"token": "<B>"}, "<B>"),
    ({"token": "<A>"}, {"token": None}, None),
    ({"token": "<A>"}, {}, "<A>"),
    (DECODER, {"token": "<B>"}, None),
    (DECODER | {"token": "<A>"}, {"token": "<B>"}, "<A>"),
]


def make(folder: Path, config: dict[str, Any], older: dict[str, Any]) -> Path:
    """Write a folder. config, older: its tokenizer_config and special_tokens_map; "token" means bos_token and eos_token."""
    tokenizer = train_bpe(iter(["Hello there, what is it?"] * 9), 280)
    tokenizer._tokenizer.add_special_tokens(["<A>", "<B>"])
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    rest = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ bos_token }}|{{ eos_token }}"}
    for name, said in {"tokenizer_config": rest | config, "special_tokens_map": older}.items():
        both = {"bos_token": said["token"], "eos_token": said["token"]} if "token" in said else {}
        kept = {key: value for key, value in said.items() if key != "token"}
        (folder / f"{name}.json").write_text(json.dumps(kept | both), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("config", "older", "token"), CASES)
def test_the_one_that_counts(tmp_path: Path, config: dict[str, Any], older: dict[str, Any], token: str | None) -> None:
    folder = make(tmp_path, config, older)
    theirs, template = AutoTokenizer.from_pretrained(folder), ChatTemplate.of(folder)
    assert template is not None
    assert template.special == special_tokens(folder) == theirs.special_tokens_map
    assert template.special == ({} if token is None else {"bos_token": token, "eos_token": token})
    text = template.render([{"role": "user", "content": "x"}])
    assert text == theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode([tokenizer.eot_id]) == (token or "<|endoftext|>")


def test_the_beginning_too(real_tokenizers: Path, tmp_path: Path) -> None:
    """Read a SentencePiece folder: its config says whether a text begins with a token, its older map names the token."""
    shutil.copy(real_tokenizers / "mistral" / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": None}))
    assert load_tokenizer(str(tmp_path)).bos_id is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert load_tokenizer(str(tmp_path)).bos_id == 1


@pytest.mark.parametrize("after", [["<A>"], ["<A>", "<B>"]])
def test_what_the_tokenizer_puts_after_a_text_stays(tmp_path: Path, after: list[str]) -> None:
    """Keep the tokens that the tokenizer adds after a text when the end-of-text token is replaced."""
    folder = make(tmp_path, {"token": "<B>"}, {})
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=" ".join(["$A", *after]), special_tokens=[(token, inner.token_to_id(token)) for token in after]
    )
    inner.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode([tokenizer.eot_id]) == "<B>"
    written = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    assert written.to_str() != inner.to_str()
    assert (
        written.encode("Hello").ids
        == inner.encode("Hello").ids
        == AutoTokenizer.from_pretrained(folder)("Hello").input_ids
    )


def test_one_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has eos_token <gone>, .* tokenizer_config.json or special_tokens_map.json"):
        load_tokenizer(str(make(tmp_path, {}, {"token": "<gone>"})))
