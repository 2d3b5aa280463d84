"""Foreign tokenizers against their own libraries: tiktoken, sentencepiece, transformers."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tiktoken
from transformers import PreTrainedTokenizerFast

from shoal.data.tokens import tiktoken_files
from shoal.data.tokens.same_ids import TEXTS, sample
from shoal.data.tokens.sentencepiece_model import from_sentencepiece
from shoal.data.tokens.tokenize import Tokenizer, load_tokenizer, parse_tokenizer
from shoal.errors import DataError

HERE = Path(__file__)
TEXT = (HERE.parents[2] / "LICENSE").read_text("utf-8")  # a text that never changes: unigram pieces may tie in others
PLAIN = [text for text in TEXTS if "▁" not in text]  # SentencePiece itself reads that character as a space


def as_transformers(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    path = folder / "tokenizer.json"
    path.write_text(tokenizer.to_json(), encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


@pytest.fixture
def tiktoken_cache(real_tokenizers: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(real_tokenizers / "tiktoken"))
    tiktoken_files._converted.cache_clear()
    return real_tokenizers / "tiktoken"


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("gpt2", 50256),
        pytest.param("cl100k_base", 100257, marks=pytest.mark.ci),
        pytest.param("o200k_base", 199999, marks=pytest.mark.slow),
    ],
)
def test_tiktoken(name: str, end: int, tiktoken_cache: Path, tmp_path: Path) -> None:
    ours, theirs = load_tokenizer(f"tiktoken:{name}"), tiktoken.get_encoding(name)
    texts = [*TEXTS, " ".join(theirs.special_tokens_set), TEXT, "hello world"]  # `load_tokenizer` compares more texts
    assert ours.encode_batch(texts) == [theirs.encode_ordinary(text) for text in texts]
    assert (ours.eot_id, ours.bos_id, ours.vocab_size) == (end, None, theirs.n_vocab)
    assert ours.special_ids == set(theirs._special_tokens.values())
    assert ours.encode_chat("a<|endoftext|>b") == theirs.encode("a<|endoftext|>b", allowed_special="all")
    if name == "gpt2":
        assert ours.encode("hello world") == [31373, 995]
        assert as_transformers(ours, tmp_path)(TEXT).input_ids == theirs.encode_ordinary(TEXT)


def test_a_tiktoken_file_that_is_nowhere_is_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken_files, "HOST", "https://localhost:9/")
    tiktoken_files._converted.cache_clear()
    start = time.monotonic()
    with pytest.raises(DataError, match=r"r50k_base\.tiktoken is not on this machine") as error:
        load_tokenizer("tiktoken:r50k_base")
    assert time.monotonic() - start < 2 * tiktoken_files.CONNECT_SECONDS
    assert str(tmp_path) in str(error.value)
    with pytest.raises(DataError, match=r"no encoding gpt5.*gpt2"):
        load_tokenizer("tiktoken:gpt5")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match=r"shoal\[tiktoken\]"):
        load_tokenizer("tiktoken:gpt2")


@pytest.mark.parametrize("folder", ["mistral", "mistral-v3"])
def test_mistral_s_sentencepiece(folder: str, real_tokenizers: Path, tmp_path: Path) -> None:
    path = real_tokenizers / folder / "tokenizer.model"
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = load_tokenizer(str(path))
    texts = [*sample(["<s>", "</s>", "<unk>"]), TEXT]
    assert ours.encode_batch(texts) == [theirs.encode(text) for text in texts]
    assert (ours.eot_id, ours.vocab_size) == (theirs.eos_id(), theirs.vocab_size())
    assert not ours.special_ids & {i for ids in ours.encode_batch(texts) for i in ids}
    assert as_transformers(ours, tmp_path)(TEXT).input_ids == theirs.encode(TEXT)
    assert [ours.decode(ours.encode(text)) for text in PLAIN] == PLAIN
    assert not ours.can_be_cut, "each part would get a leading space"


def train(kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    given = {"vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity", **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 3), model_writer=out, model_type=kind, minloglevel=2,
        **given,
    )  # fmt: skip
    return out.getvalue()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [{}, {"remove_extra_whitespaces": False}, {"remove_extra_whitespaces": False, "add_dummy_prefix": False}],
    ids=["default", "all spaces", "all spaces, none added"],
)
def test_sentencepiece_models_trained_here(kind: str, options: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train(kind, **options))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = load_tokenizer(str(tmp_path))
    texts = [*sample(["<s>", "</s>", "<unk>", "<0x41>"]), TEXT]
    assert ours.encode_batch(texts) == [theirs.encode(text) for text in texts]
    assert ours.eot_id == theirs.eos_id()
    if options:  # by default SentencePiece drops repeated spaces
        assert [ours.decode(ours.encode(text)) for text in PLAIN] == PLAIN


def test_a_model_whose_ids_would_differ_is_refused(tmp_path: Path) -> None:
    """The tokenizers library applies an nmt_nfkc normalizer to grapheme clusters, SentencePiece to characters."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(train("bpe", normalization_rule_name="nmt_nfkc"))
    with pytest.raises(DataError, match="gives other ids than its own library"):
        load_tokenizer(str(path))


def test_what_is_no_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"no model")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(str(tmp_path))
    path.write_bytes(train("char", vocab_size=300, byte_fallback=True))
    with pytest.raises(DataError, match="neither a BPE nor a unigram"):
        load_tokenizer(str(path))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(DataError, match=r"shoal\[sentencepiece\]"):
        from_sentencepiece(HERE)
    with pytest.raises(DataError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(str(HERE.parent))


def test_saved_it_is_the_same(real_tokenizers: Path) -> None:
    ours = load_tokenizer(str(real_tokenizers / "mistral"))
    again = parse_tokenizer(ours.to_json(), "saved")
    assert (again.eot_id, again.bos_id, again.encode_batch(TEXTS)) == (
        ours.eot_id,
        ours.bos_id,
        ours.encode_batch(TEXTS),
    )
