"""Conversations on disk and in rows: learned spans, resumed preparation, what the folder and the figures depend on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from shoal.data.decode import held_out_text
from shoal.data.packing.pack import IGNORED_LABEL
from shoal.data.prepare import prepare
from shoal.data.stored.shards import Shard, token_dtype, write_shard
from shoal.data.stored.stream import TokenStream
from shoal.data.token_folder import named_tokenizer, token_options
from shoal.errors import DataError
from tests.data.chats import (
    CHATML,
    chat_data,
    conversations,
    documents,
)  # fmt: skip

USER, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}


def test_all_is_learned_if_asked(tmp_path: Path) -> None:
    records = [{"messages": chat} for chat in conversations(20)]
    answers = prepare(chat_data(tmp_path, records, template="chatml"))
    whole = prepare(chat_data(tmp_path, records, template="chatml", learn="all"))
    for name, stream in whole.streams.items():
        assert stream.answers(0, stream.num_tokens) is None
        assert answers.streams[name].answers(0, stream.num_tokens) is not None
        np.testing.assert_array_equal(
            stream.read(0, stream.num_tokens), answers.streams[name].read(0, stream.num_tokens)
        )
        counts = whole.counts[name]
        assert (counts.learned_tokens, counts.learned_bytes) == (counts.tokens, counts.text_bytes)
        assert not (whole.split(name, seq_len=32).read([0]).labels == IGNORED_LABEL).any()


@pytest.mark.parametrize("document_mask", [False, True])
def test_rows_ignore_all_but_answers(tmp_path: Path, document_mask: bool) -> None:
    """The label at t is token t + 1: it counts if that token is learned and does not begin a document."""
    prepared = prepare(
        chat_data(tmp_path, [{"messages": chat} for chat in conversations(60, turns=4)], template="chatml")
    )
    stream = prepared.streams["train"]
    assert len(prepared.counts["train"].shards) > 2
    tokens = stream.read(0, stream.num_tokens).astype(np.int64)
    learned = np.zeros(len(tokens), bool)
    answers = stream.answers(0, len(tokens))
    assert answers is not None
    for first, stop in answers:
        learned[first:stop] = True
    assert learned.sum() == prepared.counts["train"].learned_tokens
    rows = prepared.split("train", seq_len=50, document_mask=document_mask)
    read = rows.read(np.arange(len(rows)))
    expected = np.where(learned, tokens, IGNORED_LABEL)[1 : len(rows) * 50 + 1].reshape(-1, 50)
    np.testing.assert_array_equal(read.labels, expected)
    np.testing.assert_array_equal(read.tokens, tokens[: len(rows) * 50].reshape(-1, 50))
    assert (read.labels != IGNORED_LABEL).any()
    assert (read.document_ids is not None) is document_mask


def test_spans_on_disk(tmp_path: Path) -> None:
    """A third tensor, only for conversations: other shards keep their bytes."""
    tokens, starts = np.arange(300_000, dtype=np.uint16), np.array([0, 5, 9])
    spans = np.array([[1, 4], [4, 5], [7, 9], [100, 250_000]])
    record = write_shard(tmp_path / "a.safetensors", tokens, starts, 7, spans, 3)
    assert (record.answers, record.learned_tokens, record.learned_bytes) == (4, 249_906, 3)
    plain = write_shard(tmp_path / "b.safetensors", tokens, starts, 7)
    assert (plain.answers, plain.learned_tokens, plain.learned_bytes) == (None, None, None)
    assert load_file(tmp_path / "b.safetensors").keys() == {"starts", "checks", "tokens"}
    loaded = load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(loaded["answers"], spans)
    np.testing.assert_array_equal(loaded["tokens"], tokens)
    dtype = token_dtype(1 << 16)
    stream = TokenStream([Shard(tmp_path / r.name, r, dtype) for r in (record, plain, record)])
    np.testing.assert_array_equal(stream.read(299_990, 300_010), [*range(299_990 % 65536, 300_000 % 65536), *range(10)])
    whole = np.zeros(900_000, bool)
    for first, stop in [*spans, [300_000, 600_000], *(spans + 600_000)]:
        whole[first:stop] = True
    draw = np.random.default_rng(0)
    edges = [0, 1, 3, 4, 5, 7, 9, 99, 100, 250_000, 299_999, 300_000, 300_001, 600_000, 600_001, 600_004, 900_000]
    for first, stop in [sorted(draw.choice(edges, 2, replace=False).tolist()) for _ in range(200)]:
        mask = np.zeros(stop - first, bool)
        spans_here = stream.answers(first, stop)
        for a, b in ([[first, stop]] if spans_here is None else spans_here) - np.array(first):
            assert 0 <= a < b <= stop - first
            mask[a:b] = True
        np.testing.assert_array_equal(mask, whole[first:stop])


def test_tokens_do_not_depend_on_interruptions_or_the_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"id": n % 50, "messages": chat} for n, chat in enumerate(conversations(60, turns=2))]
    records[7]["messages"] = [{**USER, "content": "x"}, {**ANSWER, "train": 0}]
    (tmp_path / "dated.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    options: dict[str, Any] = {"template": str(tmp_path / "dated.jinja"), "broken_conversations": "keep"}
    data = chat_data(tmp_path, records, **options)
    whole, cut = prepare(data), replace(data, folder=str(tmp_path / "cut"))
    written: list[str] = []

    def die_after(count: int) -> None:
        def write(path: Path, *rest: Any) -> Any:
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(path.name)
            return write_shard(path, *rest)

        monkeypatch.setattr("shoal.data.encode.write_shard", write)
        monkeypatch.setattr("shoal.data.encode.CHUNK_BYTES", 1000)

    for count in (1, 2, 4):
        die_after(count)
        with pytest.raises(KeyboardInterrupt):
            prepare(cut)
    die_after(99)
    ended = prepare(cut)
    assert len(written) == len(set(written)) > 5
    assert ended.manifest == whole.manifest
    assert ended.notes == whole.notes
    assert len(whole.notes) == 2
    for path in whole.folder.glob("*.safetensors"):
        assert (ended.folder / path.name).read_bytes() == path.read_bytes()
    assert any("26 Jul 2024" in whole.tokenizer.decode(list(ids)) for ids in documents(whole))


def test_the_folder_depends_on_what_the_tokens_depend_on(tmp_path: Path) -> None:
    data = chat_data(tmp_path, [], template="chatml")
    (tmp_path / "a.jinja").write_text(CHATML)

    def options(**changes: Any) -> str:
        made = chat_data(tmp_path, [], **{"template": "chatml", **changes})
        return json.dumps(token_options(made, named_tokenizer(made)))

    changes: list[dict[str, Any]] = [
        {}, {"template": "llama3"}, {"template": str(tmp_path / "a.jinja")}, {"learn": "all"}, {"format": "sharegpt"},
        {"broken_conversations": "keep"},
    ]  # fmt: skip
    assert len({options(**c) for c in changes}) == len(changes)
    plain = chat_data(tmp_path, [], format="text")
    assert "conversations" not in token_options(plain, named_tokenizer(plain))
    assert options() == json.dumps(token_options(data, named_tokenizer(data)))


def test_only_the_learned_part_counts_in_bits_per_byte(tmp_path: Path) -> None:
    records = [{"messages": chat} for chat in conversations(30)]
    prepared = prepare(chat_data(tmp_path, records, template="chatml"))
    counts = prepared.counts["val"]
    assert counts.learned_bytes < counts.text_bytes
    assert counts.learned_tokens < counts.tokens
    with pytest.raises(DataError, match="not compared on conversations"):
        held_out_text(prepared)
    assert math.isclose(counts.learned_tokens / counts.learned_bytes, 1, rel_tol=0.1)  # bytes, plus one end each


def test_a_tokenizer_is_trained_on_what_is_said(tmp_path: Path) -> None:
    words = ["zebra crossing"] * 4
    records = [{"messages": [{**USER, "content": f"{n}"}, {**ANSWER, "content": " ".join(words)}]} for n in range(200)]
    prepared = prepare(chat_data(tmp_path, records, template="chatml", tokenizer="bpe", tokenizer_vocab_size=300))
    assert len(prepared.tokenizer.encode(" crossing")) == 1
    assert len(prepared.tokenizer.encode('"role"')) > 3
