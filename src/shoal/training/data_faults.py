"""What the ranks tell each other about rows that cannot be read and reading threads that were replaced, and its record."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.data.loader import Batch
from shoal.data.order.quarantine import Replaced, too_many
from shoal.mesh.ballot import Vote
from shoal.training.health import GoBack
from shoal.training.run import Run

SHOWN_ROWS = 3  # replaced rows that are printed one by one


@dataclass(frozen=True)
class News:
    """What happened on one rank while it read a step: rows replaced, and why its reading thread was replaced."""

    replaced: Sequence[Replaced]
    restarts: Sequence[str]


def vote(run: Run, step: int, batches: Sequence[Batch]) -> Vote:
    """Return this rank's vote on the data of `step`: how much it has to report. If any rank has, `hear` gathers it."""
    replaced = {each.row: each for batch in batches for each in batch.replaced}
    news = News(list(replaced.values()), run.loader.restarted)
    return Vote([float(len(news.replaced) + len(news.restarts))], functools.partial(hear, run, step, news))


def hear(run: Run, step: int, news: News, sums: Sequence[float]) -> None:
    """
    Gather the ranks' news of `step` if there is any, and record it. Then a collective over the world.

    Raises DataError if more than `data.max_quarantined` rows cannot be read, and `GoBack` if ranks replaced a row differently.
    """
    if not sums[0]:
        return
    told: list[News] = run.mesh.gather_objects(news)
    for rank, each in enumerate(told):
        for why in each.restarts:
            run.console.warn(f"step {step}: the thread that reads data on rank {rank} was replaced: {why}")
            run.files.event("loader restarted", step=step, rank=rank, why=why)
    _quarantine(run, step, [each for one in told for each in one.replaced])


def _quarantine(run: Run, step: int, told: Sequence[Replaced]) -> None:
    """Add rows to the run's quarantine, the same on all ranks. told: each row once for each rank that read it, by rank."""
    known, most = run.state.quarantined, run.config.data.max_quarantined
    before = set(known)
    new: dict[int, Replaced] = {}
    for each in told:  # of ranks that differ, the lowest decides
        if known.get(each.row) != each.substitute:
            new.setdefault(each.row, each)
    for each in new.values():
        known[each.row] = each.substitute
        _report(run, step, each)
    if run.state.num_quarantined > most and new:
        raise too_many(most, next(iter(new.values())).why)
    for row in new.keys() - before:
        found = [each.substitute for each in told if each.row == row]
        if len(set(found)) > 1 or len(found) % run.header.copies:
            raise GoBack(f"row {row:,} of the data could be read on some ranks only")


def _report(run: Run, step: int, each: Replaced) -> None:
    """
    Record a row that was replaced in the run's events and its ledger, and warn of it.

    After the first rows, only their number is printed, each time it has doubled.
    """
    (source, row), (_, substitute) = map(run.loader.order.locate, (each.row, each.substitute))
    name = list(run.dataset.parts)[source]
    count = f"{run.state.num_quarantined:,} of at most {run.config.data.max_quarantined:,} such rows"
    of = f" of {name}" if name else ""
    rows = len(run.state.quarantined)
    if rows <= SHOWN_ROWS:
        run.console.warn(f"row {row:,}{of} cannot be read and is replaced by row {substitute:,} ({count}): {each.why}")
    elif rows & (rows - 1) == 0:
        run.console.warn(
            f"and {rows - SHOWN_ROWS:,} more rows cannot be read and are replaced ({count}); events.jsonl names each"
        )
    run.files.event("quarantined", step=step, source=name, row=row, substitute=substitute, why=each.why)
    run.files.quarantined(each.row, each.substitute)
