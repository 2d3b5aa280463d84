"""Timed training steps as rows of a result, and as the tables that people publish. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from shoal.bench.result import Result, Row
from shoal.bench.table import gathered, number, spread, table
from shoal.bench.trial import WARMUP_STEPS
from shoal.config.layout import AXES, Layout, find_layout
from shoal.config.options import Config
from shoal.run.console import duration

GIB: Final = 2**30
METHODS: Final = {
    "dp_replicate": "DDP",
    "dp_shard": "FSDP",
    "tp": "TP",
    "cp": "CP",
    "pp": "PP",
}  # by the axis that it splits
STEP_FIGURES: Final = (
    "tokens_per_second", "step_seconds", "loss", "memory_bytes", "of_product", "of_product_full", "mfu", "mfu_full",
    "times_peer", "speedup", "efficiency",
)  # fmt: skip


def summarize_steps(seconds: Sequence[float], tokens_per_step: int) -> dict[str, float]:
    """Return the median step time after warmup, and tokens/s."""
    median = statistics.median(seconds[WARMUP_STEPS:])
    return {"step_seconds": median, "tokens_per_second": tokens_per_step / median}


def method_of(config: Config) -> str:
    """Return the name of a layout as people call it: single, DDP, FSDP, HSDP, TP x FSDP."""
    layout = find_layout(config.parallel, config.launch.processes or 1)
    assert isinstance(layout, Layout)
    if layout.dp_replicate > 1 and layout.dp_shard > 1:
        rest = [METHODS[name] for name in AXES if getattr(layout, name) > 1 and not name.startswith("dp_")]
        return " x ".join([*rest, "HSDP"])
    return " x ".join(METHODS[name] for name in AXES if getattr(layout, name) > 1) or "single"


def step_row(name: str, config: Config, answers: Sequence[Mapping[str, Any]], **facts: Any) -> Row:
    """Return the row of a case that was timed once a repeat. facts: further ones than layout, batch and length."""
    figures = {key: [float(a[key]) for a in answers] for key in STEP_FIGURES if answers[0].get(key) is not None}
    tokens = config.train.global_batch * config.data.seq_len
    known: dict[str, Any] = {
        "processes": config.launch.processes or 1, "threads": config.launch.threads, "method": method_of(config),
        "global_batch": config.train.global_batch, "micro_batch": config.train.micro_batch, "tokens_per_step": tokens,
        "steps": config.train.steps,
    }  # fmt: skip
    return Row(name, known | facts, figures)


def step_table(result: Result) -> list[str]:
    """Return the rows as lines of a table."""
    to_train, alone = result.recipe["tokens_to_train"], result.verb == "bench speed"
    rows = [({"program": row.name} if alone else {}) | _cells(row, to_train) for row in result.rows]
    return table(gathered(rows), left=("program", "method", "scaling"))


def _cells(row: Row, to_train: int | None) -> dict[str, str]:
    """Return the cells of a row, by their columns' titles; a cell whose figure was not measured is empty."""
    processes, rate = row.facts["processes"], row.median("tokens_per_second")
    cells = {
        "method": row.facts["method"],
        "scaling": row.facts.get("mode", ""),
        "processes": f"{processes}",
        "batch": f"{row.facts['global_batch']}",
        "tokens/s": f"{rate:,.0f}",
        "spread": spread(row.figures["tokens_per_second"]),
        "per process": f"{rate / processes:,.0f}" if processes > 1 else "",
        "ms/step": f"{1000 * row.median('step_seconds'):,.0f}",
        "GiB/process": number(row.median("memory_bytes") / GIB, ".2f"),
        "loss": number(row.median("loss"), ".4f"),
        "speedup": number(row.median("speedup"), ".2f"),
        "efficiency": number(100 * row.median("efficiency"), ".0f", "%") + "*" * bool(row.facts.get("shares_cores")),
    }
    for title, figure in (("MFU", "mfu"), ("of product", "of_product")):
        full, causal = row.median(f"{figure}_full"), row.median(figure)
        cells[f"{title}, full/causal"] = "" if math.isnan(causal) else f"{100 * full:.0f}% / {100 * causal:.0f}%"
    return cells | {"to finish": duration(to_train / rate) if to_train else ""}
