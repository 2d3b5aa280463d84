"""The bytes of each token, added up, are the bytes of the decoded text: for every kind of tokenizer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from shoal.data.tokens.byte_lengths import byte_lengths
from shoal.data.tokens.same_ids import TEXTS
from shoal.data.tokens.sentencepiece_model import from_sentencepiece
from shoal.data.tokens.tokenize import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

WORDS = ["some words of a text, some others\n", "più parole, più 漢字\n", "🐟 fish and chips\n"] * 20


def gpt2_like(folder: Path) -> Tokenizer:
    """Return a BPE whose merges cut characters, with a plain added token and a special one."""
    inner = train_bpe(iter(WORDS), 310)._tokenizer
    inner.add_tokens([AddedToken("    "), AddedToken("é")])
    inner.add_special_tokens(["<|chat|>"])
    return Tokenizer(inner, 0)


def sentencepiece_like(kind: str) -> Callable[[Path], Tokenizer]:
    """Return the maker of a SentencePiece model with byte fallback, which puts a space before each text."""

    def make(folder: Path) -> Tokenizer:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line.strip() for line in WORDS]), model_writer=model, vocab_size=320, model_type=kind,
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        return Tokenizer(from_sentencepiece(folder / "tokenizer.model"), 2, 1)

    return make


def metaspace(folder: Path) -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE({"▁": 0, "a": 1, "b": 2, "▁a": 3, "é": 4, "<e>": 5, "x": 6}, [("▁", "a")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.add_special_tokens(["<e>"])
    return Tokenizer(inner, 5)


def words(folder: Path) -> Tokenizer:
    """Return a tokenizer whose decoder is not known: it has none, and joins words by spaces."""
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "bcd": 1, "é": 2, "<e>": 3, "x": 4}, "x"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<e>"])
    return Tokenizer(inner, 3)


def end_not_added(folder: Path) -> Tokenizer:
    """Return a tokenizer.json with its end of text in the vocabulary, but not among its added tokens."""
    saved = json.loads(train_bpe(iter(WORDS), 310).to_json())
    saved["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    return load_tokenizer(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    "make",
    [
        gpt2_like,
        lambda _: byte_tokenizer(),
        sentencepiece_like("bpe"),
        sentencepiece_like("unigram"),
        metaspace,
        words,
        end_not_added,
    ],
    ids=["gpt2", "bytes", "sentencepiece bpe", "sentencepiece unigram", "metaspace", "words", "end not added"],
)
def test_bytes_of_tokens_are_those_of_the_text(tmp_path: Path, make: Callable[[Path], Tokenizer]) -> None:
    tokenizer = make(tmp_path)
    lengths = byte_lengths(tokenizer)
    compared = 0
    for text in (*TEXTS, *WORDS[:3], "a bcd é a", " a", "    é\x00", "漢", "a<e>b"):
        ids = tokenizer.encode(text)
        if ids:
            counted = int(lengths.of[ids].sum()) - (lengths.drops_space and bool(lengths.after_space[ids[0]]))
            restored = text if make is gpt2_like else tokenizer.decode(ids)  # the library decodes the added é wrong
            assert counted == len(restored.encode()), text
            compared += 1
    assert compared > 10
    assert lengths.of[sorted(tokenizer.special_ids | {tokenizer.eot_id})].sum() == 0


def test_a_public_tokenizer_with_byte_tokens(real_tokenizers: Path) -> None:
    tokenizer = load_tokenizer(str(real_tokenizers / "mistral" / "tokenizer.model"))
    text = (Path(__file__).parents[2] / "LICENSE").read_text("utf-8") + "più 漢字 🐟\r\n\t"
    ids, lengths = tokenizer.encode(text), byte_lengths(tokenizer)
    assert int(lengths.of[ids].sum()) - lengths.drops_space == len(text.encode())
