"""
`shoal bench save`: a checkpoint's cost, against torch.save of the same state.

All ways of saving take turns in one set of processes. torch.save writes what each process holds and no earlier one has; it is
flushed to the disk, as a checkpoint must be, and also measured without that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from shoal.bench.result import Result, Row
from shoal.bench.steps import method_of
from shoal.bench.table import gathered, number, spread, table
from shoal.bench.trial import Asked, finish, trial
from shoal.run.narrator import Narrator

FLUSHED, WAIT = "torch.save, flushed", "wait of a step"


def bench_save(asked: Asked, *, narrator: Narrator) -> None:
    """Print the seconds of each way to save, and what to conclude."""
    with trial(asked, narrator) as bench:
        config = bench.planned(bench.config)
        bench.prepare()
        with bench.phase(f"saving {asked.repeats + 1} times in each way"):
            answer = bench.run(
                "shoal.bench.save_worker", config, what="the benchmark of saving", arguments=[str(asked.repeats)]
            )
        rows = list(
            _rows(answer["seconds"], method=method_of(config), processes=config.launch.processes, state_bytes=answer["state_bytes"])
        )  # fmt: skip
        finish(asked, bench.result(rows, list(_notes(rows)), answer["model"]), _table)


def _rows(seconds: Mapping[str, Sequence[float]], **facts: object) -> Iterator[Row]:
    """Yield a row for each way to save."""
    for name, each in seconds.items():
        ratios = [mine / theirs for mine, theirs in zip(each, seconds[FLUSHED], strict=True)]
        yield Row(name, facts, {"seconds": each} | ({} if name == FLUSHED else {"of_torch_save": ratios}))


def _table(result: Result) -> list[str]:
    return table(
        gathered([
            {
                "save": row.name, "seconds": f"{row.median('seconds'):.3f}", "spread": spread(row.figures["seconds"]),
                "of torch.save, flushed": number(row.median("of_torch_save"), ".2f"),
            }
            for row in result.rows
        ]),
        left=("save",),
    )  # fmt: skip


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what to conclude."""
    facts, wait = rows[0].facts, next(row for row in rows if row.name == WAIT)
    processes = facts["processes"]
    yield f"{facts['state_bytes'] / 1e6:,.0f} MB of state, {facts['method']}, {processes} process{'es' * (processes > 1)}"
    yield (
        f"a step waits {wait.median('of_torch_save'):.2f} times as long for a checkpoint in the background as a flushed torch.save "
        "takes; the rest happens while training continues, and includes hashes and reading back"
    )
