"""The page of a benchmark with its peers: tables, targets, what shows that all did the same work, and two pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from scripts.peers.installs import PEERS
from scripts.peers.pictures import draw_losses, draw_speeds
from scripts.peers.timings import (
    DISTURBED,
    PRODUCTS,
    SHOAL,
    TWO_PROCESSES,
    WARMUP_STEPS,
    Case,
    Timing,
    Turn,
    of_turn,
)

from shoal.bench.environment import describe
from shoal.plan.estimate import flops_per_token
from shoal.system.cpu import multiplies_bfloat16

FIRST_LOSS: Final = {"float32": 1e-3, "bfloat16": 2e-2}  # largest difference at step 1: equal weights and tokens
ALL_LOSSES: Final = {"float32": 1e-2, "bfloat16": 5e-2}  # at any step
PARAMETERS: Final = 0.02  # largest relative difference
NO_BFLOAT16: Final = "this CPU has no bfloat16 instructions, without which a product takes a hundred times as long"
FASTER, FASTER_THAN_TRAINER, OF_PRODUCTS = 1.1, 1.2, 0.92  # float32
FASTER_THAN_TRAINER_124M: Final = 1.5  # bfloat16, if it is faster than float32


@dataclass(frozen=True)
class Bench:
    """A finished benchmark. errors: of peers that did not install."""

    command: str
    planned: Sequence[Turn]
    timings: Sequence[Timing]
    errors: Mapping[str, str]

    @property
    def cases(self) -> list[Case]:
        """The cases in order."""
        return list({(turn.case.shape, turn.case.dtype): turn.case for turn in self.planned}.values())


@dataclass(frozen=True)
class Spread:
    """A median with the lower and the upper quartile."""

    middle: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least two values."""
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), lower, upper)


class Found:
    """What was measured in a case."""

    def __init__(self, bench: Bench, case: Case) -> None:
        self.case = case
        self._turns = [of_turn(turn, bench.timings) for turn in bench.planned if turn.case == case]
        self.names = [SHOAL, *(name for name in PEERS if self.runs(name))]

    def runs(self, contender: str) -> list[Timing]:
        """Return a contender's runs that did not fail."""
        return [t for turn in self._turns for t in turn if t.contender == contender and not t.error]

    def errors(self) -> dict[str, str]:
        """Return the error of each contender that failed."""
        return {t.contender: t.error for turn in self._turns for t in turn if t.error}

    def speed(self, contender: str) -> Spread:
        """Return tokens/s, over all steps."""
        tokens = self.case.spec.tokens_per_step
        return Spread.of([tokens / seconds for run in self.runs(contender) for seconds in run.steps])

    def _neighbors(self, contender: str, other: str) -> Iterator[tuple[float, float]]:
        """Yield the seconds of neighboring steps of two contenders."""
        for turn in self._turns:
            by_name = {t.contender: t for t in turn if not t.error}
            if contender in by_name and other in by_name:
                yield from zip(by_name[contender].steps, by_name[other].steps, strict=True)

    def ratio(self, contender: str, other: str = SHOAL) -> Spread:
        """Return how many times as fast as `contender` the `other` is, over neighboring steps."""
        return Spread.of([theirs / ours for theirs, ours in self._neighbors(contender, other)])

    @property
    def is_disturbed(self) -> bool:
        """Whether other programs used so much of the machine that the ratios say nothing about a target."""
        return statistics.median(t.others for turn in self._turns for t in turn) > DISTURBED

    @cached_property
    def of_products(self) -> Spread:
        """Shoal's model FLOP/s relative to the rate of the model's own matrix products, over neighboring steps."""
        case = self.case
        work = flops_per_token(case.config.model, case.spec.seq_len) * case.spec.tokens_per_step
        products = self.runs(PRODUCTS)[0].answer["product_flops"]
        return Spread.of([work / ours * theirs / products for theirs, ours in self._neighbors(PRODUCTS, SHOAL)])

    def product_rate(self) -> Spread:
        """Return FLOP/s of the model's matrix products alone."""
        return Spread.of([run.answer["product_flops"] / s for run in self.runs(PRODUCTS) for s in run.steps])

    def loss_differences(self, contender: str) -> list[float]:
        """Return the distance of a contender's loss from shoal's at each step."""
        ours, theirs = (self.runs(name)[0].answer["losses"] for name in (SHOAL, contender))
        return [abs(a - b) for a, b in zip(ours, theirs, strict=True)]

    def same_work(self, contender: str) -> list[str]:
        """Return the reasons to doubt that a contender did shoal's work; none is the aim."""
        differences, dtype = self.loss_differences(contender), self.case.dtype
        ours, theirs = (self.runs(name)[0].answer["parameters"] for name in (SHOAL, contender))
        doubts = {
            f"{theirs:,} parameters": abs(theirs / ours - 1) > PARAMETERS,
            f"loss of step 1 differs by {differences[0]:.1e}": differences[0] > FIRST_LOSS[dtype],
            f"loss differs by up to {max(differences):.1e}": max(differences) > ALL_LOSSES[dtype],
        }
        return [doubt for doubt, holds in doubts.items() if holds]


