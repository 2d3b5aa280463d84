"""Removed documents, compared with filters written out in the tests."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.config.data_options import Data
from shoal.data.filters import filters, near_duplicates
from shoal.data.filters.near_duplicates import band_slots, signatures_of
from shoal.data.filters.sorted_runs import SortedRuns
from shoal.data.prepare import prepare
from shoal.data.token_folder import token_options
from shoal.data.tokens.tokenize import byte_tokenizer
from shoal.errors import ConfigError, DataError
from shoal.resolve.resolve import resolve
from tests.data.conftest import MakeData
from tests.data.test_prepare import texts_of

WORDS = [f"word{n}" for n in range(500)]


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return str(path)


def random_texts(count: int, seed: int, words: int = 120) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(words // 2, words))) for _ in range(count)]


def jaccard(one: str, other: str) -> float:
    """Return the exact similarity of two texts' sets of five-word phrases."""
    sets = []
    for text in (one, other):
        words = re.findall(r"\w+", text.lower())
        sets.append({tuple(words[at : at + 5]) for at in range(max(1, len(words) - 4))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def kept(data: Data) -> list[str]:
    """Return the documents of both splits."""
    return list(itertools.chain(*texts_of(prepare(data)).values()))


def test_of_equal_texts_the_first_is_kept(make_data: MakeData, tmp_path: Path) -> None:
    texts = random_texts(300, 1)
    corpus = write(tmp_path / "a.jsonl", [*texts, *texts[::3], "\n", *texts[:5], "\n"])
    data = make_data(corpus="jsonl", paths=(corpus,), deduplicate="exact")
    prepared = prepare(data)
    assert sorted(kept(data)) == sorted([*texts, "\n"])
    removal = prepared.manifest.removed["exact duplicate"]
    assert removal.count == 106
    assert removal.first == [f"{corpus}:{line}" for line in range(301, 306)]
    assert prepared.manifest.removals() == [f"removed 106 (exact duplicate): {', '.join(removal.first)}, ..."]
    assert prepared.notes == ()


def test_near_duplicates_are_those_of_the_exact_similarity(make_data: MakeData, tmp_path: Path) -> None:
    """MinHash estimates, so texts within 0.12 of the threshold may go either way; all others may not."""
    draw = random.Random(2)
    texts = []
    for text in random_texts(150, 3):
        words = text.split()
        for place in draw.sample(range(len(words)), draw.choice([0, 1, 2, 4, 8, 20])):
            words[place] = "changed"
        texts += [text, ", ".join(words).upper()]
    data = make_data(corpus="jsonl", paths=(write(tmp_path / "a.jsonl", texts),), deduplicate="near")
    found = set(kept(data))
    similar = [jaccard(a, b) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    assert found >= set(texts[::2])
    for text, similarity in zip(texts[1::2], similar, strict=True):
        if abs(similarity - data.near_threshold) > 0.12:
            assert (text in found) == (similarity < data.near_threshold), similarity
    assert sum(s > 0.92 for s in similar) > 10
    assert sum(s < 0.68 for s in similar) > 10


def test_a_signature_estimates_the_similarity() -> None:
    texts = random_texts(40, 4)
    changed = [text.replace("word1", "other", 1 + n % 9) for n, text in enumerate(texts)]
    estimates = (signatures_of(texts) == signatures_of(changed)).mean(axis=1)
    exact = np.array([jaccard(a, b) for a, b in zip(texts, changed, strict=True)])
    assert np.abs(estimates - exact).max() < 0.15
    assert abs((estimates - exact).mean()) < 0.02
    assert (signatures_of(["...", ""]) == near_duplicates.NO_WORDS).all()
    assert signatures_of([]).shape == (0, near_duplicates.SLOTS)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95, 1.0])
def test_a_pair_at_the_threshold_is_compared(threshold: float) -> None:
    slots = band_slots(threshold)
    chance = [1 - (1 - threshold**s) ** (128 // s) for s in (slots, slots + 1)]
    assert chance[0] >= 0.9
    assert slots == 128 or chance[1] < 0.9


def test_short_texts_and_texts_without_words(make_data: MakeData, tmp_path: Path) -> None:
    texts = ["one two", "one two!", "one three", "...", "?!", "", "x" * 400]
    data = make_data(corpus="jsonl", paths=(write(tmp_path / "a.jsonl", texts),), deduplicate="near")
    assert sorted(kept(data)) == sorted(["one two", "one three", "...", "?!", "x" * 400])


def test_many_pages_of_one_template_cost_a_bounded_number_of_comparisons(
    make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = random_texts(1, 5, 200)[0]
    texts = [f"{template} {' '.join(f'page{n}x{k}' for k in range(70))}" for n in range(400)]
    most = 0
    real = near_duplicates.NearIndex._similar

    def counted(self: near_duplicates.NearIndex, signature: np.ndarray, others: np.ndarray) -> bool:
        nonlocal most
        most = max(most, len(others))
        return real(self, signature, others)

    monkeypatch.setattr(near_duplicates.NearIndex, "_similar", counted)
    data = make_data(corpus="jsonl", paths=(write(tmp_path / "a.jsonl", texts),), deduplicate="near")
    assert len(kept(data)) > 300
    assert 16 <= most <= 16 * 16


def test_decisions_do_not_depend_on_batches(
    make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = random_texts(80, 6)
    texts += [text.replace("word1", "word2", 1) for text in texts] + texts[:20]
    corpus = write(tmp_path / "a.jsonl", texts)
    results = []
    for documents in (1, 7, 1024):
        monkeypatch.setattr(filters, "BATCH_DOCUMENTS", documents)
        folder = str(tmp_path / f"by-{documents}")
        results.append(prepare(make_data(corpus="jsonl", paths=(corpus,), deduplicate="near", folder=folder)).manifest)
    assert len({manifest.data_id for manifest in results}) == 1
    assert all(manifest.removed == results[0].removed for manifest in results)


@pytest.mark.parametrize("ngram", [3, 13])
def test_contaminated_documents_are_those_that_share_words(make_data: MakeData, tmp_path: Path, ngram: int) -> None:
    texts = random_texts(200, 7)
    questions = [" ".join(text.split()[5 : 5 + length]) for text, length in zip(texts, range(1, 40), strict=False)]
    lines = [json.dumps({"id": 3, "question": q.upper().replace(" ", " - ")}) for q in questions[::2]]
    (tmp_path / "eval.jsonl").write_text("\n".join([*lines, ""]))
    (tmp_path / "eval.txt").write_text(".\n".join(questions[1::2]))
    data = make_data(
        corpus="jsonl",
        paths=(write(tmp_path / "a.jsonl", texts),),
        decontaminate=(str(tmp_path / "eval.jsonl"), str(tmp_path / "eval.txt")),
        decontaminate_ngram=ngram,
    )
    grams = set()
    for text in [*questions[::2], " ".join(questions[1::2])]:
        words = text.split()
        grams |= {tuple(words[at : at + ngram]) for at in range(len(words) - ngram + 1)}
    clean = []
    for text in texts:
        words = text.split()
        if not grams & {tuple(words[at : at + ngram]) for at in range(len(words) - ngram + 1)}:
            clean.append(text)
    assert sorted(kept(data)) == sorted(clean)
    assert 100 < len(clean) < 200
    removed = prepare(data).manifest.removed
    assert {reason: removal.count for reason, removal in removed.items()} == {
        f"shares {ngram} words with data.decontaminate": 200 - len(clean)
    }


def test_a_changed_evaluation_set_is_noticed_and_a_missing_one_is_a_note(make_data: MakeData, tmp_path: Path) -> None:
    corpus = write(tmp_path / "a.jsonl", random_texts(30, 8))
    (tmp_path / "eval.txt").write_text(" ".join(WORDS[:20]))
    data = make_data(corpus="jsonl", paths=(corpus,), decontaminate=(str(tmp_path / "eval.txt"),))
    before = prepare(data)
    (tmp_path / "eval.txt").write_text(" ".join(WORDS[:21]))
    with pytest.raises(DataError, match=r"1 changed \(.*eval.txt\)"):
        prepare(data)
    (tmp_path / "eval.txt").unlink()
    after = prepare(data)
    assert after.data_id == before.data_id
    assert "no such file: " in after.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("eval.txt", b"too few words", "has 13 words.*lower data.decontaminate_ngram"),
        ("eval.jsonl", b'{"a": 1}\n{"a', "eval.jsonl:2 is not JSON"),
        ("eval.txt", b"\xff\xfe", "not UTF-8.*correct data.decontaminate"),
        (None, b"", "no such file.*correct data.decontaminate"),
    ],
)
def test_a_bad_evaluation_set_is_one_message(
    make_data: MakeData, tmp_path: Path, name: str | None, content: bytes, says: str
) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        prepare(make_data(decontaminate=(str(tmp_path / (name or "nothing.txt")),)))


def test_lengths_are_bytes_of_utf_8(make_data: MakeData, tmp_path: Path) -> None:
    texts = ["é" * n for n in range(1, 30)]
    data = make_data(
        corpus="jsonl",
        paths=(write(tmp_path / "a.jsonl", texts[::-1]),),
        shortest_document=10,
        longest_document=40,
    )
    assert sorted(kept(data)) == texts[4:20]
    removals = prepare(data).manifest.removals()  # in the order of the filters, although a longer one is read first
    assert [line.partition(":")[0] for line in removals] == [
        "removed 4 (shorter than data.shortest_document)", "removed 9 (longer than data.longest_document)",
    ]  # fmt: skip


def test_removing_every_document_is_one_message(make_data: MakeData) -> None:
    with pytest.raises(DataError, match=r"removed every document: shorter than data.shortest_document \(40\)"):
        prepare(make_data(shortest_document=1_000_000))


def test_the_tokenizer_is_trained_on_kept_documents(make_data: MakeData, tmp_path: Path) -> None:
    texts = [f"{n} public public" for n in range(100)]
    corpus = write(tmp_path / "a.jsonl", [*texts, *[f"{n} " + "secret " * 50 for n in range(100)]])
    data = make_data(corpus="jsonl", paths=(corpus,), tokenizer="bpe", tokenizer_vocab_size=300, longest_document=100)
    tokenizer = prepare(data).tokenizer
    assert len(tokenizer.encode(" public")) == 1
    assert len(tokenizer.encode(" secret")) > 1


def test_without_filters_nothing_changes_its_name(make_data: MakeData) -> None:
    """Folders made before filters existed keep their names, and so does a config whose filters are off."""
    options = token_options(make_data(), byte_tokenizer())
    assert set(options) == {"format", "corpus", "val_fraction", "shard_tokens", "paths", "tokenizer"}
    changed = token_options(make_data(deduplicate="near", near_threshold=0.7, decontaminate=("a",)), byte_tokenizer())
    assert changed == {**options, "deduplicate": "near", "near_threshold": 0.7, "decontaminate": ["a", 13]}


def test_rensa_missing_names_the_extra(make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(DataError, match=r"pip install 'shoal\[data\]'"):
        prepare(make_data(deduplicate="near"))


def test_segments_of_another_version_are_discarded(make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures of another version of rensa cannot be compared, so the pass begins again."""
    whole = prepare(make_data(deduplicate="near", folder=make_data().folder + "-whole"))
    data = make_data(deduplicate="near")

    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "tokens":
            raise KeyboardInterrupt

    with monkeypatch.context() as other:
        other.setattr(filters, "version", lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, interrupt)
    phases = set()
    ended = prepare(data, lambda phase, done, total: phases.add(phase))
    assert "filtering" in phases
    assert ended.manifest.removed == whole.manifest.removed
    assert ended.data_id == whole.data_id


def test_a_lost_segment_is_one_message(make_data: MakeData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "BATCH_DOCUMENTS", 5)
    data = make_data(deduplicate="exact")

    def lose(phase: str, done: int, total: int) -> None:
        for path in Path(data.folder).glob("*/.filter-00000"):
            path.write_bytes(b"")

    with pytest.raises(DataError, match=r"cannot read .*filter-00000.*remove .*journal.json"):
        prepare(data, lose)
    for path in Path(data.folder).glob("*/journal.json"):
        path.unlink()
    assert prepare(data).counts["train"].documents


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"near_threshold": "0.7"}, "no effect with data.deduplicate none; set data.deduplicate to near"),
        ({"decontaminate_ngram": "8"}, "no effect without evaluation sets"),
        ({"shortest_document": "9", "longest_document": "3"}, "every document would be removed"),
        ({"decontaminate": "nothing.jsonl"}, "data.decontaminate does not exist: nothing.jsonl"),
        ({"deduplicate": "nearly"}, "near"),
    ],
)
def test_bad_combinations_are_rejected(given: dict[str, str], says: str) -> None:
    options = [(f"data.{key}", value, "here") for key, value in given.items()]
    with pytest.raises(ConfigError, match=re.escape(says)):
        resolve(None, [*options, ("train.steps", "1", "here"), ("data.folder", "nowhere", "here")])


def test_sorted_runs_find_what_a_dictionary_finds() -> None:
    draw = np.random.default_rng(9)
    runs, expected = SortedRuns(), dict[bytes, list[int]]()
    number = 0
    for size in draw.integers(0, 40, 60).tolist():
        keys = np.array(
            [hashlib.blake2b(bytes([k]), digest_size=16).digest() for k in draw.integers(0, 200, size)], "S16"
        )
        runs.add(keys, np.arange(number, number + size))
        for key in keys.tolist():
            expected.setdefault(key.ljust(16, b"\0"), []).append(number)
            number += 1
    asked = np.array([hashlib.blake2b(bytes([k]), digest_size=16).digest() for k in range(256)], "S16")
    places, numbers = runs.find(asked)
    for place, key in enumerate(asked.tolist()):
        assert numbers[places == place].tolist() == expected.get(key.ljust(16, b"\0"), [])
