"""The options of a run's data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from shoal.config.option import opt

Packing = Literal["stream", "best_fit"]

NAMED_TEMPLATES: Final = ("chatml", "alpaca", "llama3")
_PLACE: Final = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?) (steps|tokens)")


def is_built_in(tokenizer: str) -> bool:
    """Return whether `data.tokenizer` names no file or folder: bpe, bytes or tiktoken:NAME."""
    return tokenizer in ("bpe", "bytes") or tokenizer.startswith("tiktoken:")


def read_place(text: str) -> tuple[float, str] | None:
    """Return a place in a run, such as "1000 steps" or "2e9 tokens", as its number and its unit; None for any other text."""
    found = _PLACE.fullmatch(text.strip().replace(",", "").replace("_", ""))
    return (float(found[1]), found[2]) if found else None


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents of one kind: where they are, and how to read them."""

    corpus: Literal[
        "stdlib", "files", "text", "jsonl", "json", "csv", "parquet", "arrow", "datasets", "dummy", "tokens"
    ] = opt(
        "stdlib",
        "kind of corpus. stdlib: Python's own source code; files: files and folders, each file's format by its suffix; text, "
        "jsonl, json, csv, parquet, arrow: files of this format alone, whatever their suffix; datasets: a dataset that Hugging "
        "Face's library reads; dummy: generated documents; tokens: token files of other trainers",
        alias=("dataset", "source"),
        past=True,
    )
    paths: tuple[str, ...] = opt(
        (),
        "files, folders or patterns (data/*.parquet, data/**/*.txt) of a corpus of files, also https:// and s3:// (downloaded "
        "once to data.folder); for datasets: OWNER/NAME or a folder. A flag separates several by commas: --data.paths a,b",
        alias=("path", "files", "data_path"),
        past=True,
    )
    text_key: str = opt(
        "text",
        "field or column that holds the text of a record, or its conversation if not under messages or conversations",
        alias=("text_field", "text_column"),
        past=True,
    )
    format: Literal["text", "alpaca", "messages", "sharegpt"] = opt(
        "text",
        "content of each record. text: a document under data.text_key; alpaca: instruction, input and output; messages: a "
        "list of role and content; sharegpt: conversations, a list of from and value. All but text set data.document_mask "
        "to true by default",
        past=True,
    )
    template: str = opt(
        "auto",
        "text format of conversations. auto: the chat template in the folder data.tokenizer, or the Alpaca prompt for "
        "data.format alpaca without one; chatml, llama3 or alpaca: shoal's own; or the path of a .jinja file",
        alias=("chat_template", "prompt_template"),
        past=True,
    )
    broken_conversations: Literal["drop", "keep"] = opt(
        "drop",
        "what happens to conversations that begin with the answer, do not alternate, have an empty message, end without an "
        "answer or repeat an id; both count them",
        past=True,
    )
    learn: Literal["answers", "all"] = opt(
        "answers",
        "tokens of a conversation that count in the loss. answers: the model's own messages, and messages with a flag "
        "(train, loss_weight or loss_mask); all: every token, whatever the flags",
        alias=("train_on",),
        akin=("train_on_inputs", "train_on_prompt", "mask_prompt", "assistant_only_loss", "completion_only_loss"),
        past=True,
    )
    separator: str = opt(
        "",
        "text of the lines that separate the documents of a text file, such as <|endoftext|>; empty: a file is a document",
        alias=("document_separator",),
        past=True,
    )
    wikitext: bool = opt(
        False,
        "join lines or records of WikiText into pages: a document is from one ` = Title = ` line to the next",
        past=True,
    )
    subset: str | None = opt(
        None,
        "with corpus datasets: subset (configuration) of the dataset; null: its only one",
        alias=("dataset_config", "config_name", "dataset_config_name"),
        past=True,
    )
    split: str = opt("train", "with corpus datasets: split to read, such as train, or train[:10%]", past=True)
    val_split: str | None = opt(
        None,
        "with corpus datasets: split to hold out for validation, such as validation; null: hold out data.val_fraction of "
        "data.split",
        alias=("eval_split",),
        past=True,
    )
    streaming: bool = opt(
        False, "with corpus datasets: read rows from the hub as they are needed, without keeping a copy of the dataset"
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
        "files, folders or patterns to hold out for validation, of the kind of data.paths; all documents of data.paths are then "
        "trained on. Without it, data.val_fraction of the documents are held out; of a tokens corpus, the last ones",
        alias=("val_path", "val_data_path", "valid_data_path"),
        past=True,
    )
    deduplicate: Literal["none", "exact", "near"] = opt(
        "none",
        "documents to remove if an earlier one has the same text. none: keep all; exact: the same text; near: also "
        "similar texts, by MinHash (data.near_threshold)",
        alias=("dedup", "deduplication"),
        past=True,
    )
    near_threshold: float = opt(
        0.8,
        "similarity from which two documents are near duplicates: the Jaccard index of their sets of five-word phrases",
        alias=("jaccard_threshold", "minhash_threshold"),
        past=True,
        gt=0,
        le=1,
    )
    decontaminate: tuple[str, ...] = opt(
        (),
        "evaluation sets (.txt or .jsonl files): documents that share data.decontaminate_ngram consecutive words with one "
        "are removed",
        alias=("decontamination",),
        past=True,
    )
    decontaminate_ngram: int = opt(
        13,
        "number of consecutive words that a document may not share with an evaluation set",
        unit="words",
        alias=("ngram_size",),
        past=True,
        ge=1,
    )
    shortest_document: int = opt(
        0,
        "minimum size of a document's text in UTF-8; shorter ones are removed; 0 keeps all",
        unit="bytes",
        alias=("min_length", "min_document_length"),
        past=True,
        ge=0,
    )
    longest_document: int = opt(
        0,
        "maximum size of a document's text in UTF-8; longer ones are removed; 0 keeps all",
        unit="bytes",
        alias=("max_document_length",),
        past=True,
        ge=0,
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
    packing: Packing = opt(  # noqa: RUF009
        "stream",
        "how documents fill rows. stream: end to end, cut at the end of a row; best_fit: whole documents, longer ones than "
        "a row in parts, and padding without a loss",
        past=True,
    )
    val_fraction: float = opt(
        0.05,
        "fraction of documents held out for validation, chosen by their content",
        alias=("validation_split", "test_size"),
        past=True,
        gt=0,
        lt=1,
    )
    bad_records: int = opt(
        1000,
        "maximum number of damaged records to skip (not JSON, not UTF-8, wrong type); one more ends preparation. A lost part "
        "of a file, such as the rest of a compressed file that was cut off, counts as 1,001",
        unit="records",
        alias=("max_bad_records",),
        ge=0,
    )
    folder: str = opt("data", "folder for prepared tokens", alias=("cache_dir", "cache", "out_dir"))
    shard_tokens: int = opt(16_777_216, "approximate size of one token shard", unit="tokens", past=True, ge=1024)
    rebuild: bool = opt(
        False,
        "prepare the tokens again if the corpus has changed since, and keep the old ones in another folder; false: end with an error then",
    )
    prefetch: int = opt(
        2, "number of steps to read ahead", unit="steps", alias=("prefetch_factor",), akin=("num_workers",), ge=1
    )
    max_quarantined: int = opt(
        0,
        "maximum number of rows that cannot be read (altered tokens, a disk error): a training row is replaced by another row "
        "of its source, a held-out row is skipped; 0: the first one ends the run",
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
    # not an option: the run's copy of data.tokenizer, if its folder is gone, or if a blend trained it, or if it is tiktoken's
    kept: Path | None = None
    # not an option itself: the sources of a blend by name; data.sources.NAME has the options of `BlendSource`
    sources: Mapping[str, BlendSource] | None = None


def known_vocabulary(data: Data) -> int | None:
    """Return the vocabulary size of `data.tokenizer`; None for a tokenizer in a file. bytes: 256 and the end of a document."""
    return {"bytes": 257, "bpe": data.tokenizer_vocab_size}.get(data.tokenizer)
