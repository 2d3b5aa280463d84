"""The command line: what each verb takes, and how a command ends. `verbs.py` says what each does."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from shoal import __version__, verbs
from shoal.errors import EXIT_BAD_INPUT, EXIT_REQUEUE, ShoalError
from shoal.system.output import Output, say_error, visible
from shoal.system.secrets import secret_in
from shoal.system.signals import Asked
from shoal.verbs import Override

SAID_TO_A_MODEL = ("--prompt", "--system")  # text, in which an address is only an address
EXIT_BROKEN_PIPE = 141  # as a shell says of what SIGPIPE ended
SHORTCUTS = {"name": "launch.name", "processes": "launch.processes"}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The `shoal` command; ends the process, with 2 on what a person can mend."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a model writes what it likes, also where a terminal lacks it
    sys.stdout = stdout = Output(sys.stdout)
    code = 0
    try:
        code = _run(argv)
    except ShoalError as error:
        code = _say(str(error))
    except Asked as asked:
        if asked.code == EXIT_REQUEUE:
            print("shoal: stopped; the same command goes on", file=sys.stderr)
        _leave(asked.code, at_once=True)
    except KeyboardInterrupt:
        print("shoal: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        stdout.silence()
        code = EXIT_BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (
            errno.ENAMETOOLONG,
            errno.ELOOP,
        ):  # of whatever path was given
            code = _say(f"{str(error.filename)[:60]}...: {error.strerror}; give a shorter path")
        else:  # a bug of ours: the traceback, and an end as clean as any other
            traceback.print_exc()
            code = 1
    _leave(code)


def _say(message: str) -> int:
    """Tell it once for all processes of a run; the exit code."""
    from shoal.mesh.place import report_to_launcher

    if not report_to_launcher(message):
        say_error(message)
    return EXIT_BAD_INPUT


def _leave(code: int, *, at_once: bool = False) -> NoReturn:
    """
    End the process now. A thread of a communication library that outlives Python would abort it; other threads would be
    waited for, unless `at_once`.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_BROKEN_PIPE
    except ShoalError as error:
        say_error(str(error))
        code = code or EXIT_BAD_INPUT
    sys.stderr.flush()
    if at_once or "torch" in sys.modules:
        os._exit(code)
    sys.exit(code)


def _run(argv: list[str]) -> int:
    for before, item in zip(["shoal", *argv], argv, strict=False):
        if before not in SAID_TO_A_MODEL and (what := secret_in(item)):
            flag = item.partition("=")[0] if item.startswith("--") else before
            raise ShoalError(f"what follows {flag}: {what}")
    _refuse_unreadable(argv)
    parser = build_parser(argv[0] if argv else None)
    args, rest = parser.parse_known_args(argv)
    if args.verb is None:
        parser.print_help()
        return 0
    overrides, stray = read_overrides(args, rest)
    if stray:
        named = [item.partition("=")[0] for item in stray if item.startswith("-")] or stray  # values may be secrets
        near = [n for n in map(args.verb_parser.near_flag, named) if n]
        hint = f"did you mean {' '.join(near)}?" if near else f"see shoal {args.verb} --help"
        raise ShoalError(f"shoal {args.verb} does not take {' '.join(named)}; {hint}")
    result: int = args.run(args, overrides, argv) or 0
    return result


def _refuse_unreadable(argv: list[str]) -> None:
    """Raise `ShoalError` for bytes that are no text: no config, no record of a run could hold them."""
    from shoal.resolve.recipe import not_text

    for before, item in zip(["shoal", *argv], argv, strict=False):
        if why := not_text(item):
            raise ShoalError(f"what follows {before if not not_text(before) else 'it'}: {why}")


