"""Streamed pieces join to the whole text, and no piece has half a character."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from shoal.data.tokens.tokenize import Tokenizer, byte_tokenizer
from shoal.infer.stream import TextStream, continuation

TEXT = "naïve 漢字 👩‍👩‍👧‍👦 end"


def words() -> Tokenizer:
    """Return a tokenizer that drops the space before a text's first word."""
    vocab = {"<unk>": 0, "</s>": 1, "▁a": 2, "▁b": 3, "c": 4}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return Tokenizer(tokenizer, eot_id=1)


def pieces(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*map(stream.push, output), stream.close()]


@pytest.mark.parametrize("prompt", ["", "é "])
def test_a_piece_waits_for_the_rest_of_its_character(prompt: str) -> None:
    tokenizer = byte_tokenizer()
    found = pieces(tokenizer, tokenizer.encode(prompt), tokenizer.encode(TEXT))
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)
    assert found[:4] == ["n", "a", "", "ï"]


def test_bytes_that_are_no_text_come_with_what_follows_them_or_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    ids = [*b"a", 0xC3, 0xC3, 0xA9, 0xFF, *b"b", 0xE6, 0xBC]
    found = pieces(tokenizer, [], ids)
    assert "".join(found) == tokenizer.decode(ids)
    assert found[-1].endswith("\ufffd")


def test_a_word_keeps_the_space_before_it() -> None:
    tokenizer = words()
    assert tokenizer.decode([3]) == "b"
    assert continuation(tokenizer, [2], [3, 4, 2]) == " bc a"
    assert pieces(tokenizer, [2], [3, 4, 2]) == [" b", "c", " a", ""]