def write_page(bench: Bench, folder: Path) -> None:
    """Write `peers.md`, `peers-loss.svg` and `peers-speed.svg` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [Found(bench, case) for case in bench.cases]
    draw_losses({_title(f): {title_of(n): f.runs(n)[0].answer["losses"] for n in f.names} for f in found}, folder / "peers-loss.svg")  # fmt: skip
    draw_speeds({_title(f) + ", disturbed" * f.is_disturbed: {title_of(n): f.speed(n).__dict__ for n in f.names} for f in found}, folder / "peers-speed.svg")  # fmt: skip
    page = "\n".join(_page(bench, found))
    (folder / "peers.md").write_text(page + "\n", encoding="utf-8")
    print(page)


def title_of(contender: str) -> str:
    """Return a contender's name in tables and pictures."""
    return "shoal" if contender == SHOAL else PEERS[contender].title


def _title(found: Found) -> str:
    return f"{found.case.shape.upper()}, {found.case.dtype}"


def _page(bench: Bench, found: Sequence[Found]) -> Iterator[str]:
    yield "# Peers\n"
    yield "shoal beside other trainers: the same Llama with the same initial weights, the same tokens in the same order, batch,"
    yield "threads, AdamW, learning rate, weight decay and clipping. No dropout, no `torch.compile`, float32 master weights.\n"
    yield f"Command: `{bench.command}`\n"
    yield f"```\n{describe()}\n```\n"
    yield "Contenders take their steps in turns: each has a process of its own, which waits while another works. A ratio is the"
    yield "median over neighboring steps, so that a drift of the machine's speed does not affect it; the quartiles follow in parentheses."
    yield f"Who starts and steps first changes with the repeat, and the first {WARMUP_STEPS} steps of a process do not count. shoal"
    yield f"gets the environment variables that `shoal train` sets. {_others(bench)}\n"
    yield "![Tokens/s of each contender](peers-speed.svg)\n"
    yield from _targets(found)
    for each in found:
        yield from _case(each)
    yield from _proof(found)
    yield from _versions(bench, found)


def _others(bench: Bench) -> str:
    used = [t.others for turn in bench.planned for t in of_turn(turn, bench.timings)]
    return (
        f"Other programs used {100 * statistics.median(used):.0f}% of the cores (median), and {100 * max(used):.0f}% "
        "in the most disturbed turn."
    )


def _case(found: Found) -> Iterator[str]:
    spec = found.case.spec
    yield f"\n## {_title(found)}\n"
    yield (
        f"{spec.num_layers} layers, {spec.dim} wide, {spec.num_heads} heads, feed-forward {spec.ffn_dim}, vocabulary "
        f"{spec.vocab_size:,}{', tied' if spec.tie_embeddings else ''}; {spec.batch} x {spec.seq_len} tokens a step, "
        f"threads: {spec.threads}, {spec.steps} steps.\n"
    )
    yield "| | tokens/s | quartiles | shoal's speed is x times this | peak memory | parameters | last loss |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name in found.names:
        speed, told = found.speed(name), found.runs(name)[0].answer
        memory = statistics.median(run.answer["memory_bytes"] for run in found.runs(name)) / 2**20
        ratio = "" if name == SHOAL else _times(found.ratio(name))
        yield (
            f"| {title_of(name)} | {speed.middle:,.0f} | {speed.lower:,.0f}, {speed.upper:,.0f} | {ratio} | "
            f"{memory:,.0f} MiB | {told['parameters']:,} | {told['losses'][-1]:.4f} |"
        )
    for name, error in found.errors().items():
        yield f"\n{name} failed: `{error}`"
    rate, share = found.product_rate(), found.of_products
    yield (
        f"\nThe matrix products of these linear layers alone run at {rate.middle / 1e9:.0f} GFLOP/s "
        f"({rate.lower / 1e9:.0f} to {rate.upper / 1e9:.0f}). shoal's step, with its attention, reaches "
        f"{100 * share.middle:.0f}% of that ({100 * share.lower:.0f} to {100 * share.upper:.0f})."
    )
    if found.runs(TWO_PROCESSES):
        threads = f"{found.case.split.launch.threads} thread(s)"
        speed, ratio = found.speed(TWO_PROCESSES), _times(found.ratio(SHOAL, TWO_PROCESSES))
        yield (
            f"\nshoal with two processes, {threads} each: {speed.middle:,.0f} tokens/s, {ratio} times as fast as one process "
            f"of {spec.threads}."
        )


