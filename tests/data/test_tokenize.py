"""Tokenizers against Python's own UTF-8 and the tokenizers library's own output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from shoal.data.tokens.tokenize import (
    END_OF_TEXT,
    Tokenizer,
    byte_tokenizer,
    load_tokenizer,
    parse_tokenizer,
    train_bpe,
)
from shoal.errors import DataError

NASTY = [
    "",
    " ",
    "\n\n\t  \r\n \x00\x01\x7f",
    "a\u0301 é \u200d\u200b\ufeff",
    "👩‍👩‍👧‍👦🏴󠁧󠁢󠁥󠁮󠁧󠁿 漢字 שלום \u202e",
    f"{END_OF_TEXT} <s></s> [SEP]",
    "\U0010ffff\ufffd\ufffe",
    "1234567890 0x1F 1_000.5e-7",
    "def f(x):\n        return x  \n\n\n    # end\r\n",
    " " * 5000,
    "𝒳" * 300,
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    texts = [f"def name_{k}(self, value):\n        return value * {k}\n\n\n" for k in range(200)]
    return train_bpe(iter(texts), 400)


@pytest.mark.parametrize("text", NASTY)
def test_any_text_comes_back(bpe: Tokenizer, text: str) -> None:
    for tokenizer in (bpe, byte_tokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot_id not in ids, "the name of the end-of-text token is plain text in a text"


def test_byte_ids_are_utf8_and_the_saved_file_says_the_same() -> None:
    tokenizer = byte_tokenizer()
    saved = parse_tokenizer(tokenizer.to_json(), "saved")
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256) == (saved.vocab_size, saved.eot_id)
    everything = "".join(map(chr, range(0x800))) + "".join(NASTY)
    assert tokenizer.encode(everything) == list(everything.encode()) == saved.encode(everything)


def test_bpe_learns_line_ends_with_their_indentation(bpe: Tokenizer) -> None:
    assert bpe.eot_id == 0
    assert bpe.vocab_size <= 400
    assert [bpe.decode([i]) for i in bpe.encode("value):\n        return")][-2:] == ["):\n        ", "return"]


def test_ids_are_those_of_the_library(bpe: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.to_json(), encoding="utf-8")
    plain = tokenizers.Tokenizer.from_file(str(path))
    texts = ["def other(self):\n    return 12345", "漢字 and words", ""]
    assert load_tokenizer(str(path)).encode_batch(texts) == [e.ids for e in plain.encode_batch(texts)]
    assert load_tokenizer(str(tmp_path)).vocab_size == plain.get_vocab_size()


def test_bpe_is_the_same_each_time() -> None:
    texts = [f"x{k % 13} y{k % 7} z{k % 5}\n" for k in range(500)]
    assert train_bpe(iter(texts), 300).to_json() == train_bpe(iter(texts), 300).to_json()


@pytest.mark.parametrize("end", ["</s>", "<|end_of_text|>", "[SEP]"])
def test_the_usual_names_of_end_of_text_are_found(end: str) -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([end])
    inner.enable_truncation(1)
    inner.enable_padding(length=8)
    tokenizer = parse_tokenizer(inner.to_str(), "mine")
    assert tokenizer.eot_id == 3
    assert tokenizer.encode("a b b") == [0, 1, 1], "neither truncated nor padded"


@pytest.mark.parametrize(
    ("content", "says"),
    [("{}", "not a tokenizer.json"), ("WORDS", "no end-of-text token")],
)
def test_a_file_that_will_not_do_is_named(tmp_path: Path, content: str, says: str) -> None:
    if content == "WORDS":
        content = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()
        assert json.loads(content)
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=says) as error:
        load_tokenizer(str(path))
    assert str(path) in str(error.value)
    with pytest.raises(DataError, match="no such tokenizer: gone"):
        load_tokenizer("gone")