# --- the verbs -------------------------------------------------------------------------------------------


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; the options of all sections are added only to the verb that is asked for."""
    parser = _Parser(
        prog="shoal", description="Train language models from scratch, on whatever you have.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    parser.set_defaults(verb=None)
    subparsers = parser.add_subparsers(metavar="VERB", title="verbs")

    def add(name: str, run: Any, help: str, usage: str | None = None) -> _Parser:
        """A verb; one with a `usage` takes the options of all sections."""
        sub = subparsers.add_parser(
            name, help=help, description=help, allow_abbrev=False, formatter_class=_Wide,
            usage=usage and f"shoal {name} {usage} [--SECTION.OPTION VALUE ...]",
        )  # fmt: skip
        sub.set_defaults(run=run, verb=name, verb_parser=sub)
        if usage and verb == name:
            _add_options(sub)
        return sub

    recipe = "[RECIPE] [--name NAME] [--processes N]"
    _add_init(add("init", verbs.init, "write a recipe to start from, with a comment on each line"))
    _add_recipe(add("train", verbs.train, "train a model, or go on with a run of the same name", recipe))
    _add_recipe(
        add("prepare", verbs.prepare, "only the data: corpus -> tokenizer -> token shards; restartable", recipe)
    )
    _add_fetch(add("fetch", verbs.fetch, "a model from a hub, once and whole; shoal fetch model OWNER/NAME"))
    held = "how good a model is: on a run's held-out text, on a text of yours, on tasks of a harness"
    _add_eval(add("eval", verbs.eval, held))
    _add_generate(add("generate", verbs.generate, "let a model write, or talk with it"))
    opened = "a checkpoint as a folder that transformers, vLLM, llama.cpp open"
    _add_export(add("export", verbs.export, opened))
    resolved = "the resolved config, with where each value came from"
    _add_config(add("config", verbs.config, resolved, "[RECIPE] [--schema]"))
    timed = "measure: `shoal bench speed` times the real training step"
    _add_bench(add("bench", verbs.bench, timed, "speed [RECIPE] [--peers]"))
    same = "a certificate: does this layout train what one process would? Exit code 1 if not"
    _add_recipe(add("verify", verbs.verify, same, recipe))
    spent = "where the time of a run went, across restarts: steps that count, and all the rest"
    _add_record(add("goodput", verbs.goodput, spent))
    once = "a proof: did a run train on each sample once an epoch, whatever died? Exit code 1 if not"
    _add_record(add("ledger", verbs.ledger, once))
    met = "a place where the machines of a run meet, kept on one that stays"
    _add_rendezvous(add("rendezvous", verbs.rendezvous, met))
    add("env", verbs.env, "versions, devices, threads: what to paste into a bug report")
    return parser


class _Parser(argparse.ArgumentParser):
    """Names what a mistyped word may have meant; what it refuses may hold anything, and is shown as all else is."""

    def near_flag(self, flag: str) -> str | None:
        """A flag of this verb's own that is called much like `flag`."""
        flags = re.findall(r"--[a-z][\w.-]*", self.format_usage())
        return next(iter(difflib.get_close_matches(flag, flags, 1, cutoff=0.75)), None)

    def error(self, message: str) -> NoReturn:
        """As argparse has it, with a hint where it is a choice that there is not."""
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong and (near := difflib.get_close_matches(wrong[1], re.findall(r"[\w.-]+", wrong[2]), 1)):
            message += f"; did you mean {near[0]}?"
        super().error(visible(message))


