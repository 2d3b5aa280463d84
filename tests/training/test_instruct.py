"""Training on the answers of Alpaca's records, against a loop with transformers' model and torch's AdamW."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from shoal.config.options import Config
from shoal.data.order.order import sample_at
from shoal.infer.chat import Chat
from shoal.infer.load import load_path
from shoal.models.sampling import Sampling
from shoal.resolve.resolve import resolve
from shoal.run.records import read_metrics
from shoal.training.loop import complete
from shoal.training.run import Run
from tests.data.chats import alpaca_records, write_lines
from tests.hub import small
from tests.training.test_equivalence import ALONE, NeverStop

STEPS, BATCH, SEQ_LEN, END = 20, 4, 96, 256
LR, DECAY, CLIP = 3e-3, 0.1, 1.0
TASK = "Below is an instruction that describes a task"
CONTEXT = ", paired with an input that provides further context"
REQUEST = ". Write a response that appropriately completes the request.\n\n### Instruction:\n"


def config_in(folder: Path, weights: Path, corpus: Path) -> Config:
    options: dict[str, Any] = {
        "model.from": weights, "data.paths": corpus, "data.format": "alpaca", "data.tokenizer": "bytes",
        "data.seq_len": SEQ_LEN, "data.folder": folder / "data", "train.steps": STEPS, "train.global_batch": BATCH,
        "train.micro_batch": 2, "train.dtype": "float32", "optim.lr": LR, "optim.warmup_steps": 0,
        "optim.schedule": "constant", "optim.weight_decay": DECAY, "optim.clip_norm": CLIP, "launch.runs": folder / "runs",
        "metrics.peak_tflops": 1.0,
    }  # fmt: skip
    return resolve(None, [(key, str(value), "test") for key, value in options.items()]).config


def document(record: dict[str, str]) -> tuple[list[int], list[int]]:
    """Return the tokens of a record and, for each, the label it is to have: itself in the answer, else -100."""
    given = f"\n\n### Input:\n{record['input']}" if record["input"] else ""
    prompt = f"{TASK}{CONTEXT if given else ''}{REQUEST}{record['instruction']}{given}\n\n### Response:"
    before, answer = list(prompt.encode()), [*record["output"].encode(), END]
    return [*before, *answer], [-100] * len(before) + answer


def rows_of(records: list[dict[str, str]]) -> list[dict[str, torch.Tensor]]:
    """Return rows of SEQ_LEN tokens, documents end to end, with the mask of attention."""
    documents = [document(record) for record in records]
    tokens = torch.tensor([t for ids, _ in documents for t in ids])
    labels = torch.tensor([t for _, learned in documents for t in learned])
    owner = torch.tensor([n for n, (ids, _) in enumerate(documents) for _ in ids])
    rows = []
    for at in range(0, len(tokens) - SEQ_LEN, SEQ_LEN):
        mine = owner[at : at + SEQ_LEN]
        visible = (mine[:, None] == mine[None]) & torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
        rows.append({
            "input_ids": tokens[at : at + SEQ_LEN], "labels": labels[at + 1 : at + SEQ_LEN + 1],
            "attention_mask": torch.zeros(1, SEQ_LEN, SEQ_LEN).masked_fill(~visible, torch.finfo(torch.float32).min),
            "position_ids": torch.arange(SEQ_LEN) - torch.searchsorted(mine, mine),
        })  # fmt: skip
    return rows


def their_losses(model: Any, rows: list[dict[str, torch.Tensor]], order: list[list[int]]) -> list[float]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for numbers in order:
        batch = {key: torch.stack([rows[n][key] for n in numbers]) for key in rows[0]}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_twenty_steps_equal_those_of_transformers(tmp_path: Path) -> None:
    weights = small.save("llama", tmp_path / "weights")
    records = [
        {**record, "output": record["output"] * 4} for record in alpaca_records(150)
    ]  # some answer in every step
    config = config_in(tmp_path, weights, write_lines(tmp_path / "alpaca.jsonl", records))
    assert config.data.document_mask, "derived from data.format"
    assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (0.9, 0.95, 1e-8)
    run = Run.open(config, ALONE, NeverStop())
    complete(run)
    run.close()
    metrics, counts = read_metrics(run.folder.metrics_file), run.dataset.counts["val"]
    ours, held = [record.loss for record in metrics.steps], metrics.evaluations[-1]
    per_byte = held.val_loss * counts.learned_tokens / counts.learned_bytes / math.log(2)
    assert math.isclose(held.val_bits_per_byte, per_byte), "of the answers alone"

    held_out = {bytes(t for t in ids if t < END).decode() for ids in _documents(run.dataset.parts[""].streams["val"])}
    trained = [r for r in records if bytes(t for t in document(r)[0] if t < END).decode() not in held_out]
    assert 0 < len(held_out) == len(records) - len(trained)
    rows = rows_of(trained)
    order = [sample_at(config.train.seed, range(s * BATCH, (s + 1) * BATCH), len(rows)).tolist() for s in range(STEPS)]
    theirs = their_losses(small.load(weights).train(), rows, order)
    assert len(ours) == len(theirs) == STEPS
    assert all(abs(a - b) < 1e-5 for a, b in zip(ours, theirs, strict=True))
    assert theirs[-1] < theirs[0] - 1

    chat = Chat.of(load_path(run.folder.path, device="cpu"), system=None, max_new_tokens=1, sampling=Sampling())
    prompt = chat.template.render([{"role": "user", "content": "Why?"}])
    assert prompt == f"{TASK}{REQUEST}Why?\n\n### Response:", "the run's folder has the prompt"
    assert chat.model.end_ids == {END}


def _documents(stream: Any) -> list[list[int]]:
    starts = [*stream.starts(0, stream.num_tokens).tolist(), stream.num_tokens]
    return [stream.read(a, b).tolist() for a, b in pairwise(starts)]
