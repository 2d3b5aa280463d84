"""The options of a run's data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from shoal.config.option import opt

NAMED_TEMPLATES: Final = ("chatml", "alpaca", "llama3")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents of one kind: where they are, and how to read them."""

    corpus: Literal["stdlib", "text", "jsonl", "dummy"] = opt(
        "stdlib",
        "kind of corpus. stdlib: Python's own source code; text: text files and folders; jsonl: .jsonl and "
        ".jsonl.gz files; dummy: generated documents",
        alias=("dataset", "source"),
        past=True,
    )
    paths: tuple[str, ...] = opt(
        (), "files or folders of a text or jsonl corpus", alias=("path", "files", "data_path"), past=True
    )
    text_key: str = opt(
        "text",
        "field of each JSON line that holds its text, or its conversation if not under messages or conversations",
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