class _Wide(argparse.HelpFormatter):
    """Options and their help on one line where they fit."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=42, width=min(140, max(100, _columns())))


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size((120, 24)).columns


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE",
        help="what to train: a YAML file, or a recipe of shoal's own by its name, such as quickstart",
    )  # fmt: skip


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="where to write it; nothing is overwritten")


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=["model"], help="what to fetch")
    parser.add_argument("name", metavar="NAME", help="as its page on the hub has it: OWNER/NAME")
    parser.add_argument("--to", type=Path, metavar="DIR", help="the model's folder (default: models/NAME)")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit (default: what is there, or else main)")
    parser.add_argument(
        "--force", action="store_true", help="fetch it anew; the old one stands until the new one is whole"
    )
    parser.add_argument("--verify", action="store_true", help="hash what is there, not only its sizes")


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_run(parser, device=False)
    parser.add_argument("--to", choices=["hf"], default="hf", help="the layout: Hugging Face's (default: hf)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--dtype",
        type=_dtype,
        choices=["float32", "bfloat16", "float16"],
        help="of the weights (default: each as it was where it started from weights, else float32)",
    )
    parser.add_argument("--license", metavar="ID", help="for the model card, as hubs name it: apache-2.0")
    parser.add_argument("--force", action="store_true", help="replace an export that is there")


def _dtype(text: str) -> str:
    """With the short names that people have for them."""
    from shoal.config.options import DTYPE_SPELLINGS

    return DTYPE_SPELLINGS.get(text.lower(), text)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE", help="a YAML file, or a name such as quickstart"
    )
    parser.add_argument("--schema", action="store_true", help="print a JSON schema of recipes instead")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=["speed"],
        help="speed: tokens/s, the time split of the real step, and MFU or its rate beside a matrix product",
    )
    parser.add_argument(
        "recipe", type=Path, nargs="?", metavar="RECIPE", help="default: a 10M-parameter model on dummy text"
    )
    parser.add_argument(
        "--peers", action="store_true", help="beside transformers.Trainer on the same architecture (needs shoal[peers])"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="runs of each, in turn; the median counts (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="score this text (UTF-8), in windows that slide over it"
    )
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="with --text: tokens of a window (default: the model's context, at most 2048)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="M",
        help="with --text: tokens from one window to the next; each token is scored once, after at least context - stride "
        "others (default: half the context)",
    )
    parser.add_argument(
        "--tasks", metavar="NAME,...", help="tasks of lm-evaluation-harness, such as hellaswag (needs shoal[eval])"
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="with --tasks: tasks of your own (*.yaml)")
    parser.add_argument("--limit", type=int, metavar="N", help="with --tasks: documents of each at most")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="K", help="with --tasks: examples before each question (default: the task's)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="what it goes on from; may be given several times"
    )
    parser.add_argument("--chat", action="store_true", help="a conversation, in the model's own chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told first")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="new tokens at most (default: 100; an answer of --chat: 512)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest (default: 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, default=None, metavar="K", help="draw among the K likeliest only (default: all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=None,
        metavar="P",
        help="draw among the likeliest that make up P of the probability (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the drawing (default: 0)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    """A run, or a folder of weights."""
    _add_run(parser, optional=True)
    parser.add_argument(
        "--model.from",
        dest="model_from",
        metavar="DIR",
        help="instead of a RUN: a Hugging Face folder, or the name of one that is on this machine",
    )
    parser.add_argument(
        "--model.family",
        dest="model_family",
        choices=["hf"],
        default=None,
        help="with --model.from: hf, to compute it through transformers (default: the code here)",
    )
    parser.add_argument(
        "--dtype",
        type=_dtype,
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the arithmetic (default: auto, a run's or a folder's own where the device is good at it, else float32)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: a core each, fewer where other programs use them)",
    )


def _add_run(parser: argparse.ArgumentParser, *, device: bool = True, optional: bool = False) -> None:
    parser.add_argument("target", metavar="RUN", nargs="?" if optional else None, help="a run's name, or its folder")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of all runs (default: runs)")
    parser.add_argument(
        "--step", type=int, default=None, metavar="N", help="the checkpoint of step N (default: the last)"
    )
    if not device:
        return
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute (default: auto)"
    )


def _add_record(parser: argparse.ArgumentParser) -> None:
    """What a run wrote about itself."""
    parser.add_argument("target", metavar="RUN", help="a run's name, or its folder")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder of all runs (default: runs)")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def _add_rendezvous(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("address", metavar="HOST:PORT", help="where: what launch.rendezvous says")
    parser.add_argument("--while-used", action="store_true", help="end when nobody has been connected for 10 seconds")


class _Take(argparse.Action):
    """Append (key, text, flag) to `overrides`, as they come on the command line."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        namespace.overrides = [*namespace.overrides, (self.dest, values, flag)]


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Every option of the config as a dotted flag, and by each name that it has here or in other projects."""
    from shoal.config.options import SECTIONS, options
    from shoal.resolve.resolve import expectation

    parser.set_defaults(overrides=[])
    groups = {name: parser.add_argument_group(name, (cls.__doc__ or "").strip()) for name, cls in SECTIONS.items()}

    def add(flags: list[str], key: str, help: str, *, is_bool: bool, to: Any) -> None:
        to.add_argument(
            *flags, dest=key, action=_Take, metavar="VALUE", default=argparse.SUPPRESS, help=help,
            nargs="?" if is_bool else None, const="true" if is_bool else None,
        )  # fmt: skip

    for short, key in SHORTCUTS.items():
        add([f"--{short}"], key, f"the same as --{key}", is_bool=False, to=parser)
    for key, f in options().items():
        default = (
            "null"
            if f.default is None
            else str(f.default).lower()
            if isinstance(f.default, bool)
            else f.default
            if f.default != ()
            else "none"
        )
        text = f"{f.metadata['help']} [{expectation(key)}; default: {default if default != '' else 'empty'}]"
        is_bool = isinstance(f.default, bool)
        add([f"--{key}"], key, text.replace("%", "%%"), is_bool=is_bool, to=groups[key.partition(".")[0]])
    for name, keys in _names().items():
        flags = sorted({f"--{name}", f"--{name.replace('_', '-')}"})
        is_bool = all(isinstance(options()[key].default, bool) for key in keys)
        # one that several options have is told apart where all problems are, by the name that was typed
        add(flags, keys[0] if len(keys) == 1 else name, argparse.SUPPRESS, is_bool=is_bool, to=parser)


def _names() -> dict[str, list[str]]:
    """Each name of an option without its section -> the options that are called so."""
    from shoal.config.option import option_name
    from shoal.config.options import options

    found: dict[str, list[str]] = {}
    for key, f in options().items():
        for name in (option_name(f), *f.metadata["alias"]):
            found.setdefault(name, []).append(key)
    return {name: keys for name, keys in found.items() if name not in SHORTCUTS}


def read_overrides(args: argparse.Namespace, rest: Sequence[str]) -> tuple[list[Override], list[str]]:
    """(key, text, flag) of every dotted option, known or not, and the arguments that are none."""
    if not hasattr(args, "overrides"):
        return [], list(rest)
    found: list[Override] = list(args.overrides)
    stray: list[str] = []
    items = list(rest)
    while items:
        item = items.pop(0)
        flag, has_value, value = item.partition("=")
        if not item.startswith("--") or args.verb_parser.near_flag(flag):
            stray.append(item)
            continue
        if not has_value:
            value = items.pop(0) if items and not items[0].startswith("--") else "true"
        found.append((flag.removeprefix("--"), value, flag))
    return found, stray
