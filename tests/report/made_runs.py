"""Folders of runs that no process trained: logs with known spikes, a known slow rank, events and restarts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config.options import Config
from shoal.run.folder import RunFolder

PHASES = ("data", "forward", "backward", "reduce", "optimizer", "between")
BEGAN = 1_790_000_000.0
TOKENS = 8192  # of a step


def make_run(
    folder: Path,
    steps: int,
    *,
    seed: int = 0,
    spikes: Mapping[int, float] | None = None,
    ranks: int = 0,
    slow: tuple[int, str] | None = None,
    sources: Sequence[str] = (),
    events: Sequence[Mapping[str, Any]] = (),
    config: Config | None = None,
) -> RunFolder:
    """
    Write a run's folder.

    spikes: {step: loss}. ranks: in `ranks.jsonl`, every tenth step. slow: (rank, phase) that takes twice as long.
    """
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    run.save_config(config or Config().replace("train", steps=steps))
    random = np.random.default_rng(seed)
    run.metrics_file.write_text("\n".join(_metrics(random, steps, spikes or {}, sources)) + "\n")
    lines = [_started(steps, max(1, ranks)), *({"time": BEGAN + 9, **each} for each in events)]
    run.events_file.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    spent = {"start": 12_000_000, "step": 250_000 * steps, "evaluation": 9_000_000, "checkpoint": 1_500_000}
    run.time_file.write_text(json.dumps({"life": int(BEGAN * 1e6), "step": steps, "reached": 1, "spent": spent}) + "\n")
    if ranks:
        run.ranks_file.write_text("".join(_ranks(random, steps, ranks, slow)))
    return run


def _metrics(random: np.random.Generator, steps: int, spikes: Mapping[int, float], sources: Sequence[str]) -> list[str]:
    step = np.arange(1, steps + 1)
    loss = 2.2 + 6 * step**-0.35 + random.normal(0, 0.03, steps)
    for at, value in spikes.items():
        loss[at - 1] = value
    norm = np.exp(random.normal(-1, 0.3, steps))
    speed = random.normal(32_000, 700, steps)
    score = np.abs(random.normal(0, 1, steps))
    lines = []
    for i in range(steps):
        number = i + 1
        line: dict[str, Any] = {
            "step": number, "tokens": number * TOKENS, "time": BEGAN + 12 + number * 0.256, "loss": round(loss[i], 6), "lr": 3e-4 * min(1, number / 100),
            "grad_norm": round(norm[i], 5), "tokens_per_second": round(speed[i], 1), "step_seconds": round(TOKENS / speed[i], 6),
            "mfu": round(speed[i] / 80_000, 5), "memory_bytes": 30 * 2**30 + number % 7,
            "spike_score": round(20.0 if number in spikes else score[i], 3),
        }  # fmt: skip
        if sources:
            line["source_loss"] = {name: round(loss[i] + 0.3 * k, 4) for k, name in enumerate(sources)}
        if number % 10 == 0:
            line["split_seconds"] = {"step": 0.25, "data": 0.001, "forward": 0.08, "backward": 0.15, "reduce": 0.01, "optimizer": 0.009}  # fmt: skip
        lines.append(json.dumps(line))
        if number % max(1, steps // 40) == 0:
            held_out = {
                "val_loss": round(2.3 + 6 * number**-0.35, 5),
                "val_bits_per_byte": round(0.7 + 1.8 * number**-0.35, 5),
            }
            if sources:
                held_out["val_source_loss"] = {name: 2.4 + 0.3 * k for k, name in enumerate(sources)}
            lines.append(json.dumps({"step": number, "tokens": number * TOKENS, **held_out}))
    return lines


def _started(steps: int, ranks: int) -> dict[str, Any]:
    return {
        "time": BEGAN, "event": "started", "step": 0, "processes": ranks, "device": "cuda:0",
        "layout": {"pp": 1, "dp_replicate": 1, "dp_shard": max(1, ranks // 4), "cp": 1, "tp": min(4, ranks)},
        "command": ["shoal", "train", "recipe.yaml", "--name", "it's here"],
        "git": {"commit": "0123456789abcdef", "branch": "main", "dirty": True},
        "versions": {"shoal": "0.1", "torch": "2.11", "python": "3.12"},
        "gpus": [{"name": "NVIDIA H200", "memory_bytes": 150_000_000_000}] * ranks, "host": "node-7",
        "parameters": 124_000_000, "trainable_parameters": 124_000_000, "total_steps": steps,
        "flops_per_token": 7.5e8, "tokens_per_step": TOKENS, "peak_flops": 9.9e14,
    }  # fmt: skip


def _ranks(random: np.random.Generator, steps: int, ranks: int, slow: tuple[int, str] | None) -> list[str]:
    usual = dict(zip(PHASES, (0.001, 0.08, 0.15, 0.004, 0.009, 0.002), strict=True))
    lines = []
    for step in range(10, steps + 1, 10):
        busy = {name: np.round(seconds * random.normal(1, 0.01, ranks), 6).tolist() for name, seconds in usual.items()}
        if slow:
            busy[slow[1]][slow[0]] *= 2
        memory = [30 * 2**30] * ranks
        line = {"step": step, "time": BEGAN + step, "memory_bytes": memory, "peak_memory_bytes": memory}
        lines.append(json.dumps(line | {"busy_seconds": busy}) + "\n")
    return lines
