"""
The datasets that `shoal fetch data` knows by a short name: where they are, what they hold, their licenses. No torch.

Sizes are those that the hubs stated when this table was written; a fetch prints the size that the hub states now.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from shoal.hub.record import DATASETS


@dataclass(frozen=True)
class Dataset:
    """A dataset in files on a hub. Patterns are those of `fnmatch`, compared with paths in the repository."""

    repository: str
    files: tuple[str, ...]  # for training
    kind: Literal["parquet", "jsonl", "text"]
    license: str
    bytes: int  # of all files together, about
    held_out: tuple[str, ...] = ()  # for validation
    config: str | None = None  # what the library `datasets` calls these files
    split: str = "train"
    column: str | None = "text"  # the field of a record that holds its text; None: several fields
    note: str = ""

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.files + self.held_out

    @property
    def folder(self) -> Path:
        return DATASETS / self.repository


CATALOG: Final = MappingProxyType({
    "tinystories": Dataset(
        "roneneldan/TinyStories", ("data/train-*.parquet",), "parquet", "cdla-sharing-1.0", 1_010_000_000,
        held_out=("data/validation-*.parquet",), note="2.1 million short stories",
    ),
    "tinystories-text": Dataset(
        "roneneldan/TinyStories", ("TinyStoriesV2-GPT4-train.txt",), "text", "cdla-sharing-1.0", 2_250_000_000,
        held_out=("TinyStoriesV2-GPT4-valid.txt",), column=None,
        note="2.7 million short stories by GPT-4, separated by lines <|endoftext|>",
    ),
    "wikitext-103": Dataset(
        "Salesforce/wikitext", ("wikitext-103-raw-v1/train-*.parquet",), "parquet", "cc-by-sa-3.0", 315_000_000,
        held_out=("wikitext-103-raw-v1/validation-*.parquet", "wikitext-103-raw-v1/test-*.parquet"),
        config="wikitext-103-raw-v1", note="Wikipedia articles; a row is a line",
    ),
    "openwebtext": Dataset(
        "Skylion007/openwebtext", ("plain_text/*.parquet",), "parquet", "cc0-1.0", 24_200_000_000,
        config="plain_text", note="8 million web pages, 9 billion tokens",
    ),
    "openwebtext-sample": Dataset(
        "stanford-cs336/owt-sample", ("owt_train.txt.gz",), "text", "not stated", 4_700_000_000,
        held_out=("owt_valid.txt.gz",), column=None, note="12 GB of text, separated by <|endoftext|>",
    ),
    "fineweb-edu": Dataset(
        "HuggingFaceFW/fineweb-edu", ("sample/10BT/*.parquet",), "parquet", "odc-by", 28_500_000_000,
        config="sample-10BT", note="educational web pages, the sample of 10 billion tokens",
    ),
    "pile": Dataset(
        "monology/pile-uncopyrighted", ("train/00.jsonl.zst",), "jsonl", "other", 11_700_000_000,
        held_out=("val.jsonl.zst",), note="the first of 30 files of the Pile without its copyrighted parts",
    ),
    "alpaca": Dataset(
        "tatsu-lab/alpaca", ("data/train-*.parquet",), "parquet", "cc-by-nc-4.0", 24_200_000, column=None,
        note="52 thousand instructions with answers: instruction, input, output",
    ),
})  # fmt: skip


def close_datasets(name: str) -> list[str]:
    """Return the names in the catalog that are spelled like `name`, or whose repository is."""
    known: dict[str, dict[str, None]] = {}
    for key, dataset in CATALOG.items():
        for spelling in (key, dataset.repository, dataset.repository.rpartition("/")[2]):
            known.setdefault(spelling.lower(), {})[key] = None
    near = [c for n in (name, name.rpartition("/")[2]) for c in difflib.get_close_matches(n.lower(), known)]
    return list(dict.fromkeys(key for spelling in near for key in known[spelling]))


def fetched_by(path: str) -> str:
    """Return the command that fetches a missing `path` of a dataset; "" if it is not in a folder of datasets."""
    parts = Path(path).parts
    if len(parts) < 3 or parts[0] != DATASETS.name:
        return ""
    repository, file = "/".join(parts[1:3]), "/".join(parts[3:])
    for name, dataset in CATALOG.items():
        if dataset.repository == repository and any(_overlap(file, pattern) for pattern in dataset.patterns):
            return f"shoal fetch data {name}"
    return f"shoal fetch data hf:{repository}"


def _overlap(file: str, pattern: str) -> bool:
    """Return whether a path, or a pattern, names files of `pattern`. No file: the whole folder does."""
    return not file or file == pattern or fnmatch.fnmatchcase(file, pattern) or pattern.startswith(f"{file}/")
