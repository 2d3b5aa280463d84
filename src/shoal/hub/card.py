"""The model card of an export: its data, training length, losses and license. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from shoal.config.options import Config
from shoal.hub.find import could_be_on_a_hub

CARD: Final = "README.md"
CURVE_POINTS = 12
_TAG: Final = "- shoal"
_CORPORA = {
    "stdlib": "the source of Python's standard library",
    "text": "text files",
    "files": "files",
    "jsonl": "JSON lines",
    "json": "JSON files",
    "csv": "csv files",
    "parquet": "parquet files",
    "arrow": "Arrow files",
    "dummy": "generated words",
    "tokens": "token files",
}


class TrainingLoss(Protocol):
    """The loss of a training step, as `metrics.jsonl` records it."""

    @property
    def step(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def loss(self) -> float: ...


class HeldOutLoss(Protocol):
    """The loss on held-out text, as `metrics.jsonl` records it."""

    @property
    def step(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def val_loss(self) -> float: ...
    @property
    def val_bits_per_byte(self) -> float: ...


@dataclass(frozen=True)
class Facts:
    """The content of a card that is not in the config."""

    name: str
    architecture: str
    parameters: int
    dtype: str
    step: int
    tokens: int
    license: str | None
    steps: Sequence[TrainingLoss]  # of metrics.jsonl
    evaluations: Sequence[HeldOutLoss]
    version: str  # of shoal


def is_card(path: Path) -> bool:
    """Return whether `model_card` wrote the file `path`."""
    try:
        return _TAG in path.read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return False


def model_card(config: Config, facts: Facts) -> str:
    """Return the text of `README.md`, with the header that model hubs read."""
    return "\n".join([*_header(config, facts), *_text(config, facts), *_curve(facts), ""])


def _header(config: Config, facts: Facts) -> list[str]:
    lines = [
        "---",
        f"license: {json.dumps(facts.license or 'other', ensure_ascii=False)}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
    ]
    if (
        config.model.from_ is not None
        and could_be_on_a_hub(config.model.from_)
        and not Path(config.model.from_).is_dir()
    ):
        lines.append(f"base_model: {config.model.from_}")
    return [*lines, "tags:", _TAG, "---", ""]


def _text(config: Config, facts: Facts) -> list[str]:
    train, data = config.train, config.data
    origin = f"weights of `{config.model.from_}`" if config.model.from_ else f"random weights (seed {train.seed})"
    corpus = _CORPORA[data.corpus] + (f" ({', '.join(f'`{p}`' for p in data.paths)})" if data.paths else "")
    return [
        f"# {facts.name}",
        "",
        f"{facts.architecture}, {facts.parameters:,} parameters, stored in {facts.dtype}. Trained with shoal {facts.version}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| started from | {origin} |",
        f"| data | {corpus}, tokenizer `{data.tokenizer}` |",
        f"| trained for | {facts.step:,} steps, {facts.tokens:,} tokens |",
        f"| rows | {data.seq_len} tokens, {train.global_batch} a step |",
        f"| optimizer | {config.optim.name}, peak learning rate {config.optim.lr:g}, {config.optim.schedule} |",
        f"| trained in | {train.dtype}; weights, optimizer state and gradients in float32 |",
        f"| license | {facts.license or 'not stated: ask whoever trained it, and see the data above'} |",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
        "```",
        "",
    ]


def _curve(facts: Facts) -> list[str]:
    """Return a table of training and validation loss at evenly chosen steps."""
    losses = {r.step: r for r in facts.steps if r.step <= facts.step}
    held_out = {r.step: r for r in facts.evaluations if r.step <= facts.step}
    if not losses and not held_out:
        return []
    chosen = sorted({*_evenly(sorted(losses)), *_evenly(sorted(held_out))})
    rows = [
        f"| {step:,} | {(losses.get(step) or held_out[step]).tokens:,} | {_number(losses.get(step), 'loss')} "
        f"| {_number(held_out.get(step), 'val_loss')} | {_number(held_out.get(step), 'val_bits_per_byte')} |"
        for step in chosen
    ]
    head = ["| step | tokens | loss (nats/token) | held-out loss (nats/token) | held-out bits/byte |"]
    return ["## Curve", "", *head, "| --- | --- | --- | --- | --- |", *rows]


def _evenly(steps: Sequence[int]) -> list[int]:
    """Return at most `CURVE_POINTS` of `steps`, with the first and the last."""
    if len(steps) <= CURVE_POINTS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]


def _number(record: TrainingLoss | HeldOutLoss | None, key: str) -> str:
    return f"{getattr(record, key):.4f}" if record else ""
