"""
`shoal bench memory`: the peak memory of a process under DDP and under FSDP2, beside what `shoal plan` predicts.

On a GPU and on a CPU alike it is what torch's allocator has given out at most during a step, after another one; on CPUs with what
processes share to add gradients.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import psutil

from shoal.bench.layouts import Case, config_of, read_counts, usual_counts
from shoal.bench.result import Result, Row
from shoal.bench.steps import GIB, method_of
from shoal.bench.table import gathered, number, table
from shoal.bench.trial import Asked, finish, trial
from shoal.config.layout import Layout, find_layout
from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.plan.fits import need_of, why_unknown
from shoal.run.narrator import Narrator

# A micro-batch that divides the share of each of 8 processes: all cases then have the same
DEFAULT: Final = """
model: {family: llama, dim: 256, num_layers: 8, num_heads: 8, max_seq_len: 256}
data: {corpus: dummy, tokenizer: bytes, seq_len: 256}
train: {steps: 12, global_batch: 16, micro_batch: 2}
"""
METHODS: Final = ("ddp", "fsdp")
MOST: Final = 4  # processes by default: more need no other memory for DDP, and little less for FSDP
MIB: Final = 2**20
BESIDE: Final = 400 * MIB  # Python and the libraries of a process
PARTS: Final = ("parameters", "gradients", "moments", "activations")  # the first ones of the table


def bench_memory(asked: Asked, *, processes: str | None, narrator: Narrator) -> None:
    """Print the measured and the predicted peak of each layout, and what to conclude."""
    with trial(asked, narrator) as bench:
        counts = read_counts(processes) if processes else [n for n in usual_counts(bench.gpus, 2) if n <= MOST]
        if not counts or counts[0] < 2:
            raise ShoalError("shoal bench memory compares layouts of at least 2 processes; set --processes 2,4")
        cases = [Case(method, count) for count in counts for method in METHODS]
        configs = {case: bench.planned(config_of(case, bench.config)) for case in cases}
        vocabulary = bench.prepare()
        too_large = {} if bench.gpus else _too_large(configs, vocabulary)
        for case, why in too_large.items():
            print(f"warning: {case.label}: {why}", file=sys.stderr, flush=True)
            del configs[case]
        if not configs:
            raise ShoalError("no case fits this machine's memory; choose a smaller model or micro-batch")
        # what the allocator gives out does not depend on glibc's thresholds; those of a run keep freed blocks, whose fragments can
        # double a process, and all cases' processes share this machine's memory
        as_shoal = bench.gpus > 0
        answers: dict[Case, list[dict[str, Any]]] = {case: [] for case in configs}
        for repeat in range(asked.repeats):
            for case, config in configs.items():
                with bench.phase(f"repeat {repeat + 1} of {asked.repeats}: {case.label}"):
                    found = bench.run("shoal.bench.memory_worker", config, what=case.label, as_shoal=as_shoal)
                    answers[case].append(found)
        rows = [_row(case, configs[case], some) for case, some in answers.items()]
        model = next(iter(answers.values()))[0]["model"]
        notes = [*_notes(rows), *(f"{case.label} was not measured: {why}" for case, why in too_large.items())]
        finish(asked, bench.result(rows, notes, model), _table)


def _too_large(configs: Mapping[Case, Config], vocabulary: int) -> dict[Case, str]:
    """Return why a case cannot run: all processes of a machine without GPUs share its memory. Nothing, if it is unknown."""
    free, found = psutil.virtual_memory().available, dict[Case, str]()
    for case, config in configs.items():
        if why_unknown(config):
            continue
        dtype = "float32" if config.train.dtype == "auto" else config.train.dtype
        model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or vocabulary)
        known = dataclasses.replace(config, model=model).replace("train", dtype=dtype)
        layout = find_layout(config.parallel, case.processes)
        assert isinstance(layout, Layout)
        need = case.processes * (need_of(known, layout, cuda=False).total + BESIDE)
        if need > free:
            found[case] = f"its processes need {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
    return found


def _row(case: Case, config: Config, answers: Sequence[Mapping[str, Any]]) -> Row:
    figures = {
        name: [float(a[name]) for a in answers] for name in ("allocated_bytes", "predicted_bytes") if name in answers[0]
    }
    facts = {
        "processes": case.processes, "method": method_of(config), "global_batch": config.train.global_batch,
        "micro_batch": config.train.micro_batch, "allocated_by_rank": answers[-1]["allocated_by_rank"],
        "parts": answers[0].get("parts", {}), "why_not_predicted": answers[0].get("why_not_predicted", ""),
    }  # fmt: skip
    return Row(case.label, facts, figures)


def _table(result: Result) -> list[str]:
    held = {part for row in result.rows for part in row.facts["parts"]}
    parts = sorted(held, key=lambda part: (PARTS.index(part) if part in PARTS else len(PARTS), part))
    cells = []
    for row in result.rows:
        measured, predicted = row.median("allocated_bytes"), row.median("predicted_bytes")
        cells.append(
            {
                "method": row.facts["method"], "processes": str(row.facts["processes"]),
                "measured, MiB": number(measured / MIB, ",.1f"), "predicted, MiB": number(predicted / MIB, ",.1f"),
                "measured/predicted": number(measured / predicted, ".3f"),
            }
            | {part: number(row.facts["parts"].get(part, 0) / MIB, ",.1f") for part in parts}
        )  # fmt: skip
    lines = table(gathered(cells), left=("method",))
    return [*lines, "the other columns are the parts of the predicted peak, in MiB"] if parts else lines


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what to conclude."""
    for ddp, fsdp in itertools.pairwise(rows):
        if ddp.facts["processes"] != fsdp.facts["processes"]:
            continue
        ratios = [fsdp.median(name) / ddp.median(name) for name in ("allocated_bytes", "predicted_bytes")]
        said = "" if not fsdp.facts["parts"] else f", predicted {100 * ratios[1]:.0f}%"
        yield (
            f"{ddp.facts['processes']} processes: FSDP needs {100 * ratios[0]:.0f}% of DDP's memory in a process{said}"
        )
    if why := rows[0].facts["why_not_predicted"]:
        yield f"not predicted: {why}"
        return
    off = max(abs(row.median("allocated_bytes") / row.median("predicted_bytes") - 1) for row in rows)
    yield f"measured and predicted peaks differ by at most {100 * off:.1f}%"
    yield (
        "a peak is that of torch's allocator and of memory that processes share, of the process that needs the most; Python, "
        "libraries and, on GPUs, CUDA take memory beside it"
    )
