"""
`shoal bench speed`: times the real training step of shoal and, with `--peers`, of transformers.Trainer.

Each timed run has new processes. With `--peers`, runs of the two contenders alternate.

A figure is the median over repeats of each run's median step. A ratio is the median of the ratios of neighboring runs, which
cancels drift of the machine's speed.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shoal.bench.choose import choose_sizes
from shoal.bench.result import Row
from shoal.bench.steps import step_row, step_table
from shoal.bench.trial import Asked, finish, trial
from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.run.console import Console
from shoal.run.narrator import Narrator

SHOAL, TRAINER = "shoal", "transformers.Trainer"
WORKERS: Final = {SHOAL: "shoal.bench.step_worker", TRAINER: "shoal.bench.trainer_worker"}


def bench_speed(asked: Asked, *, peers: bool, narrator: Narrator) -> None:
    """
    Print tokens/s, memory, loss, the share of a matrix product's rate, MFU where the peak is known, and time by phase.

    peers: whether to time transformers.Trainer too.
    """
    if peers and not (importlib.util.find_spec("transformers") and importlib.util.find_spec("accelerate")):
        raise ShoalError("--peers needs transformers and accelerate: pip install 'shoal[peers]'")
    with trial(asked, narrator) as bench:
        config = bench.planned(bench.config, has_sizes=not bench.undecided)
        if peers and (config.launch.processes or 1) > 1:
            raise ShoalError("--peers compares one process with one process; set launch.processes to 1")
        vocab_size = bench.prepare()
        if bench.undecided:  # the plan alone decides
            config = choose_sizes(config, bench.undecided, bench.gpus, vocab_size, 0, Console(on_stderr=True))
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in ([SHOAL, TRAINER] if peers else [SHOAL])}
        for repeat in range(asked.repeats):
            for name, found in answers.items():
                with bench.phase(f"run {repeat + 1} of {asked.repeats}: {name}"):
                    found.append(bench.run(WORKERS[name], config, what=name, as_shoal=name == SHOAL))
        rows = list(_rows(config, answers))
        notes = list(_notes(answers[SHOAL], rows))
        finish(asked, bench.result(rows, notes, answers[SHOAL][0]["model"]), step_table)


def _rows(config: Config, answers: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[Row]:
    """Yield the row of each contender; shoal's has its ratio to the other one."""
    for name, found in answers.items():
        if name == SHOAL and TRAINER in answers:
            for mine, theirs in zip(found, answers[TRAINER], strict=True):
                mine["times_peer"] = mine["tokens_per_second"] / theirs["tokens_per_second"]
        facts = {"split": _split(found)} if name == SHOAL else {}
        yield step_row(name, config, found, **facts)


def _split(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of each phase of a step: the median over the repeats."""
    return {name: statistics.median(a["split"][name] for a in answers) for name in answers[0]["split"]}


def _notes(answers: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> Iterator[str]:
    """Yield what to conclude."""
    ours = rows[0]
    if said := answers[0]["mfu_convention"]:
        yield said
    shares = ours.facts["split"] | {"rest": max(0.0, 1 - sum(ours.facts["split"].values()))}
    yield "phases of the step: " + ", ".join(f"{k} {100 * v:.1f}%" for k, v in shares.items())
    if "of_product" in ours.figures:
        product = statistics.median(a["product_flops"] for a in answers)
        flops = statistics.median(a["model_flops"] for a in answers)
        yield (
            f"matrix product: {flops / 1e9:,.0f} GFLOP/s of model FLOPs, {100 * ours.median('of_product'):.0f}% of the rate of a "
            f"matrix product in the same run ({product / 1e9:,.0f})"
        )
    if "times_peer" in ours.figures:
        yield f"shoal is {ours.median('times_peer'):.2f} x transformers.Trainer (median of neighboring pairs)"
