"""Small files with the shape of the public datasets that `shoal fetch data` knows, as their hub serves them."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

SENTENCE = "the tide came in and a small boat found its way past old stones to one quiet harbor before night fell"
WORDS = SENTENCE.split()
END = "<|endoftext|>"


def texts(count: int, seed: int, words: int = 40) -> list[str]:
    """Return different texts of up to this many words; some have paragraphs."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        said = [draw.choice(WORDS) for _ in range(draw.randint(5, words))]
        said[len(said) // 2] += ".\n\n" if number % 3 == 0 else "."
        found.append(f"{seed} {number} {' '.join(said)}.")
    return found


def parquet(columns: dict[str, Sequence[Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), sink, row_group_size=50)
    return sink.getvalue()


def separated(documents: Sequence[str]) -> bytes:
    """Return one text, with a line between documents, as the files of TinyStories are."""
    return "".join(f"{document}\n{END}\n" for document in documents).encode()


def wikitext(pages: int, seed: int) -> list[str]:
    """Return WikiText's rows: each a line of a page, empty rows as blank lines."""
    rows = []
    for number, text in enumerate(texts(pages, seed, words=60)):
        first, *rest = text.split("\n\n")
        rows += ["", f" = Page {number} = \n", "", f" {first} 1 @,@ 000 boats . \n", "", " = = Later = = \n", ""]
        rows += [f" {part} \n" for part in rest]
    return rows


def fineweb_edu(count: int, seed: int) -> dict[str, Sequence[Any]]:
    """Return the columns of FineWeb-Edu."""
    numbers, found = range(count), texts(count, seed)
    return {
        "text": found, "id": [f"<urn:uuid:{n}>" for n in numbers], "dump": ["CC-MAIN-2024-10"] * count,
        "url": [f"https://example.org/{n}" for n in numbers], "file_path": ["s3://commoncrawl/x.warc.gz"] * count,
        "language": ["en"] * count, "language_score": [0.9] * count, "token_count": [len(t) // 4 for t in found],
        "score": [3.1] * count, "int_score": [3] * count,
    }  # fmt: skip


def alpaca(count: int, seed: int) -> dict[str, Sequence[Any]]:
    """Return the columns of Alpaca; its column `text` holds the whole prompt."""
    asked, answers = texts(count, seed, words=12), texts(count, seed + 1, words=20)
    inputs = [WORDS[n % len(WORDS)] if n % 3 == 0 else "" for n in range(count)]
    whole = [f"Below is an instruction.\n\n{a}\n\n{b}" for a, b in zip(asked, answers, strict=True)]
    return {"instruction": asked, "input": inputs, "output": answers, "text": whole}


def datasets() -> dict[str, dict[str, bytes]]:
    """Return the files of each repository; some are not to be fetched."""
    lines = "".join(json.dumps({"text": t, "meta": {"pile_set_name": "Books"}}) + "\n" for t in texts(60, 11)).encode()
    made = {
        "roneneldan/TinyStories": {
            "data/train-00000-of-00002-2d5a.parquet": parquet({"text": texts(60, 1)}),
            "data/train-00001-of-00002-5852.parquet": parquet({"text": texts(60, 2)}),
            "data/validation-00000-of-00001-869c.parquet": parquet({"text": texts(9, 3)}),
            "TinyStoriesV2-GPT4-train.txt": separated(texts(120, 4)),
            "TinyStoriesV2-GPT4-valid.txt": separated(texts(9, 5)),
            "TinyStories_all_data.tar.gz": b"\x1f\x8b",
        },
        "Salesforce/wikitext": {
            "wikitext-103-raw-v1/train-00000-of-00002.parquet": parquet({"text": wikitext(15, 6)}),
            "wikitext-103-raw-v1/train-00001-of-00002.parquet": parquet({"text": wikitext(15, 7)}),
            "wikitext-103-raw-v1/validation-00000-of-00001.parquet": parquet({"text": wikitext(3, 8)}),
            "wikitext-103-raw-v1/test-00000-of-00001.parquet": parquet({"text": wikitext(3, 8)}),
            "wikitext-2-raw-v1/train-00000-of-00001.parquet": parquet({"text": wikitext(3, 8)}),
        },
        "Skylion007/openwebtext": {
            f"plain_text/train-0000{n}-of-00002.parquet": parquet({"text": texts(40, 9 + n)}) for n in range(2)
        },
        "stanford-cs336/owt-sample": {
            "owt_train.txt.gz": gzip.compress(separated(texts(60, 12))),
            "owt_valid.txt.gz": gzip.compress(separated(texts(9, 13))),
        },
        "HuggingFaceFW/fineweb-edu": {
            f"sample/10BT/00{n}_00000.parquet": parquet(fineweb_edu(40, 14 + n)) for n in range(2)
        } | {"data/CC-MAIN-2024-10/train-00000-of-00020.parquet": b"PAR1"},
        "monology/pile-uncopyrighted": {
            "train/00.jsonl.zst": zstandard.compress(lines), "val.jsonl.zst": zstandard.compress(lines[:0]),
            "train/01.jsonl.zst": b"",
        },
        "tatsu-lab/alpaca": {"data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(alpaca(60, 16))},
    }  # fmt: skip
    return {name: {"README.md": b"---\nlicense: mit\n---\n", **files} for name, files in made.items()}
