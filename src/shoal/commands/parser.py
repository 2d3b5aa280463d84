"""The command line's parser: the arguments and help of each verb."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from shoal import __version__
from shoal.commands import (
    comparing,
    dashboard,
    data,
    live,
    machine,
    models,
    plot,
    profile,
    recipes,
    records,
    report,
    sync,
    train,
)
from shoal.commands.flags import add_options
from shoal.system.output import visible


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """Return the parser; only `verb` gets the options of all config sections, because adding them takes time."""
    parser = _Parser(
        prog="shoal", description="Train language models from scratch, on whatever you have.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    parser.set_defaults(verb=None)
    subparsers = parser.add_subparsers(metavar="VERB", title="verbs")

    def add(name: str, run: Any, help: str, usage: str | None = None, own: Collection[str] = ()) -> _Parser:
        """Add a verb; a verb with a `usage` takes the options of all config sections. own: see `add_options`."""
        sub = subparsers.add_parser(
            name, help=help, description=help, allow_abbrev=False, formatter_class=_Wide,
            usage=usage and f"shoal {name} {usage} [--SECTION.OPTION VALUE ...]",
        )  # fmt: skip
        sub.set_defaults(run=run, verb=name, verb_parser=sub)
        if usage and verb == name:
            add_options(sub, own)
        return sub

    recipe = "[RECIPE] [--name NAME] [--processes N]"
    _add_init(add("init", recipes.init, "write a commented recipe to start from"))
    _add_recipe(add("train", train.train, "train a model, or resume the run of the same name", recipe))
    prepared = "prepare the data only: corpus -> tokenizer -> token shards; a restart continues"
    _add_prepare(add("prepare", recipes.prepare, prepared, f"{recipe} [--check]"))
    look = "show what a model will read: shoal data RECIPE_OR_RUN; where RUN --document N, at RUN --step N"
    _add_data(add("data", data.data, look, "[where|at] RECIPE_OR_RUN [--rows N]"))
    _add_fetch(add("fetch", models.fetch, "download a model or a dataset from a hub: shoal fetch data tinystories"))
    evaluated = "evaluate a model: on its run's held-out text, on your text, or on lm-evaluation-harness tasks"
    _add_eval(add("eval", models.eval, evaluated))
    _add_generate(add("generate", models.generate, "generate text from a prompt, or chat"))
    exported = "export a checkpoint as a Hugging Face folder, for transformers, vLLM or llama.cpp"
    _add_export(add("export", models.export, exported))
    resolved = "print the resolved config and the origin of each value"
    _add_config(add("config", recipes.config, resolved, "[RECIPE] [--schema]"))
    timing = "run a benchmark: `shoal bench speed` times the real training step"
    _add_bench(add("bench", machine.bench, timing, "speed [RECIPE] [--peers]"))
    checked = "check that this parallel layout trains the same model as one process; exit code 1 if it does not"
    _add_recipe(add("verify", train.verify, checked, recipe))
    _add_top(
        add("top", live.top, "show a run while it trains, from any terminal: loss, speed, memory, time left, alerts")
    )
    tested = "post a test message to the webhook of a recipe's alerts"
    _add_recipe(add("alert", live.alert, tested, "[RECIPE]"))
    recorded = "record a few steps: dearest operators, modules, memory, overlap, and a trace that Perfetto opens"
    which = "[RECIPE_OR_RUN] [--steps 10..12] [--ranks 0,1]"
    _add_profile(add("profile", profile.profile, recorded, which, own=["steps"]))
    account = "report how a run spent its time, across restarts: on steps that count, and on everything else"
    _add_record(add("goodput", records.goodput, account))
    _add_runs(add("runs", comparing.runs, "list runs: state, steps, losses, speed, and which options differ"))
    noise = "compare two runs, or two groups of seeds: whether loss and speed differ beyond noise, and from which step"
    _add_compare(add("compare", comparing.compare, noise))
    exactly_once = "check that a run trained on each sample exactly once per epoch, across restarts; exit code 1 if not"
    _add_record(add("ledger", records.ledger, exactly_once))
    drawn = "draw a picture as PNG or SVG: loss curves, a run in detail, the architecture, or a summary card"
    _add_plot(add("plot", plot.plot, drawn, "{loss,details,architecture,card} RUN..."))
    page = "write a report of runs: one HTML file with their curves, time, ranks, events and configs"
    _add_report(add("report", report.report, page))
    replayed = "send a run's records to a tracker, as a whole: shoal sync RUN wandb"
    _add_sync(add("sync", sync.sync, replayed))
    meeting = "serve the rendezvous where the nodes of a run meet, on a machine that stays up"
    _add_rendezvous(add("rendezvous", machine.rendezvous, meeting))
    served = "serve a live page of all runs in a folder, to this machine only"
    _add_dashboard(add("dashboard", dashboard.dashboard, served))
    add("env", machine.env, "print versions, devices and threads, for a bug report")
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors suggest the nearest valid word, and show control characters as escapes."""

    def near_flag(self, flag: str) -> str | None:
        """Return this verb's own flag that is nearest to `flag` in spelling, or None."""
        flags = re.findall(r"--[a-z][\w.-]*", self.format_usage())
        return next(iter(difflib.get_close_matches(flag, flags, 1, cutoff=0.75)), None)

    def error(self, message: str) -> NoReturn:
        """Report argparse's error, with a suggestion for a mistyped choice."""
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong and (near := difflib.get_close_matches(wrong[1], re.findall(r"[\w.-]+", wrong[2]), 1)):
            message += f"; did you mean {near[0]}?"
        super().error(visible(message))


