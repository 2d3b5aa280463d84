"""The options of a run's data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from shoal.config.option import opt

_PLACE: Final = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?) (steps|tokens)")


def read_place(text: str) -> tuple[float, str] | None:
    """Return a place in a run, such as "1000 steps" or "2e9 tokens", as its number and its unit; None for any other text."""
    found = _PLACE.fullmatch(text.strip().replace(",", "").replace("_", ""))
    return (float(found[1]), found[2]) if found else None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents of one kind: where they are, and how to read them."""

    corpus: Literal["stdlib", "text", "jsonl", "dummy", "tokens"] = opt(
        "stdlib",
        "kind of corpus. stdlib: Python's own source code; text: text files and folders; jsonl: .jsonl and "
        ".jsonl.gz files; dummy: generated documents; tokens: token files of other trainers",
        alias=("dataset", "source"),
        past=True,
    )
    paths: tuple[str, ...] = opt(
        (), "files or folders of a text, jsonl or tokens corpus", alias=("path", "files", "data_path"), past=True
    )
    text_key: str = opt(
        "text", "field of each JSON line that holds its text", alias=("text_field", "text_column"), past=True
    )
    dummy_documents: int = opt(2_000, "number of documents in a dummy corpus", unit="documents", past=True, ge=2)
    token_format: Literal["auto", "nanogpt", "llm.c", "megatron", "raw"] = opt(
        "auto",
        "format of the files of a tokens corpus. auto: by name and header; nanogpt: .bin without a header; llm.c: .bin with its "
        "header; megatron: .bin with an .idx; raw: .npy or .ds of OLMo, dolma or datatrove",
        past=True,
    )
    token_type: Literal["auto", "uint16", "uint32", "int32"] = opt(
        "auto",
        "type of the ids in token files without a header. auto: uint16 for a vocabulary of up to 65,536, else uint32",
        past=True,
    )
    val_paths: tuple[str, ...] = opt(
        (),
        "token files or folders that are held out. Without it, the last documents of a tokens corpus are, about "
        "data.val_fraction of the tokens",
        alias=("val_path", "val_data_path", "valid_data_path"),
        past=True,
    )


@dataclass(frozen=True, kw_only=True)
class BlendSource(Source):
    """A source of a blend, and how much of it is read."""

    weight: float | None = opt(
        None,
        "share of this source in the training rows, relative to the other weights; null for all sources: each row once "
        "per epoch",
        alias=("proportion", "probability"),
        ge=0,
    )
    max_epochs: float | None = opt(
        None, "maximum number of times that this source is read; the others then keep their ratio", past=True, gt=0
    )


@dataclass(frozen=True, kw_only=True)
class Data(Source):
    """The corpus, its tokenizer, its token shards and the rows that training reads."""

    stages: Mapping[str, Mapping[str, float]] | None = opt(
        None,
        "other weights of the sources from a place of the run on, such as {1000 steps: {web: 0.2, code: 0.8}}; the place is "
        "in steps or tokens",
        alias=("curriculum",),
    )
    tokenizer: str = opt(
        "bpe",
        "bpe: train a BPE tokenizer on the corpus; bytes: one token per byte; tiktoken:NAME; the path of a "
        "tokenizer.json or tokenizer.model; or a model's folder or name",
        alias=("tokenizer_path", "tokenizer_name"),
        past=True,
    )
    tokenizer_vocab_size: int = opt(
        4096, "vocabulary size of a BPE tokenizer trained on the corpus", unit="tokens", past=True, ge=257
    )
    tokenizer_sample_bytes: int = opt(
        64_000_000, "maximum amount of text used to train a BPE tokenizer", unit="bytes", past=True, ge=1
    )
    seq_len: int = opt(
        512,
        "length of one training sequence (row)",
        unit="tokens",
        alias=("sequence_length", "seq_length", "block_size", "context_length", "max_length"),
        past=True,
        ge=1,
    )
    document_mask: bool = opt(
        False,
        "restrict attention to tokens of the same document",
        alias=("intra_document_masking", "reset_attention_mask"),
        past=True,
    )
    val_fraction: float = opt(
        0.05,
        "fraction of documents held out for validation, chosen by their content",
        alias=("validation_split", "val_split", "test_size"),
        past=True,
        gt=0,
        lt=1,
    )
    folder: str = opt("data", "folder for prepared tokens", alias=("cache_dir", "cache", "out_dir"))
    shard_tokens: int = opt(16_777_216, "approximate size of one token shard", unit="tokens", past=True, ge=1024)
    rebuild: bool = opt(
        False,
        "prepare the tokens again if the corpus has changed since they were prepared; false: end with an error then",
    )
    prefetch: int = opt(
        2, "number of steps to read ahead", unit="steps", alias=("prefetch_factor",), akin=("num_workers",), ge=1
    )
    max_quarantined: int = opt(
        0,
        "maximum number of rows that cannot be read (altered tokens, a disk error) and are each replaced by another row of "
        "their source; 0: the first one ends the run",
        unit="rows",
        ge=0,
    )
    stuck_seconds: float = opt(
        300.0,
        "longest time to wait for a step's rows before the reading thread is replaced; shorter once the usual time is known: "
        "10 times the slowest recent read, at least 10 s; 0 disables",
        unit="s",
        ge=0,
    )
    kept: Path | None = None  # not an option: the run's copy of the folder data.tokenizer, if that folder is gone
    # not an option itself: the sources of a blend by name; data.sources.NAME has the options of `BlendSource`
    sources: Mapping[str, BlendSource] | None = None
