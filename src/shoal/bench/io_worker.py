"""
Times data: `python -m shoal.bench.io_worker CONFIG ANSWER read RANKS`, or `... tokenizer`, or `... prepare`.

read: batches of one of RANKS data-parallel ranks. tokenizer: all texts of the corpus from memory, by the fastest tokenizer that
is installed. prepare: token shards of the same corpus, with the same tokenizer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch

from shoal.bench.environment import facts
from shoal.bench.worker_process import answering
from shoal.config.data_options import Data
from shoal.config.options import Config
from shoal.data.corpus.documents import Document
from shoal.data.corpus.sources import open_corpus
from shoal.data.dataset import new_order, open_data
from shoal.data.encode import CHUNK_BYTES
from shoal.data.loader import Loader
from shoal.data.prepare import prepare
from shoal.data.stored.manifest import TOKENIZER
from shoal.data.tokens.fastokens import fast_encoder
from shoal.metrics.memory import peak_bytes
from shoal.resolve.resolve import read_back
from shoal.run.console import Console
from shoal.system.signals import die_with_parent

CPU: Final = torch.device("cpu")
SECONDS: Final = 1.0  # of reading batches
FEWEST: Final = 10  # steps that are read


def main(recipe: Path, answer: Path, what: str, ranks: int) -> None:
    """Measure, and write the figures."""
    die_with_parent()
    config = read_back(recipe)
    with answering(answer):
        match what:
            case "read":
                found = _read(config, ranks)
            case "tokenizer":
                found = _encode(_with_tokenizer(config.data))
            case _:
                found = _prepare(_with_tokenizer(config.data))
        found["memory_bytes"] = peak_bytes(CPU)
        answer.write_text(json.dumps(found | {"about": facts(CPU)}), encoding="utf-8")


def _read(config: Config, ranks: int) -> dict[str, object]:
    """Return the tokens per second of the first rank's batches."""
    train, rows = config.train, open_data(config.data, Console(speaks=False)).rows("train")
    order = new_order(config.data, rows.sizes, train.seed, train.global_batch)
    loader = Loader(
        rows, order, global_batch=train.global_batch, micro_batch=train.micro_batch, dp_rank=0, dp_size=ranks,
        prefetch=config.data.prefetch,
    )  # fmt: skip
    for _ in range(1 + config.data.prefetch):  # these were read before the clock starts
        loader.next_step()
    tokens, steps, begun = 0, 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < SECONDS or steps < FEWEST:
        tokens += sum(batch.tokens.numel() for batch in loader.next_step())
        steps += 1
    loader.close()
    return {"tokens_per_second": tokens / spent}


def _with_tokenizer(data: Data) -> Data:
    """Return the options with the tokenizer that was trained for them, if they train one: only encoding is timed."""
    if data.tokenizer != "bpe":
        return data
    return dataclasses.replace(data, tokenizer=str(prepare(data).folder / TOKENIZER))


def _encode(data: Data) -> dict[str, object]:
    """Return the bytes of text per second of the tokenizer alone."""
    tokenizer = prepare(data).tokenizer
    texts = [item.text for item in open_corpus(data).read() if isinstance(item, Document)]
    fast = fast_encoder(tokenizer)
    begun = time.perf_counter()
    for batch in _batches(texts):
        if fast is not None:
            fast.encode_batch(batch, 0)
        else:
            tokenizer.encode_batch(batch)
    seconds = time.perf_counter() - begun
    return {
        "bytes_per_second": sum(len(text.encode()) for text in texts) / seconds,
        "library": "fastokens" if fast is not None else "bytes" if tokenizer.ids_are_bytes else "tokenizers",
    }


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _prepare(data: Data) -> dict[str, object]:
    """Return the bytes of text and the tokens per second of preparing the corpus, in a folder of its own."""
    with tempfile.TemporaryDirectory(dir=Path(sys.argv[2]).parent) as folder:
        begun = time.perf_counter()
        prepared = prepare(dataclasses.replace(data, folder=folder, rebuild=False))
        seconds = time.perf_counter() - begun
        counts = prepared.counts.values()
        size = sum(c.text_bytes for c in counts)
        return {
            "text_bytes": size,
            "bytes_per_second": size / seconds,
            "tokens_per_second": sum(c.tokens for c in counts) / seconds,
        }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    sys.stdout.flush()
    os._exit(0)