class _Wide(argparse.HelpFormatter):
    """A formatter that puts an option and its help on one line if they fit."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=42, width=min(140, max(100, _columns())))


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size((120, 24)).columns


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE",
        help="a YAML file, or the name of a built-in recipe, such as quickstart",
    )  # fmt: skip


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


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument(
        "--check", action="store_true", help="read all tokens: compare checksums, or each id with the vocabulary"
    )


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="FILE.yaml", help="file to write; an existing file is not overwritten"
    )


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    from shoal.hub.catalog import CATALOG

    parser.add_argument("kind", choices=["model", "data"], help="what to fetch")
    named = f"a model's name on the hub: OWNER/NAME; or a dataset: {', '.join(CATALOG)}, or hf:OWNER/NAME"
    parser.add_argument("name", metavar="NAME", help=named)
    folders = "folder to fetch to (default: models/OWNER/NAME or datasets/OWNER/NAME)"
    parser.add_argument("--to", type=Path, metavar="DIR", help=folders)
    parser.add_argument(
        "--revision", metavar="R", help="branch, tag or commit (default: the one already downloaded, else main)"
    )
    parser.add_argument(
        "--force", action="store_true", help="download again; the old copy stays until the new one is complete"
    )
    parser.add_argument(
        "--verify", action="store_true", help="check the hashes of existing files, not only their sizes"
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="[where|at] RECIPE_OR_RUN",
        help="a recipe or a run; where: the steps that read a document of a run; at: the documents that a step reads",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show as text (default: 3)")
    parser.add_argument("--document", metavar="N", help="with where: a document's number or, in a blend, SOURCE:N")
    parser.add_argument("--step", type=int, metavar="N", help="with at: the step")
    parser.add_argument("--json", action="store_true", help="with where and at: print JSON instead")


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_run(parser, device=False)
    parser.add_argument("--to", choices=["hf"], default="hf", help="format: hf is a Hugging Face folder (default: hf)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype",
        type=_dtype,
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the weights (default: each tensor's original dtype if the run started from weights, else float32)",
    )
    parser.add_argument(
        "--license", metavar="ID", help="license in the model card, as hubs spell it, such as apache-2.0"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing export")


def _dtype(text: str) -> str:
    """Expand the short name of a dtype, such as bf16; return any other text unchanged."""
    from shoal.config.options import DTYPE_SPELLINGS

    return DTYPE_SPELLINGS.get(text.lower(), text)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        metavar="RECIPE",
        help="a YAML file, or the name of a built-in recipe, such as quickstart",
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of recipes instead")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["speed"],
        help="speed: tokens/s, the step's time by phase, MFU, and model FLOP/s relative to a matrix product",
    )
    parser.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        metavar="RECIPE",
        help="a YAML file or a built-in recipe (default: a 10M-parameter model on generated text)",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also time transformers.Trainer on the same architecture (needs shoal[peers])",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="runs of each contender, alternating; the result is the median (default: 5)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead; progress goes to stderr")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--text", type=Path, metavar="FILE", help="score this UTF-8 text, in sliding windows")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="with --text: window length in tokens (default: the model's context, at most 2048)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="M",
        help="with --text: tokens from one window's start to the next; each token is scored once, after at least context - "
        "stride earlier tokens (default: half the context)",
    )
    parser.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="lm-evaluation-harness tasks, separated by commas, such as hellaswag (needs shoal[eval])",
    )
    parser.add_argument(
        "--include-path", type=Path, metavar="DIR", help="with --tasks: folder with your own tasks (*.yaml)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="with --tasks: maximum documents of each task")
    parser.add_argument(
        "--num-fewshot",
        type=int,
        metavar="K",
        help="with --tasks: examples before each question (default: the task's own number)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead; progress goes to stderr")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; repeat the option for several prompts"
    )
    parser.add_argument("--chat", action="store_true", help="chat, with the model's own chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="maximum new tokens (default: 100; 512 for each answer of --chat)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="sampling temperature; 0 always takes the likeliest token (default: 0.8)",
    )
    parser.add_argument(
        "--top-k", type=int, default=None, metavar="K", help="sample from the K likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=None,
        metavar="P",
        help="sample from the likeliest tokens that together have probability P (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed (default: 0)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a model: a run, or a folder of weights."""
    _add_run(parser, optional=True)
    parser.add_argument(
        "--model.from",
        dest="model_from",
        metavar="DIR",
        help="instead of a RUN: a Hugging Face folder, or the name of a downloaded model",
    )
    parser.add_argument(
        "--model.family",
        dest="model_family",
        choices=["hf"],
        default=None,
        help="with --model.from: hf runs the model through transformers (default: shoal's own code)",
    )
    parser.add_argument(
        "--dtype",
        type=_dtype,
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="compute dtype (default: auto, the model's own if it is fast on this device, else float32)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: one per core, fewer if other programs use the cores)",
    )


