"""A profile as lines of at most 80 columns."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.metrics.profile.costs import Sums, kind_of, most_of
from shoal.metrics.profile.records import Profile, RankMemory, RankProfile
from shoal.report.profile.units import percent, seconds, size
from shoal.system.output import on_one_line

SHOWN: Final = 10  # operators and modules
WIDTH: Final = 80


@dataclass(frozen=True)
class Dearest:
    """An operator, over all ranks."""

    name: str
    seconds: float  # of its own, a step and rank
    calls: float  # a step and rank
    share: float  # of a step's time
    module: str
    module_share: float


def dearest(ranks: Sequence[RankProfile], most: int = SHOWN) -> list[Dearest]:
    """Return the operators with the most time of their own: means over steps and ranks."""
    steps = sum(len(rank.steps) for rank in ranks) or 1
    spent: Sums = defaultdict(float)
    calls: Counter[str] = Counter()
    share: Sums = defaultdict(float)
    modules: dict[str, tuple[str, float]] = {}
    for rank in ranks:
        for each in rank.operators:
            spent[each.name] += each.device_seconds if rank.device == "cuda" else each.cpu_seconds
            calls[each.name] += each.calls
            share[each.name] += each.share * len(rank.steps)
            modules.setdefault(each.name, (each.module, each.module_share))
    return [
        Dearest(name, time / steps, calls[name] / steps, share[name] / steps, *modules[name])
        for name, time in most_of(spent, most)
    ]


def lines(profile: Profile, memory: Sequence[RankMemory], folder: Path) -> Iterator[str]:
    """Yield what the console says of a profile."""
    ranks = profile.ranks
    if not ranks or not any(rank.steps for rank in ranks):
        yield f"no step was recorded; see {on_one_line(folder)}"
        return
    yield from _head(profile)
    yield ""
    yield from _operators(profile)
    yield ""
    yield from _time(profile)
    yield ""
    yield from _memory(memory)
    yield ""
    yield f"{on_one_line(folder)}:"
    traces = sum(rank.trace_bytes for rank in ranks)
    yield f"  {len(ranks)} trace{'s' * (len(ranks) > 1)}, {size(traces)}: open them in Perfetto (ui.perfetto.dev)"


def _head(profile: Profile) -> Iterator[str]:
    ranks = profile.ranks
    recorded = sorted({step for rank in ranks for step in rank.steps})
    times = [each for rank in ranks for each in rank.step_seconds]
    span = f"step {recorded[0]}" if len(recorded) == 1 else f"steps {recorded[0]} to {recorded[-1]}"
    who = f"{len(ranks)} of {profile.world_size} processes" if profile.world_size > 1 else "1 process"
    yield f"profile of {span} of {profile.total_steps:,}, {who}: {seconds(sum(times) / len(times))} a step"
    usual = [rank.usual_step_seconds for rank in ranks if rank.usual_step_seconds]
    if usual:
        before = sum(usual) / len(usual)
        yield f"the profiler makes a step {sum(times) / len(times) / before:.2f} times as long: {seconds(before)} without it"
    else:
        yield "no step ran without the profiler, so its overhead is unknown"


def _operators(profile: Profile) -> Iterator[str]:
    on_device = profile.ranks[0].device == "cuda"
    own = "GPU time" if on_device else "CPU time"
    yield f"{'operator, a step and process':<32}{own:>9}{'share':>7}{'calls':>7}  module"
    for each in dearest(profile.ranks):
        where = f"{each.module} {percent(100 * each.module_share, 0)}" if each.module else "-"
        yield (
            f"{cut(each.name, 31):<32}{seconds(each.seconds):>9}{percent(100 * each.share):>7}{each.calls:>7,.0f}  "
            f"{cut(where, WIDTH - 57)}"
        )


def _time(profile: Profile) -> Iterator[str]:
    ranks, steps = profile.ranks, sum(len(rank.steps) for rank in profile.ranks)
    whole = sum(sum(rank.phase_seconds.values()) for rank in ranks) or 1.0
    names = ranks[0].phase_seconds
    shares = (f"{name} {percent(100 * sum(r.phase_seconds[name] for r in ranks) / whole, 0)}" for name in names)
    yield "phases: " + ", ".join(shares)
    outside = sum(rank.outside_seconds for rank in ranks) / steps
    yield f"outside of operators (Python, waits): {seconds(outside)} a step"
    overlap = profile.overlap
    if overlap.percent is None:
        yield "no communication between processes"
        return
    yield (
        f"communication: {seconds(overlap.communication_seconds / steps)} a step, {percent(overlap.percent)} of it hidden behind "
        "computing"
    )
    if 1 < len(ranks) <= 8:
        each = ", ".join(f"rank {r.rank} {percent(r.overlap.percent)}" for r in ranks if r.overlap.percent is not None)
        yield cut(f"  hidden by rank: {each}", WIDTH)


def _memory(memory: Sequence[RankMemory]) -> Iterator[str]:
    if not memory:
        return
    first = memory[0]
    kinds: dict[str, list[int]] = {}
    for each in first.modules:
        held = kinds.setdefault(kind_of(each.name), [0, 0, 0, 0])
        for i, value in enumerate(
            (each.parameter_bytes, each.gradient_bytes, each.optimizer_bytes, each.activation_bytes)
        ):
            held[i] += value
    yield f"{f'memory of rank {first.rank}, by module':<32}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'activations':>12}"
    for name, held in sorted(kinds.items(), key=lambda item: -sum(item[1]))[:SHOWN]:
        yield f"{cut(name, 31):<32}" + "".join(f"{size(value):>12}" for value in held)
    totals = [sum(held[i] for held in kinds.values()) for i in range(4)]
    yield f"{'all modules':<32}" + "".join(f"{size(value):>12}" for value in totals)
    yield f"  and {size(first.other_bytes)} of other allocations at the peak (backward, optimizer, batches)"


def cut(text: str, width: int) -> str:
    """Shorten a text in its middle."""
    if len(text) <= width:
        return text
    left = (width - 3) * 2 // 3
    return f"{text[:left]}...{text[len(text) - (width - 3 - left) :]}"
