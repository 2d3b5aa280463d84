"""`shoal compare`: two runs, or two groups of seeds: loss, speed, the options and the first step that part them. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.errors import RunError
from shoal.report.compare.difference import LEVEL, Difference, Value, between
from shoal.report.compare.series import (
    Parting,
    Series,
    common_tokens,
    first_parting,
    held_out,
    last_losses,
    loss_apart,
    quarters_apart,
    speeds,
)
from shoal.report.runs.facts import RunFacts, differences

# Assumed standard deviations between runs that differ in nothing that matters, for one run against one. docs/SEEING.md says
# where they come from; a group of seeds measures them instead.
SEED_NOISE: Final = 0.01
SPEED_NOISE: Final = 0.02
# Options of data that do not change what a run reads
ELSEWHERE: Final = frozenset(
    f"data.{name}" for name in ("folder", "shard_tokens", "rebuild", "prefetch", "stuck_seconds")
)


@dataclass(frozen=True)
class Measure:
    """
    One measured quantity of both groups. a, b: means (geometric, in `unit`). None as difference: not comparable, and `why`.

    less_is_better: whether the lower value is the better one.
    """

    name: str
    unit: str
    less_is_better: bool
    a: float | None = None
    b: float | None = None
    difference: Difference | None = None
    why: str = ""

    @property
    def verdict(self) -> str:
        """Return "B is better", "B is worse", "B is faster", "B is slower", "cannot tell" or "not comparable"."""
        if self.difference is None:
            return "not comparable"
        if not self.difference.is_real:
            return "cannot tell"
        better = (self.difference.estimate < 0) == self.less_is_better
        if self.less_is_better:
            return "B is better" if better else "B is worse"
        return "B is faster" if better else "B is slower"

    def as_json(self) -> dict[str, Any]:
        """Return the measure for `--json`."""
        more = self.difference.as_json() if self.difference else {"why": self.why}
        return {"unit": self.unit, "a": self.a, "b": self.b, "verdict": self.verdict, **more}


@dataclass(frozen=True)
class Comparison:
    """
    What separates two groups of runs.

    loss: the measure that decides, held-out loss if all runs have it. paired: whether runs with the same seed and data
    belong together. part: where the first pair parts. options: those that differ between the groups or within one.
    """

    a: tuple[Series, ...]
    b: tuple[Series, ...]
    loss: Measure
    measures: tuple[Measure, ...]
    paired: bool
    part: Parting
    options: dict[str, list[Any]]
    notes: tuple[str, ...]

    @property
    def is_worse(self) -> bool:
        """Whether B has a higher loss or a lower speed, beyond noise."""
        return any(m.verdict in ("B is worse", "B is slower") for m in (self.loss, self.measures[-1]))

    def as_json(self) -> dict[str, Any]:
        """Return the comparison for `--json`."""
        return {
            "a": [s.facts.name for s in self.a], "b": [s.facts.name for s in self.b], "decides": self.loss.name,
            "verdict": self.loss.verdict, "paired": self.paired,
            "measures": {m.name: m.as_json() for m in self.measures},
            "first_difference": dataclasses.asdict(self.part), "options": self.options, "notes": list(self.notes),
        }  # fmt: skip


def compare(
    a: Sequence[RunFacts], b: Sequence[RunFacts], *, seed_noise: float = SEED_NOISE, speed_noise: float = SPEED_NOISE,
    level: float = LEVEL,
) -> Comparison:  # fmt: skip
    """
    Compare two groups of runs.

    seed_noise, speed_noise: run-to-run standard deviations, relative, that are assumed if each group has one run. level: the
    probability of calling equal runs different. Raises `RunError` if a run has no steps, or is given twice.
    """
    twice = {f.folder.path.resolve() for f in a} & {f.folder.path.resolve() for f in b}
    if twice:
        raise RunError(f"{min(twice).name} is on both sides; compare it with another run")
    of_a, of_b = [Series.read(f) for f in a], [Series.read(f) for f in b]
    return compare_series(of_a, of_b, seed_noise=seed_noise, speed_noise=speed_noise, level=level)


def compare_series(
    of_a: Sequence[Series], of_b: Sequence[Series], *, seed_noise: float = SEED_NOISE, speed_noise: float = SPEED_NOISE,
    level: float = LEVEL,
) -> Comparison:  # fmt: skip
    """Compare two groups of runs whose curves are read, as `compare` does."""
    of_a, of_b, paired = _in_pairs(of_a, of_b)
    judge = _Judge(of_a, of_b, paired, level)
    kinds = [judge.held_out("val_loss", seed_noise), judge.training(seed_noise)]
    if _differ(of_a, of_b, "data.tokenizer", "model.vocab_size"):
        kinds = [dataclasses.replace(m, difference=None, why=_other_tokens()) for m in kinds]
        kinds.insert(0, judge.held_out("val_bits_per_byte", seed_noise))
    loss = next((m for m in kinds if m.difference), kinds[-1])
    measures = (*kinds, judge.speed(speed_noise))
    options = differences([s.facts.options for s in (*of_a, *of_b)])
    return Comparison(
        tuple(of_a), tuple(of_b), loss, measures, paired, first_parting(of_a[0], of_b[0]), options,
        tuple(_notes(of_a, of_b)),
    )  # fmt: skip


def _other_tokens() -> str:
    return "the runs have different tokenizers: nats per token are not comparable"


@dataclass(frozen=True)
class _Judge:
    """Measures two groups, all in the same way."""

    a: Sequence[Series]
    b: Sequence[Series]
    paired: bool
    level: float

    def held_out(self, field: str, noise: float) -> Measure:
        """Compare held-out loss or bits per byte: every run reads the same text, so its steps add no noise."""
        name, unit = {"val_loss": ("held-out loss", "nats/token")}.get(field, ("held-out bits", "bits/byte"))
        if _differ(self.a, self.b, *_data_options(self.a, self.b, train=False)):
            return Measure(name, unit, True, why="the runs have other data, so maybe other held-out text")
        found = held_out([*self.a, *self.b], field)
        return self._measure(name, unit, True, found, noise, "no evaluation of the last part is common to all runs")

    def training(self, noise: float) -> Measure:
        """Compare training loss over the last part, step by step if a pair of single runs read the same data."""
        found = last_losses([*self.a, *self.b])
        name, why = "training loss", "a run has too few records in its last part"
        measure = self._measure(name, "nats/token", True, found, noise, why)
        if not (self.paired and len(self.a) == 1 and measure.difference):
            return measure
        apart = loss_apart(self.a[0], self.b[0])
        if apart is None:
            return measure
        difference = between([Value(0.0)], [apart], assumed_noise=noise, level=self.level)
        return dataclasses.replace(measure, difference=difference)

    def speed(self, noise: float) -> Measure:
        """
        Compare tokens/s. Runs with the same seed do not share what disturbs their speed, so they are not paired.

        noise: the least assumed for one run against one. If the quarters of a run differ more, so may whole runs.
        """
        values = speeds([*self.a, *self.b])
        drift = max((quarters_apart(run) for run in (*self.a, *self.b)), default=0.0)
        noise = max(noise, drift)
        return self._measure("speed", "tokens/s", False, values, noise, "a run has too few records", paired=False)

    def _measure(
        self, name: str, unit: str, less: bool, values: list[Value] | None, noise: float, why: str,
        paired: bool | None = None,
    ) -> Measure:  # fmt: skip
        if values is None:
            return Measure(name, unit, less, why=why)
        a, b = values[: len(self.a)], values[len(self.a) :]
        paired = self.paired if paired is None else paired
        difference = between(a, b, paired=paired, assumed_noise=noise, level=self.level)
        return Measure(name, unit, less, _mean(a), _mean(b), difference)


def _mean(values: Sequence[Value]) -> float:
    return math.exp(sum(v.log for v in values) / len(values))


def _seed(run: Series) -> Any:
    return run.facts.options.get("train.seed")


def _in_pairs(a: Sequence[Series], b: Sequence[Series]) -> tuple[Sequence[Series], Sequence[Series], bool]:
    """Return both groups in an order in which runs with the same seed match, and whether all of them match and read the same data."""
    by_seed: Callable[[Series], str] = lambda run: repr(_seed(run))  # noqa: E731
    seeds = [sorted(map(by_seed, group)) for group in (a, b)]
    if seeds[0] != seeds[1] or len(set(seeds[0])) < len(a):
        return a, b, False
    a, b = sorted(a, key=by_seed), sorted(b, key=by_seed)
    return a, b, not _differ(a, b, *_data_options(a, b, train=True))


def _data_options(a: Sequence[Series], b: Sequence[Series], *, train: bool) -> list[str]:
    """Return the options that decide what is read: of the held-out text or, with `train`, also of each training step."""
    keys = dict.fromkeys(
        k for run in (*a, *b) for k in run.facts.options if k.startswith("data.") and k not in ELSEWHERE
    )
    return [*keys, "train.global_batch"] if train else list(keys)


def _differ(a: Sequence[Series], b: Sequence[Series], *keys: str) -> bool:
    runs = [*a, *b]
    return any(run.facts.options.get(key) != runs[0].facts.options.get(key) for run in runs for key in keys)


def _notes(a: Sequence[Series], b: Sequence[Series]) -> list[str]:
    """Return what a reader of the verdict must know."""
    runs = [*a, *b]
    notes = []
    if unfinished := [r.facts.name for r in runs if r.facts.state != "finished"]:
        notes.append(f"not finished: {', '.join(unfinished)}; compared up to {common_tokens(runs):,.0f} tokens")
    elif len({r.tokens[-1] for r in runs}) > 1:
        notes.append(
            f"the runs have different lengths: compared up to {common_tokens(runs):,.0f} tokens, where the longer ones "
            "have not finished their learning rate schedule"
        )
    if len({str(r.facts.event.get("device")) + str(r.facts.event.get("machine")) for r in runs}) > 1:
        notes.append("the runs started on different machines: a difference in speed may be the machines'")
    if len(runs) == 2:
        notes.append("one run each: other programs on the machine change the speed of a whole run")
    return notes
