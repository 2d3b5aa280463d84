"""Draws a run's loss curve: `python -m shoal.report.curve runs/NAME out.svg` (needs shoal[plots])."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from shoal.errors import RunError, ShoalError
from shoal.run.records import Evaluation, StepRecord, read_metrics


def draw_curve(run: Path, picture: Path) -> None:
    """Draw training and validation loss over tokens, from `metrics.jsonl`. Raises `RunError` if there are no steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ShoalError("drawing needs matplotlib: pip install 'shoal[plots]'") from None
    metrics = read_metrics(run / "metrics.jsonl")
    train, held_out = metrics.steps, metrics.evaluations
    if not train:
        raise RunError(f"{run / 'metrics.jsonl'} has no steps")
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        _millions(train), [r.loss for r in train], color="#9ecae1", linewidth=1.2, label="training, mean of a step"
    )
    axes.plot(
        _millions(held_out),
        [r.val_loss for r in held_out],
        color="#08519c",
        marker="o",
        markersize=4,
        label="validation, held-out documents",
    )
    if held_out:
        last = held_out[-1]
        text = f"{last.val_loss:.2f} nats/token\n{last.val_bits_per_byte:.2f} bits/byte"
        axes.annotate(
            text, (last.tokens / 1e6, last.val_loss), (-4, 44), textcoords="offset points", ha="right", fontsize=9
        )
    axes.set_xlabel("tokens trained on (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def _millions(records: Sequence[StepRecord] | Sequence[Evaluation]) -> list[float]:
    """Return the tokens trained on at each record, in millions."""
    return [r.tokens / 1e6 for r in records]


if __name__ == "__main__":
    try:
        draw_curve(Path(sys.argv[1]), Path(sys.argv[2]))
    except ShoalError as error:
        print(f"shoal: {error}", file=sys.stderr)
        sys.exit(2)