def _add_run(parser: argparse.ArgumentParser, *, device: bool = True, optional: bool = False) -> None:
    parser.add_argument("target", metavar="RUN", nargs="?" if optional else None, help="name or folder of a run")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds all runs (default: runs)")
    parser.add_argument(
        "--step", type=int, default=None, metavar="N", help="use the checkpoint of step N (default: the last)"
    )
    if not device:
        return
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="device to compute on; auto: CUDA if available (default: auto)",
    )


def _add_record(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a verb that reads a run's records."""
    parser.add_argument("target", metavar="RUN", help="name or folder of a run")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds all runs (default: runs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("targets", nargs="+", metavar="RUN", help="names or folders of runs")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder that holds all runs (default: runs)")
    out = "file to write (default: report.html in the run's folder; of several runs, in the folder of all runs)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)
    formats = "html, md, or both with a comma between (default: the ending of --out)"
    parser.add_argument("--format", metavar="FORMAT,...", help=formats)


def _add_plot(parser: argparse.ArgumentParser) -> None:
    whats = "loss: training and held-out loss of one or several runs; details: throughput, memory, time split and goodput of a run; "
    parser.add_argument(
        "what", choices=["loss", "details", "architecture", "card"],
        help=whats + "architecture: blocks, shapes and ranks of a run or a recipe; card: a summary of a run, 1200 x 630 pixels",
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
        metavar="A B | A1 A2 vs B1 B2",
        help="names or folders of runs, or patterns such as 'base-*'",
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
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _percent(text: str) -> float:
    value = float(text)
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 100")
    return value


def _add_dashboard(parser: argparse.ArgumentParser) -> None:
    folder = "folder that holds all runs, or the folder of one (default: runs)"
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"), metavar="DIR", help=folder)
    parser.add_argument("--port", type=int, metavar="N", help="port on 127.0.0.1 (default: a free one from 6464 on)")


def _add_rendezvous(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="HOST:PORT", help="address to listen on, the value of launch.rendezvous")
    parser.add_argument("--while-used", action="store_true", help="exit after 10 seconds without connections")
