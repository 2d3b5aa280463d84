"""
Times one run of transformers.Trainer: `python -m shoal.bench.trainer_worker CONFIG ANSWER`.

Architecture, batch, sequence length, threads, dtype, compilation, activation checkpointing, peak learning rate, weight decay and
clipping are as in shoal's run. All other options have the defaults of transformers, without saving and logging.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from shoal.bench.steps import summarize_steps
from shoal.config.options import Config, Model
from shoal.config.presets import resolve_shape
from shoal.data.dataset import open_data
from shoal.hub.shape import write_shape
from shoal.resolve.resolve import read_back
from shoal.run.console import Console


def main(recipe: Path, answer: Path) -> None:
    """Train a model of `recipe`'s shape on random tokens; write the median step time and tokens/s."""
    config = read_back(recipe)
    train, threads = config.train, config.launch.threads
    if threads:
        torch.set_num_threads(threads)
    vocab = config.model.vocab_size or open_data(config.data, Console(speaks=False)).vocab_size
    model = AutoModelForCausalLM.from_config(peer_config(config.model, vocab))  # type: ignore[no-untyped-call]
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=train.steps or 12,
            per_device_train_batch_size=train.micro_batch,
            gradient_accumulation_steps=train.global_batch // train.micro_batch,
            bf16=train.dtype == "bfloat16",
            use_cpu=train.device == "cpu" or not torch.cuda.is_available(),
            torch_compile=train.compile,
            gradient_checkpointing=train.activation_checkpointing == "full",
            learning_rate=config.optim.lr,
            weight_decay=config.optim.weight_decay,
            max_grad_norm=config.optim.clip_norm,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        rows = _Rows(config, vocab)
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock]).train()
    result = summarize_steps(clock.seconds, train.global_batch * config.data.seq_len)
    answer.write_text(json.dumps(result), encoding="utf-8")


def peer_config(model: Model, vocab_size: int) -> PretrainedConfig:
    """Return a transformers config with the architecture of `model`."""
    shape = resolve_shape(dataclasses.replace(model, vocab_size=vocab_size))
    return AutoConfig.for_model(**write_shape(shape))


class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of random tokens. They need no reading from disk, and training on them takes as long as on text."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        rows = (config.train.steps or 12) * config.train.global_batch
        self._tokens = torch.randint(
            vocab_size, (rows, config.data.seq_len), generator=torch.Generator().manual_seed(0)
        )

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._tokens[index], "labels": self._tokens[index]}


class _Clock(TrainerCallback):
    """Measures the seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
