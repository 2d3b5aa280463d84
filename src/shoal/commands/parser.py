"""The command line's parser: the arguments and help of each verb."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from shoal import __version__
from shoal.commands import data, doctor, machine, models, plan, recipes, records, setup, train
from shoal.commands.bench_parser import add_bench
from shoal.commands.flags import add_options
from shoal.commands.launch_parser import add_launch
from shoal.commands.seeing_parser import add_recipe, add_seeing
from shoal.system.output import visible


def build_parser(verb: str | None, action: str | None = None) -> argparse.ArgumentParser:
    """
    Return the parser; only `verb` gets the options of all config sections, because adding them takes time.

    action: the word after `verb`, for a verb that has actions.
    """
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
    add_recipe(add("train", train.train, "train a model, or resume the run of the same name", recipe))
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
    memory = "show which layouts of a recipe fit given devices, how fast they are and what a run costs; needs no GPU"
    planned = add(
        "plan", plan.plan, memory, "[RECIPE] --devices NxDEVICE [--nodes N]", own={"nodes", "devices", "report"}
    )
    plan.add_arguments(planned)
    timing = "measure this machine: the training step's speed, scaling and memory, reading, saving, generating"
    add_bench(_actions("bench", add("bench", None, timing)), action if verb == "bench" else None)
    checked = "check that this parallel layout trains the same model as one process; exit code 1 if it does not"
    add_recipe(add("verify", train.verify, checked, recipe))
    started = add(
        "launch", None, "start a run on the nodes of a cluster, and follow its jobs: shoal launch slurm RECIPE"
    )
    add_launch(_actions("launch", started), action if verb == "launch" else None)
    add_seeing(add)
    account = "report how a run spent its time, across restarts: on steps that count, and on everything else"
    _add_record(add("goodput", records.goodput, account))
    exactly_once = "check that a run trained on each sample exactly once per epoch, across restarts; exit code 1 if not"
    _add_record(add("ledger", records.ledger, exactly_once))
    meeting = "serve the rendezvous where the nodes of a run meet, on a machine that stays up"
    _add_rendezvous(add("rendezvous", machine.rendezvous, meeting))
    sick = "check the nodes of a cluster, or this machine: what is wrong with which; exit code 1 if a fault is found"
    doctor.add_arguments(add("doctor", doctor.doctor, sick))
    folders = "make a project's folder on the shared disk: environment, caches, cluster.yaml; then check every node"
    setup.add_arguments(add("setup", setup.setup, folders))
    add("env", machine.env, "print versions, devices and threads, for a bug report")
    return parser


def _actions(verb: str, parser: argparse.ArgumentParser) -> Callable[..., _Parser]:
    """Return a function that adds an action of `verb`; see `add` in `build_parser`."""
    actions = parser.add_subparsers(metavar="ACTION", title="actions", required=True, dest="action")

    def make(name: str, run: Any, help: str, usage: str | None = None) -> _Parser:
        sub = actions.add_parser(
            name, help=help, description=help, allow_abbrev=False, formatter_class=_Wide,
            usage=usage and f"shoal {verb} {name} {usage} [--SECTION.OPTION VALUE ...]",
        )  # fmt: skip
        sub.set_defaults(run=run, verb=f"{verb} {name}", verb_parser=sub)
        assert isinstance(sub, _Parser)
        return sub

    return make


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


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
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


def _add_rendezvous(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="HOST:PORT", help="address to listen on, the value of launch.rendezvous")
    parser.add_argument("--while-used", action="store_true", help="exit after 10 seconds without connections")
