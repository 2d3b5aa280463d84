"""
`shoal bench scaling`: the real training step on 1, 2, 4 and 8 processes, with the same batch (strong) and with a growing one (weak).

All cases are timed in turn, repeat after repeat. A speedup is a ratio of two runs of the same repeat, which cancels drift of the
machine's speed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shoal.bench.layouts import Case, Mode, config_of, devices_of, read_counts, read_methods, threads_of, usual_counts
from shoal.bench.result import Row
from shoal.bench.speed import SHOAL, WORKERS
from shoal.bench.steps import step_row, step_table
from shoal.bench.trial import Asked, Trial, finish, trial
from shoal.config.options import Config
from shoal.run.narrator import Narrator
from shoal.system.cpu import count_cores

# The batch divides among 8 processes
DEFAULT: Final = """
model: {family: llama, dim: 256, num_layers: 4, num_heads: 8, max_seq_len: 256}
data: {corpus: dummy, tokenizer: bytes, seq_len: 256}
train: {steps: 10, global_batch: 16, micro_batch: 16}
"""
CLOSE: Final = 1e-4  # relative difference of losses at the same global batch that rounding explains, in float32


def bench_scaling(
    asked: Asked, *, processes: str | None, modes: Sequence[Mode], methods: str, narrator: Narrator
) -> None:
    """Print throughput, speedup and efficiency by the number of processes, and what to conclude."""
    with trial(asked, narrator) as bench:
        counts = read_counts(processes) if processes else usual_counts(bench.gpus)
        configs = _configs(bench, counts, modes, read_methods(methods))
        bench.prepare()
        answers: dict[Case, list[dict[str, Any]]] = {case: [] for case in configs}
        for repeat in range(asked.repeats):
            for number, (case, config) in enumerate(configs.items(), 1):
                with bench.phase(f"repeat {repeat + 1} of {asked.repeats}, {number} of {len(configs)}: {case.name}"):
                    answers[case].append(bench.run(WORKERS[SHOAL], config, what=case.name))
        rows = list(_rows(configs, answers, bench.gpus))
        model = next(iter(answers.values()))[0]["model"]
        result = bench.result(rows, list(_notes(rows, bench)), model)
        finish(asked, result, step_table)


def _configs(bench: Trial, counts: list[int], modes: Sequence[Mode], methods: Sequence[str]) -> dict[Case, Config]:
    """Return the config of each case, the fewest processes first. Raises `ShoalError` for the first that cannot be."""
    config = bench.config if bench.gpus else bench.config.replace("launch", threads=threads_of(bench.config, counts))
    cases = [Case(method, count, mode) for mode in modes for method in methods for count in counts]
    if counts[0] == 1:
        first = Case(methods[0], 1)
        cases = [first, *(case for case in cases if case.processes > 1)]
    return {case: bench.planned(config_of(case, config)) for case in cases}


def _rows(configs: Mapping[Case, Config], answers: Mapping[Case, Sequence[dict[str, Any]]], gpus: int) -> Iterator[Row]:
    """Yield the row of each case, with its speedup over the fewest processes of its method and mode."""
    for case, config in configs.items():
        base = min(_alike(case, configs), key=lambda each: each.processes)
        devices, before = (
            devices_of(each.processes, configs[each].launch.threads or 1, gpus=gpus) for each in (case, base)
        )
        for mine, first in zip(answers[case], answers[base], strict=True):
            mine["speedup"] = mine["tokens_per_second"] / first["tokens_per_second"]
            mine["efficiency"] = mine["speedup"] / (devices / before)
        facts = {"mode": case.mode if case.processes > 1 else "", "shares_cores": devices < case.processes}
        yield step_row(case.name, config, answers[case], **facts, devices=devices, compared_with=base.name)


def _alike(case: Case, cases: Mapping[Case, Config]) -> Iterator[Case]:
    """Yield the cases of the same method and mode, and the single process."""
    for each in cases:
        if each.processes == 1 or dataclasses.replace(each, processes=case.processes) == case:
            yield each


def _notes(rows: Sequence[Row], bench: Trial) -> Iterator[str]:
    """Yield what to conclude."""
    for row in rows:
        if row.facts["compared_with"] == row.name:
            continue
        yield (
            f"{row.name}: {row.median('speedup'):.2f} times the tokens/s of {row.facts['compared_with']}; efficiency "
            f"{100 * row.median('efficiency'):.0f}%{'*' * row.facts['shares_cores']}"
        )
    yield from _loss_notes(rows)
    if shared := sorted({row.facts["processes"] for row in rows if row.facts["shares_cores"]}):
        cores = count_cores()
        yield (
            f"* {' and '.join(map(str, shared))} processes share {cores} core{'s' * (cores > 1)}: these rows measure how processes "
            f"share cores, not scaling. Their efficiency is relative to the throughput of the whole machine, {cores} cores."
        )
    sizes = bench.asked.recipe and [
        name for name in ("dp_shard", "tp", "cp", "pp") if getattr(bench.config.parallel, name) != 1
    ]
    if sizes:
        yield f"note: each method replaces the recipe's {', '.join(f'parallel.{name}' for name in sizes)}"


def _loss_notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield whether the layouts with the same global batch had the same loss."""
    same = [row for row in rows if row.facts["mode"] != "weak"]
    losses = [loss for row in same for loss in row.figures["loss"]]
    if len(same) < 2:
        return
    apart = max(losses) / min(losses) - 1
    step = same[0].facts["steps"]
    if apart <= CLOSE:
        yield f"loss: the same in all layouts at the same global batch; at step {step} they differ by at most {apart:.1e} (relative)"
    else:
        yield (
            f"loss: at step {step} the layouts differ by {apart:.1e} (relative) at the same global batch, more than rounding in "
            "float32; shoal verify checks a layout"
        )
