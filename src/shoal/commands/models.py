"""`shoal fetch`, `eval`, `generate` and `export`, which use a model in one process."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.commands.flags import Override
from shoal.errors import MemoryProblem, ModelError, ShoalError, spelled

if TYPE_CHECKING:
    from shoal.infer.asked import Wanted
    from shoal.run.narrator import Narrator


def fetch(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from contextlib import nullcontext

    from shoal.hub.fetch import fetch_data, fetch_model, no_progress
    from shoal.run.console import Console

    console = Console()
    bar = console.progress("fetching") if console.is_terminal else nullcontext(no_progress)
    fetch_one = fetch_data if args.kind == "data" else fetch_model
    with bar as progress:
        fetch_one(
            args.name, to=_expanded(args.to), revision=args.revision, force=args.force, verify=args.verify,
            tell=console.say, progress=progress,
        )  # fmt: skip
    return 0


def _expanded(to: Path | None) -> Path | None:
    """Expand `~`, because shells do not expand it in --to=~/x."""
    try:
        return to and to.expanduser()
    except RuntimeError as error:
        raise ModelError(f"cannot find {to}: {error} Set --to to a writable folder") from error


def eval(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    _needs(args, "text", ("context", "stride"))
    _needs(args, "tasks", ("include_path", "limit", "num_fewshot"))
    from shoal.infer.asked import Tasks, Text

    wanted = _wanted(args)
    wanted.check()
    if wanted.folder is not None and args.text is None and args.tasks is None:
        raise ShoalError(f"{wanted.folder} has no held-out text; set --text FILE or --tasks NAME,...")
    text = None if args.text is None else Text.read(args.text, args.context, args.stride)
    tasks = None
    if args.tasks is not None:
        names = tuple(name.strip() for name in args.tasks.split(",") if name.strip())
        tasks = Tasks(names, args.include_path, args.limit, args.num_fewshot)
    set_threads(args)
    with narrated() as narrator:
        from shoal.infer.commands import evaluate_model

        evaluate_model(wanted, text=text, tasks=tasks, as_json=args.json, narrator=narrator)
    return 0


def generate(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    _needs(args, "chat", ("system",))
    if bool(args.prompt) == args.chat:
        raise ShoalError("set either --prompt TEXT or --chat")
    from shoal.models.sampling import CHAT_TOKENS, FLAGS, PROMPT_TOKENS, Sampling, check_options, check_prompts

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    limit = args.tokens if args.tokens is not None else CHAT_TOKENS if args.chat else PROMPT_TOKENS
    with spelled(FLAGS):
        check_options(sampling, limit)
    check_prompts(args.prompt or [], args.system)
    wanted = _wanted(args)
    wanted.check()
    set_threads(args)
    with narrated() as narrator:
        from shoal.infer.commands import generate_text, open_chat

        if args.chat:
            chat = open_chat(wanted, system=args.system, max_new_tokens=limit, sampling=sampling, narrator=narrator)
        else:
            generate_text(wanted, prompts=args.prompt, max_new_tokens=limit, sampling=sampling, narrator=narrator)
    if args.chat:  # outside `narrated`, so that Ctrl-C ends only the current answer
        from shoal.infer.chat import chat_in_terminal

        chat_in_terminal(chat, sys.stdin, sys.stdout)
    return 0


@contextlib.contextmanager
def narrated() -> Iterator[Narrator]:
    """Yield a narrator that names slow phases on stderr; a signal ends the command, which has nothing to save."""
    from shoal.run.console import Console
    from shoal.run.narrator import Narrator
    from shoal.system.signals import ends_when_asked

    narrator = Narrator.of(Console(on_stderr=True))
    with ends_when_asked(), contextlib.closing(narrator):
        narrator.begin("importing torch")
        try:
            yield narrator
        except (RuntimeError, MemoryError, OSError) as error:
            from shoal.plan.fit import what_ran_out

            if reason := what_ran_out(error):
                raise MemoryProblem(f"out of memory: {reason}") from error
            raise


def set_threads(args: argparse.Namespace) -> None:
    """Set this process's CPU threads before torch is imported: the number given, or one per free core."""
    from shoal.launch.torchrun import choose_threads
    from shoal.run.console import Console

    asked: int | None = args.threads
    if asked is not None and asked < 1:
        raise ShoalError(f"--threads is {asked}; it must be at least 1")
    if asked is None and "OMP_NUM_THREADS" in os.environ:
        return  # keep the user's own setting
    os.environ["OMP_NUM_THREADS"] = str(choose_threads(asked, say=Console(on_stderr=True).warn))


def _wanted(args: argparse.Namespace) -> Wanted:
    from shoal.infer.asked import Wanted

    return Wanted(
        Path(args.runs), args.target, folder=args.model_from, family=args.model_family, step=args.step,
        device=args.device, dtype=args.dtype,
    )  # fmt: skip


def _needs(args: argparse.Namespace, owner: str, options: tuple[str, ...]) -> None:
    """Raise `ShoalError` if one of `options` is set without `owner`, the only option that uses them."""
    for option in options:
        if getattr(args, option) is not None and not getattr(args, owner):
            raise ShoalError(f"--{option.replace('_', '-')} has no effect without --{owner}; set both or neither")


def export(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.infer.out_folder import OutFolder
    from shoal.infer.target import find_checkpoint
    from shoal.run.console import Console

    folder, saved = find_checkpoint(Path(args.runs), args.target, args.step)
    place = OutFolder(args.out, args.force)
    console = Console()
    with narrated() as narrator:
        from shoal.infer.export import export_checkpoint

        narrator.begin(None)
        export_checkpoint(folder, saved, place, dtype=args.dtype, license=args.license, console=console)
    console.say(f"exported to {args.out}; its README.md describes the model")
    return 0
