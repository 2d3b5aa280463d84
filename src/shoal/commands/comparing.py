"""`shoal runs` and `shoal compare`: what the runs of a folder are, and whether two or two groups of them, or two results of a benchmark, differ."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.commands.flags import Override
from shoal.errors import RunError, ShoalError
from shoal.system.output import on_one_line

if TYPE_CHECKING:
    from shoal.report.runs.facts import RunFacts
    from shoal.run.folder import RunFolder

VERSUS = "vs"


def runs(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.report.runs import listing
    from shoal.report.runs.facts import RunFacts, all_runs
    from shoal.run.console import Console

    folders = all_runs(args.folder)
    if not folders:
        raise RunError(
            f"{on_one_line(args.folder)} has no runs; shoal train RECIPE.yaml starts one, or give their folder"
        )
    found = listing.sort([RunFacts.read(folder) for folder in folders], args.sort)
    if args.json:
        print(json.dumps(listing.as_json(found), indent=2))
    else:
        Console().show(listing.table(found))
    return 0


def compare(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.report.compare import comparison, words
    from shoal.run.console import Console

    if any(word.endswith(".json") for word in args.words):
        return _compare_results(args)
    a, b = groups(args.words, Path(args.runs))
    if args.bisect:
        return _bisect(args, a, b)
    found = comparison.compare(
        a, b, seed_noise=args.seed_noise / 100, speed_noise=args.speed_noise / 100, level=args.level
    )
    if args.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        console = Console()
        console.say(f"A: {' '.join(s.facts.name for s in found.a)}")
        console.say(f"B: {' '.join(s.facts.name for s in found.b)}")
        console.say(words.headline(found), "bold")
        console.say(words.speed_line(found), "bold")
        console.say()
        console.show(words.table(found))
        console.say()
        for line in words.lines(found):
            console.say(line)
    return int(args.fail_if_worse and found.is_worse)


def _compare_results(args: argparse.Namespace) -> int:
    """Compare two files of `shoal bench --out`."""
    from shoal.bench.result import read_result
    from shoal.bench.versus import compare_results
    from shoal.run.console import Console

    if len(args.words) != 2 or not all(word.endswith(".json") for word in args.words) or args.bisect:
        raise ShoalError(
            "compare takes two files of shoal bench --out, shoal compare A.json B.json, or runs; --bisect takes runs"
        )
    a, b = (read_result(Path(word)) for word in args.words)
    found = compare_results(a, b, noise=args.speed_noise / 100, level=args.level)
    if args.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        console = Console()
        console.say(f"A: {args.words[0]}: shoal {a.verb}, {a.date}")
        console.say(f"B: {args.words[1]}: shoal {b.verb}, {b.date}")
        for line in found.lines():
            console.say(line, "yellow" if line.startswith("warning: ") else "")
    return int(args.fail_if_worse and found.is_worse)


def _bisect(args: argparse.Namespace, a: Sequence[RunFacts], b: Sequence[RunFacts]) -> int:
    from shoal.launch.torchrun import set_environment
    from shoal.run.console import Console

    if len(a) != 1 or len(b) != 1:
        raise RunError("--bisect compares one run with one other: shoal compare A B --bisect")
    set_environment(1)  # before torch is imported: a bitwise run has one thread
    from shoal.report.compare.bisect import bisect
    from shoal.report.compare.series import Series

    console = Console(on_stderr=args.json)
    found = bisect(Series.read(a[0]), Series.read(b[0]), console.note)
    if args.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        from shoal.report.compare.words import parting_line

        console.say(parting_line(found.recorded, a[0].name, b[0].name))
        for line in found.said:
            console.say(line, "bold")
    return 0


def groups(words: Sequence[str], runs: Path) -> tuple[list[RunFacts], list[RunFacts]]:
    """Return the runs on each side of `A B` or `A1 A2 vs B1 B2`. A word with * is a pattern of names. Raises `RunError`."""
    from shoal.report.runs.facts import RunFacts

    at = [i for i, word in enumerate(words) if word == VERSUS]
    if len(at) == 1:
        sides = [words[: at[0]], words[at[0] + 1 :]]
    elif not at and len(words) == 2:
        sides = [words[:1], words[1:]]
    else:
        sides = []
    if not all(sides) or not sides:
        raise RunError("compare needs two runs, or two groups with vs between them: shoal compare a1 a2 vs b1 b2")
    found = [[RunFacts.read(folder) for word in side for folder in _named(word, runs)] for side in sides]
    return found[0], found[1]


def _named(word: str, runs: Path) -> list[RunFolder]:
    """Return the run with this name or folder, or all whose names match a pattern. Raises `RunError` if there is none."""
    from shoal.run.folder import RunFolder

    if "*" in word or "?" in word:
        found = [RunFolder(path.parent) for path in sorted(runs.glob(f"{word}/config.yaml"))]
        if not found:
            raise RunError(f"no run in {on_one_line(runs)} has a name like {on_one_line(word)}; shoal runs lists them")
        return found
    folder = RunFolder.named(word, runs)
    folder.load_config()
    return [folder]
