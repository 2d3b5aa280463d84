"""The arguments and help of the verbs that show a run: while it trains, as a page or picture, and beside other runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

from shoal.commands import comparing, dashboard, live, plot, profile, report, sync


class Adds(Protocol):
    """Adds a verb to the command line and returns its parser; see `build_parser`."""

    def __call__(
        self, name: str, run: Any, help: str, usage: str | None = None, own: Collection[str] = ()
    ) -> argparse.ArgumentParser: ...


def add_seeing(add: Adds) -> None:
    """Add these verbs."""
    shown = "show a run while it trains, from any terminal: loss, speed, memory, time left, alerts"
    _add_top(add("top", live.top, shown))
    served = "serve a live page of all runs in a folder, to this machine only"
    _add_dashboard(add("dashboard", dashboard.dashboard, served))
    page = "write a report of runs: one HTML file with their curves, time, ranks, events and configs"
    _add_report(add("report", report.report, page))
    _add_runs(add("runs", comparing.runs, "list runs: state, steps, losses, speed, and which options differ"))
    noise = "compare two runs, two groups of seeds, or two results of shoal bench: what differs beyond noise"
    _add_compare(add("compare", comparing.compare, noise))
    drawn = "draw a picture as PNG or SVG: loss curves, a run in detail, the architecture, or a summary card"
    _add_plot(add("plot", plot.plot, drawn, "{loss,details,architecture,card} RUN..."))
    recorded = "record a few steps: dearest operators, modules, memory, overlap, and a trace that Perfetto opens"
    which = "[RECIPE_OR_RUN] [--steps 10..12] [--ranks 0,1]"
    _add_profile(add("profile", profile.profile, recorded, which, own=["steps"]))
    replayed = "send a run's records to a tracker, as a whole: shoal sync RUN wandb"
    _add_sync(add("sync", sync.sync, replayed))
    add_recipe(add("alert", live.alert, "post a test message to the webhook of a recipe's alerts", "[RECIPE]"))


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the argument of a verb that takes a recipe."""
    parser.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE",
        help="a YAML file, or the name of a built-in recipe, such as quickstart",
    )  # fmt: skip


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="+", metavar="RUN", help="names or folders of runs")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds all runs (default: runs)")
    out = "file to write (default: report.html in the run's folder; of several runs, in the folder of all runs)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)
    formats = "some of html, md, png and svg, with commas between: pictures are a summary card of one run, or losses of several (default: the ending of --out)"
    parser.add_argument("--format", metavar="FORMAT,...", help=formats)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    drawings = "loss: training and held-out loss of one or several runs; details: throughput, memory, time split and goodput of a run; "
    parser.add_argument(
        "what", choices=["loss", "details", "architecture", "card"],
        help=drawings + "architecture: blocks, shapes and ranks of a run or a recipe; card: a summary of a run, 1200 x 630 pixels",
    )  # fmt: skip
    parser.add_argument(
        "targets", nargs="+", metavar="RUN", help="name or folder of a run; architecture: also a recipe"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a .png or .svg file (default: RUN/plots/WHAT.png; of several runs or a recipe, WHAT.png)",
    )
    parser.add_argument(
        "--x",
        choices=["step", "tokens", "flops", "seconds"],
        default="tokens",
        help="loss: the x axis (default: tokens)",
    )
    parser.add_argument(
        "--smooth",
        type=_positive,
        default=1,
        metavar="N",
        help="loss: draw the mean of N steps; the band still has every step",
    )
    parser.add_argument("--log", action="store_true", help="loss: a logarithmic loss axis")
    prices = "card: a table of prices by device (default: prices.yaml beside the runs; without one, devices cost 0)"
    parser.add_argument("--prices", type=Path, metavar="FILE", help=prices)


def _positive(text: str) -> int:
    """Return a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 1")
    return int(text)


def _add_sync(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="RUN", help="name or folder of a run")
    parser.add_argument("tracker", metavar="TRACKER", help="tensorboard, wandb, comet or mlflow")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds all runs (default: runs)")
    for name, what in {
        "project": "project in W&B and Comet, experiment in MLflow", "entity": "W&B team or user", "workspace": "Comet workspace",
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", metavar="NAME", help=f"{what} (default: the run's track.{name})")
    parser.add_argument("--offline", action="store_true", help="write into the run's folder, without a network")


def _add_top(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "targets", metavar="RUN", nargs="*", help="names or folders of runs (default: the newest running run)"
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds all runs (default: runs)")
    parser.add_argument(
        "--every", type=_seconds, metavar="S", help="seconds between two looks (default: 1; 10 without a terminal)"
    )
    parser.add_argument("--once", action="store_true", help="show the run once and exit")
    parser.add_argument(
        "--quiet", action="store_true", help="print lines only for alerts and when the run starts or ends"
    )
    parser.add_argument("--json", action="store_true", help="print the state as one JSON object and exit")


def _seconds(text: str) -> float:
    """Return a positive number of seconds. Raises `ArgumentTypeError` for anything else."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds between 0 and 86400")
    return seconds


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("runs"),
        metavar="FOLDER",
        help="folder of all runs (default: runs)",
    )
    parser.add_argument(
        "--sort", choices=["loss", "time", "name"], default="name",
        help="loss: best held-out loss first; time: last started first (default: name)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="+",
        metavar="A B | A1 A2 vs B1 B2 | A.json B.json",
        help="names or folders of runs, or patterns such as 'base-*'; or two files that shoal bench --out wrote",
    )
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds all runs (default: runs)")
    parser.add_argument(
        "--level",
        type=_probability,
        default=0.01,
        metavar="P",
        help="probability of calling equal groups different (default: 0.01)",
    )
    parser.add_argument(
        "--seed-noise", type=_percent, default=1.0, metavar="PERCENT",
        help="with one run on each side: assumed standard deviation of the loss between seeds, in percent (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--speed-noise", type=_percent, default=2.0, metavar="PERCENT",
        help="with one run on each side: assumed standard deviation of the speed between runs, in percent (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--bisect", action="store_true",
        help="with two runs of train.repro bitwise: find the first step and the first tensor that differ, by repeating steps "
        "from their checkpoints",
    )  # fmt: skip
    parser.add_argument("--fail-if-worse", action="store_true", help="exit with code 1 if B is worse in loss or speed")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _probability(text: str) -> float:
    return _between(text, 0, 1, valid=lambda value: 0 < value < 1)


def _percent(text: str) -> float:
    return _between(text, 0, 100, valid=lambda value: 0 <= value < 100)


def _between(text: str, low: int, high: int, *, valid: Callable[[float], bool]) -> float:
    """Return the number in `text`. Raises ArgumentTypeError for any other text, and for an invalid number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not valid(value):
        raise argparse.ArgumentTypeError(f"{text} is not a number between {low} and {high}")
    return value


def _add_dashboard(parser: argparse.ArgumentParser) -> None:
    folder = "folder that holds all runs, or the folder of one (default: runs)"
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help=folder)
    parser.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1 (default: a free one from 6464 on)")


def _add_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE_OR_RUN",
        help="a recipe, which is trained from the start, or a run, which is trained from a copy of its checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--steps", metavar="FIRST..LAST",
        help="steps to record, both included (default: 3 steps after 9 others, fewer if the run is shorter)",
    )  # fmt: skip
    parser.add_argument("--ranks", metavar="N,...", help="ranks to record, separated by commas (default: all)")
    parser.add_argument(
        "--checkpoint", type=int, metavar="N",
        help="with a RUN: start from its checkpoint of step N; 0: from the beginning (default: the newest before the steps)",
    )  # fmt: skip
