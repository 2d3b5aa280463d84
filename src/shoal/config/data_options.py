"""The options of a run's data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shoal.config.option import opt


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents of one kind: where they are, and how to read them."""

    corpus: Literal["stdlib", "text", "jsonl", "datasets", "dummy"] = opt(
        "stdlib",
        "kind of corpus. stdlib: Python's own source code; text: text files and folders; jsonl: .jsonl and "
        ".jsonl.gz files; datasets: a dataset that Hugging Face's library reads; dummy: generated documents",
        alias=("dataset", "source"),
        past=True,
    )
    paths: tuple[str, ...] = opt(
        (),
        "files or folders of a corpus, also https:// and s3:// (downloaded once to data.folder); for datasets: OWNER/NAME or a folder",
        alias=("path", "files", "data_path"),
        past=True,
    )
    text_key: str = opt(
        "text", "field of each JSON line that holds its text", alias=("text_field", "text_column"), past=True
    )
    subset: str | None = opt(
        None,
        "with corpus datasets: subset (configuration) of the dataset; null: its only one",
        alias=("dataset_config", "config_name", "dataset_config_name"),
        past=True,
    )
    split: str = opt("train", "with corpus datasets: split to read, such as train, or train[:10%]", past=True)
    streaming: bool = opt(
        False, "with corpus datasets: read rows from the hub as they are needed, without keeping a copy of the dataset"
    )
    dummy_documents: int = opt(2_000, "number of documents in a dummy corpus", unit="documents", past=True, ge=2)


@dataclass(frozen=True, kw_only=True)
class Data(Source):
    """The corpus, its tokenizer, its token shards and the rows that training reads."""

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
    kept: Path | None = None  # not an option: the run's copy of the folder data.tokenizer, if that folder is gone
