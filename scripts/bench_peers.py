"""
Time shoal beside other trainers on the same model, batch, tokens and initial weights: `python scripts/bench_peers.py`.

Each peer is installed into an environment of its own, `build/peers/NAME`; one that does not install is reported and skipped.
Contenders, each in a process of its own, take their steps in turns, and ratios are those of neighboring steps. Every finished
turn is kept in `build/peers/results.jsonl`: the same command resumes. When all turns are done, it writes the page and its
pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from scripts.peers.inputs import SHAPES, prepare, recipe_of
from scripts.peers.installs import PEERS, install
from scripts.peers.page import NO_BFLOAT16, Bench, write_page
from scripts.peers.timings import Case, Timing, Turn, of_turn, read, take, turns

from shoal.system.cpu import count_cores, multiplies_bfloat16

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "peers"
FEWEST_STEPS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Install, time and write. Return 0, or 1 if turns are left."""
    asked = _arguments(argv)
    FOLDER.mkdir(parents=True, exist_ok=True)
    errors = install(asked.peers, FOLDER)
    dtypes = [dtype for dtype in asked.dtypes if dtype != "bfloat16" or multiplies_bfloat16()]
    if dtypes != asked.dtypes:
        print(f"{NO_BFLOAT16}: skipped", file=sys.stderr)
    cases = [make_case(shape, dtype, asked) for shape in asked.shapes for dtype in dtypes]
    planned = turns(cases, [name for name in asked.peers if name not in errors], asked.repeats)
    timings = time_turns(planned, FOLDER / "results.jsonl", asked.minutes)
    left = sum(not of_turn(turn, timings) for turn in planned)
    if left:
        print(f"{len(planned) - left} of {len(planned)} turns are timed; the same command continues", file=sys.stderr)
        return 1
    command = " ".join(["python scripts/bench_peers.py", *(sys.argv[1:] if argv is None else argv)])
    write_page(Bench(command, planned, timings, errors), asked.out)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=_names(PEERS), default=list(PEERS), help=f"of {','.join(PEERS)}")
    parser.add_argument("--shapes", type=_names(SHAPES), default=list(SHAPES), help=f"of {','.join(SHAPES)}")
    parser.add_argument("--dtypes", type=_names(("float32", "bfloat16")), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each peer")
    parser.add_argument("--steps", type=int, help="optimizer steps of a run, at least 5; default: the shape's")
    parser.add_argument(
        "--threads", type=int, default=count_cores(), help="CPU threads of each contender; default: the cores"
    )
    parser.add_argument("--minutes", type=float, help="start no turn after this time; the same command continues later")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the page and its pictures"
    )
    asked = parser.parse_args(argv)
    if asked.steps is not None and asked.steps < FEWEST_STEPS:
        parser.error(f"--steps {asked.steps}: the first steps warm up; at least {FEWEST_STEPS} are needed")
    return asked


def _names(known):  # type: ignore[no-untyped-def]
    """Return an argparse type: a list of known names, separated by commas."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
        return found

    return names


def make_case(shape: str, dtype: str, asked: argparse.Namespace) -> Case:
    """Return a case, with the files that all contenders read."""
    threads, steps = asked.threads, asked.steps
    folder = FOLDER / "inputs" / shape
    folder.mkdir(parents=True, exist_ok=True)
    options = {"train.dtype": dtype} | ({"train.steps": str(steps)} if steps else {})
    one = recipe_of(shape, FOLDER, options | {"launch.processes": "1", "launch.threads": str(threads)})
    halves = {
        "launch.processes": "2",
        "launch.threads": str(max(1, threads // 2)),
        "train.micro_batch": str(one.train.global_batch // 2),
    }
    split = recipe_of(shape, FOLDER, options | halves)
    return Case(shape, dtype, prepare(one, folder), folder, one, split)


def time_turns(planned: Sequence[Turn], results: Path, minutes: float | None) -> list[Timing]:
    """Take the turns that are due, until the time is up; return all timings."""
    begun, timings = time.monotonic(), read(results)
    for turn in planned:
        if of_turn(turn, timings):
            continue
        if minutes is not None and time.monotonic() - begun > 60 * minutes:
            break
        found = take(turn, FOLDER)
        with results.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(timing)) + "\n" for timing in found)
        timings += found
    return timings


if __name__ == "__main__":
    sys.exit(main())
