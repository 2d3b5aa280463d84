"""
`shoal bench io`: whether reading batches keeps up with the training step, and how fast a corpus is prepared.

A step and a reading take turns, each in new processes. Reading is that of one process, for its share of each batch: from the
disk or, if the tokens fit there, from the system's memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shoal.bench.result import Result, Row
from shoal.bench.speed import SHOAL, WORKERS
from shoal.bench.table import gathered, number, spread, table
from shoal.bench.trial import Asked, Trial, finish, trial
from shoal.config.layout import Layout, find_layout
from shoal.config.options import Config
from shoal.run.narrator import Narrator

READ, STEP, PREPARE, TOKENIZER = "read batches", "training step", "prepare", "tokenizer alone"
WORDS: Final = {READ: "read", PREPARE: "prepare", TOKENIZER: "tokenizer"}  # for the worker
# Python's own standard library: a real text that every machine has
DEFAULT: Final = """
model: {family: llama, dim: 256, num_layers: 4, num_heads: 8, max_seq_len: 256}
data: {corpus: stdlib, tokenizer: bpe, tokenizer_vocab_size: 4096, seq_len: 256}
train: {steps: 8, global_batch: 8, micro_batch: 4}
"""
FEW_BYTES: Final = 5 * 10**6  # of text, below which starting and finishing take most of the time of preparing
MOST_BYTES: Final = 300 * 10**6  # of a corpus that is prepared again
MIB: Final = 2**20


def bench_io(asked: Asked, *, narrator: Narrator) -> None:
    """Print the speed of reading, of the step, of preparing and of the tokenizer, and what to conclude."""
    with trial(asked, narrator) as bench:
        config = bench.planned(bench.config)
        with bench.phase("preparing the data"):
            bench.prepare()
        why = _why_not_prepared(config)
        names = [STEP, READ] if why else [STEP, READ, TOKENIZER, PREPARE]
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for repeat in range(asked.repeats):
            for name in names:
                with bench.phase(f"repeat {repeat + 1} of {asked.repeats}: {name}"):
                    answers[name].append(_measure(bench, config, name))
        rows = list(_rows(answers, _ranks(config)))
        notes = [*_notes(rows), *([f"preparing was not measured: {why}"] if why else [])]
        finish(asked, bench.result(rows, notes, answers[STEP][0]["model"]), _table)


def _why_not_prepared(config: Config) -> str:
    """Return why the corpus is not prepared again; empty if it is."""
    data = config.data
    if data.sources:
        return "the recipe blends sources; give a recipe of one of them"
    if data.corpus in ("tokens", "datasets") or data.format != "text":
        return "only a corpus of texts in files is prepared"
    from shoal.data.corpus.sources import open_corpus, text_bytes

    if data.corpus == "dummy":
        return ""
    size = sum(text_bytes(file.name, file.bytes) for file in open_corpus(data).listing())
    if size > MOST_BYTES:
        return f"the corpus has about {size / 1e6:,.0f} MB, and at most {MOST_BYTES / 1e6:,.0f} are prepared; give fewer data.paths"
    return ""


def _ranks(config: Config) -> int:
    """Return the number of data-parallel ranks, among which a batch is divided."""
    layout = find_layout(config.parallel, config.launch.processes or 1)
    assert isinstance(layout, Layout)
    return layout.dp


def _measure(bench: Trial, config: Config, name: str) -> dict[str, Any]:
    if name == STEP:
        return bench.run(WORKERS[SHOAL], config, what=name)
    alone = config.replace("launch", processes=1)
    return bench.run("shoal.bench.io_worker", alone, what=name, arguments=[WORDS[name], str(_ranks(config))])


def _rows(answers: Mapping[str, Sequence[Mapping[str, Any]]], ranks: int) -> Iterator[Row]:
    """Yield the row of each measurement: reading relative to the step, preparing relative to the tokenizer."""
    for name, found in answers.items():
        wanted = ["tokens_per_second", "bytes_per_second", *(["memory_bytes"] if name == PREPARE else [])]
        figures = {key: [float(a[key]) for a in found] for key in wanted if key in found[0]}
        facts: dict[str, Any] = {key: found[0][key] for key in ("library", "text_bytes") if key in found[0]}
        if name == READ:
            steps = [a["tokens_per_second"] / ranks for a in answers[STEP]]
            figures["times_need"] = [
                mine / need for mine, need in zip(figures["tokens_per_second"], steps, strict=True)
            ]
            facts["data_parallel_ranks"] = ranks
        if name == PREPARE:
            alone = [a["bytes_per_second"] for a in answers[TOKENIZER]]
            figures["of_tokenizer"] = [mine / a for mine, a in zip(figures["bytes_per_second"], alone, strict=True)]
        yield Row(name, facts, figures)


def _table(result: Result) -> list[str]:
    cells = []
    for row in result.rows:
        main = next(key for key in ("tokens_per_second", "bytes_per_second") if key in row.figures)
        cells.append({
            "": row.name, "tokens/s": number(row.median("tokens_per_second"), ",.0f"),
            "MB/s of text": number(row.median("bytes_per_second") / 1e6, ",.2f"), "spread": spread(row.figures[main]),
            "of the step's need": number(row.median("times_need"), ",.0f", " x"),
            "of the tokenizer": number(row.median("of_tokenizer"), ".2f"),
            "peak, MiB": number(row.median("memory_bytes") / MIB, ",.0f"),
        })  # fmt: skip
    return table(gathered(cells), left=("",))


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what to conclude."""
    read = next(row for row in rows if row.name == READ)
    times = read.median("times_need")
    ranks = read.facts["data_parallel_ranks"]
    share = "" if ranks == 1 else f", for its share of the {ranks} data-parallel ranks' batch"
    verdict = (
        "reading is not the bottleneck" if times > 2 else "reading may slow training down: its threads need free cores"
    )
    yield f"a process reads batches {times:,.1f} times as fast as its step needs them{share}: {verdict}"
    for row in rows:
        if row.name == PREPARE:
            library = next(each for each in rows if each.name == TOKENIZER).facts["library"]
            size = row.facts["text_bytes"]
            few = "; with so little text, starting and finishing take most of the time" if size < FEW_BYTES else ""
            yield (
                f"preparing {size / 1e6:,.1f} MB of text reaches {row.median('of_tokenizer'):.2f} of the speed of its tokenizer "
                f"alone ({library}){few}"
            )
