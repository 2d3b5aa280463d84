"""The faster encoder: it writes the same bytes to disk as the tokenizers library, and is dropped if its ids differ."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal.data import encode
from shoal.data.prepare import prepare
from shoal.data.tokens.fastokens import FastEncoder, fast_encoder
from shoal.data.tokens.same_ids import sample
from shoal.data.tokens.tokenize import byte_tokenizer, load_tokenizer, train_bpe
from tests.data.conftest import MakeData
from tests.data.test_prepare import files_of

pytest.importorskip("fastokens", reason="the extra shoal[fast] is not installed")


@pytest.mark.parametrize("name", ["llama3/tokenizer.json", "qwen3/tokenizer.json", "mistral/tokenizer.model"])
def test_ids_are_those_of_tokenizers(name: str, real_tokenizers: Path) -> None:
    tokenizer = load_tokenizer(str(real_tokenizers / name))
    fast = fast_encoder(tokenizer)
    assert fast is not None
    texts = [*sample(["<s>", "<|im_end|>", "<|eot_id|>"]), Path(encode.__file__).read_text("utf-8")]
    assert [ids.tolist() for ids in fast.encode_batch(texts, 0)] == tokenizer.encode_batch(texts)
    assert fast.encode_batch([], 100) == []


def test_prepared_bytes_do_not_depend_on_it(make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tokenizer="bpe", tokenizer_vocab_size=300)
    with_it = prepare(data)
    files = files_of(with_it)
    monkeypatch.setitem(sys.modules, "fastokens", None)
    for path in with_it.folder.glob("*.*"):
        path.unlink()
    assert files_of(prepare(data)) == files
    assert fast_encoder(train_bpe(iter(["words"]), 257)) is None


def test_bytes_need_none() -> None:
    assert fast_encoder(byte_tokenizer()) is None


@pytest.mark.parametrize("wrong_from", [0, 5])
def test_where_it_differs_all_is_done_again(
    make_data: MakeData, monkeypatch: pytest.MonkeyPatch, wrong_from: int
) -> None:
    data = make_data(tokenizer="bpe", tokenizer_vocab_size=300)
    first = prepare(data)
    files = files_of(first)
    for path in first.folder.glob("*.*"):
        path.unlink()

    class Wrong:
        """An encoder that returns id 1 for every token after the first `wrong_from` batches."""

        calls = 0

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def encode_batch_flat(self, texts: Sequence[str], split_special_tokens: bool) -> tuple[bytes, bytes]:
            ids, offsets = self.inner.encode_batch_flat(texts, split_special_tokens=split_special_tokens)
            Wrong.calls += 1
            return (ids if Wrong.calls <= wrong_from else b"\1\0\0\0" * (len(ids) // 4)), offsets

    def wrong_encoder(tokenizer: Any) -> FastEncoder:
        fast = fast_encoder(tokenizer)
        assert fast is not None
        fast._fast = Wrong(fast._fast)
        return fast

    monkeypatch.setattr(encode, "fast_encoder", wrong_encoder)
    monkeypatch.setattr(encode, "CHUNK_BYTES", 500)
    monkeypatch.setattr(encode, "COMPARED_CHUNKS", 8)
    again = prepare(data)
    assert Wrong.calls > wrong_from
    assert files_of(again) == files
    assert [note for note in again.notes if "different ids" in note and "fastokens" in note]