def _times(spread: Spread) -> str:
    return f"{spread.middle:.2f} ({spread.lower:.2f} to {spread.upper:.2f})"


def _targets(found: Sequence[Found]) -> Iterator[str]:
    yield "## Targets\n"
    if any(each.is_disturbed for each in found):
        yield (
            f"Other programs used more than {100 * DISTURBED:.0f}% of the cores during most runs of a case below, so its figures "
            "decide nothing. Run the command again on an idle machine.\n"
        )
    yield "| target | measured | met |"
    yield "| --- | --- | --- |"
    for each in found:
        for target, measured, met in _judged(each):
            verdict = "undecided" if each.is_disturbed else "yes" if met else "**no**"
            yield f"| {_title(each)}: {target} | {measured} | {verdict} |"
    if not multiplies_bfloat16():
        yield f"| bfloat16, on a CPU that is faster in it than in float32 | not run: {NO_BFLOAT16} | |"


def _judged(found: Found) -> Iterator[tuple[str, str, bool]]:
    """Yield each target of a case, the figure, and whether it is reached."""
    peers = [name for name in found.names if name != SHOAL]
    ratios = {name: found.ratio(name).middle for name in peers}
    close = found.of_products.middle >= OF_PRODUCTS
    if found.case.dtype == "float32":
        for name, ratio in ratios.items():
            aim = FASTER_THAN_TRAINER if name == "trainer" else FASTER
            yield (
                f"{aim} x {title_of(name)}, or {100 * OF_PRODUCTS:.0f}% of its products' rate",
                f"{ratio:.2f} x; {100 * found.of_products.middle:.0f}%",
                ratio >= aim or close,
            )
    elif found.case.shape == "124m" and "trainer" in ratios:
        yield (
            f"{FASTER_THAN_TRAINER_124M} x Trainer",
            f"{ratios['trainer']:.2f} x",
            ratios["trainer"] >= FASTER_THAN_TRAINER_124M,
        )
    if ratios:
        slowest = min(ratios, key=lambda name: ratios[name])
        yield "not slower than any peer", f"{ratios[slowest]:.2f} x {title_of(slowest)}", ratios[slowest] >= 1
    if found.runs(TWO_PROCESSES):
        ratio = found.ratio(SHOAL, TWO_PROCESSES).middle
        yield "two processes at least as fast as one", f"{ratio:.2f} x", ratio >= 1


def _proof(found: Sequence[Found]) -> Iterator[str]:
    yield "\n## The same work\n"
    yield "All contenders start from the same weights and read the same tokens, so their losses must agree up to rounding.\n"
    yield "![Training loss of each contender](peers-loss.svg)\n"
    yield "| | case | loss of step 1 | differs from shoal's by | at most, over all steps | same work |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for each in found:
        for name in each.names[1:]:
            differences, doubts = each.loss_differences(name), each.same_work(name)
            yield (
                f"| {title_of(name)} | {_title(each)} | {each.runs(name)[0].answer['losses'][0]:.4f} | {differences[0]:.1e} | "
                f"{max(differences):.1e} | {'; '.join(doubts) or 'yes'} |"
            )


def _versions(bench: Bench, found: Sequence[Found]) -> Iterator[str]:
    yield "\n## Versions\n"
    yield "| | versions | training path |"
    yield "| --- | --- | --- |"
    for name, peer in PEERS.items():
        runs = [run for each in found for run in each.runs(name)]
        if name in bench.errors:
            yield f"| {peer.title} | does not install: `{bench.errors[name]}` | |"
        elif runs:
            versions = ", ".join(f"{package} {version}" for package, version in runs[0].answer["versions"].items())
            yield f"| {peer.title} | {versions} | {peer.path} |"
