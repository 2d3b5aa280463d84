"""Resolving a recipe and flags to a config, and the verbs that need only that: init, prepare and config."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.commands.flags import SHORTCUTS, Override
from shoal.errors import EXIT_REQUEUE, ShoalError
from shoal.system.output import on_one_line

if TYPE_CHECKING:
    from shoal.config.options import Config
    from shoal.resolve.resolve import Resolved
    from shoal.run.folder import RunFolder


def resolve_asked(args: argparse.Namespace, overrides: list[Override], *, needs_length: bool = True) -> Resolved:
    """Return what the command line asks for, and print notes on it. needs_length: see `resolve`."""
    unset = "no recipe given: options that are not set have the values that shoal init writes"
    notes = [unset] if args.recipe is None else []
    named = args.recipe is not None
    return resolve_with_auto(
        recipe_asked(args, overrides), overrides, named=named, notes=notes, needs_length=needs_length
    )


def resolve_run(recipe: Path, overrides: list[Override], *, named: bool, **how: Any) -> Config:
    """Return a run's config. Raises `ShoalError` if sizes in it are auto and no run has chosen them. See `resolve_with_auto`."""
    return decided(resolve_with_auto(recipe, overrides, named=named, **how))


def decided(resolved: Resolved) -> Config:
    """Return the config, with the sizes that its run has chosen. Raises `ShoalError` if they are auto, and it has not."""
    from shoal.resolve.undecided import why_undecided, with_sizes_of
    from shoal.run.folder import RunFolder

    if not resolved.undecided:
        return resolved.config
    before = RunFolder.of(resolved.config).begun()
    if before is None:
        raise ShoalError(why_undecided(resolved.undecided, resolved.config.launch.nodes))
    return with_sizes_of(resolved.config, before, resolved.undecided)


def resolve_with_auto(
    recipe: Path,
    overrides: list[Override],
    *,
    named: bool,
    notes: Sequence[str] = (),
    needs_length: bool = True,
    needs_files: bool = True,
    on_stderr: bool = False,
) -> Resolved:
    """
    Return a run's config, in which sizes may be undecided; print `notes` and the notes of `resolve`.

    named: whether the user named this recipe; if so, a run without `launch.name` takes the recipe's name. needs_length, needs_files:
    see `resolve`. on_stderr: whether to print the notes on standard error.
    """
    from shoal.config.data_options import is_built_in
    from shoal.resolve.checks import why_no_name
    from shoal.resolve.resolve import resolve

    kept = _run_of(recipe if named else None, overrides).kept()
    for gone in kept:
        if not is_built_in(gone):
            tell_once([f"{gone} is gone: resuming with the run's own copy"], on_stderr=on_stderr)
    resolved = resolve(recipe, overrides, kept, needs_length=needs_length, needs_files=needs_files)
    tell_once([*notes, *resolved.notes], on_stderr=on_stderr)
    if resolved.config.launch.name is None and named:
        if why := why_no_name(recipe.stem):
            raise ShoalError(f"a run takes its recipe's name, and {why}; or set --name")
        return dataclasses.replace(resolved, config=resolved.config.replace("launch", name=recipe.stem))
    return resolved


def config_of(recipe: str | Path | None, options: Mapping[str, Any]) -> Config:
    """Return the config of `recipe`, or of the recipe that `shoal init` writes, with `options` applied."""
    from shoal.resolve.recipe import START, find_recipe

    found = START if recipe is None else find_recipe(Path(recipe))
    return resolve_run(found, [_override(key, value) for key, value in options.items()], named=recipe is not None)


def _override(key: str, value: Any) -> Override:
    """Return the override that a flag with this value gives; `key` is any name that is valid as a flag."""
    from shoal.resolve.recipe import candidates, to_text

    found = candidates(key)
    dotted = SHORTCUTS.get(key) or (found[0] if len(found) == 1 else key)
    return dotted, to_text(_plain(value)), key


def _plain(value: Any) -> Any:
    """Return `value` in a form that YAML can write: paths as text, NumPy and torch scalars as numbers."""
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") else value


def recipe_asked(args: argparse.Namespace, overrides: list[Override]) -> Path:
    """Return the given recipe; without one, but with model or data options, the recipe that `shoal init` writes."""
    from shoal.resolve.recipe import START, find_recipe

    if args.recipe is not None:
        return find_recipe(args.recipe)
    if not any(key.startswith(("model.", "data.")) for key, _, _ in overrides):
        raise ShoalError(
            f"shoal {args.verb} needs a recipe: shoal {args.verb} quickstart uses a built-in one, shoal init mine.yaml "
            f"writes one to start from, and shoal {args.verb} --model.preset tiny --data.paths FOLDER needs none"
        )
    return START


def init(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.resolve.recipe import START

    try:
        with args.file.open("x", encoding="utf-8") as file:
            file.write(START.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise ShoalError(f"{args.file} already exists and was not changed; choose another name") from error
    except (OSError, ValueError) as error:
        raise ShoalError(f"cannot write {args.file}: {error}") from error
    file = on_one_line(args.file)
    print(f"wrote {file}, a recipe to edit; shoal train {shlex.quote(file)} trains it unchanged")
    return 0


def _run_of(recipe: Path | None, overrides: list[Override]) -> RunFolder:
    """Return the run's folder before the config is validated: the folder may have files that validation needs."""
    from shoal.resolve.resolve import peek
    from shoal.run.folder import RunFolder

    given = peek(recipe, overrides, ("launch.runs", "launch.name"))
    return RunFolder(Path(given["launch.runs"]) / (given["launch.name"] or (recipe.stem if recipe else "run")))


def tell_once(notes: Sequence[str], *, on_stderr: bool = False) -> None:
    """Print notes for the user to act on, once for all processes of a run."""
    from shoal.mesh.place import speaks_first

    if notes and speaks_first():
        from shoal.run.console import Console

        console = Console(on_stderr=on_stderr)
        for note in notes:
            console.warn(note)


def tell_of_torch() -> None:
    """Print a note if this version of torch is untested."""
    from shoal.system.torch_private import version_notes

    tell_once(version_notes())


def prepare(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.run.console import Console
    from shoal.system.signals import ends_when_asked

    console = Console()
    config = resolve_asked(args, overrides, needs_length=False).config
    with ends_when_asked(EXIT_REQUEUE):
        from shoal.data.check import check_tokens
        from shoal.data.dataset import open_data
        from shoal.data.packing_report import packing_report

        dataset = open_data(config.data, console)
        for split, counts in dataset.counts.items():
            about = "about " if counts.estimated else ""
            console.say(
                f"{split}: {about}{counts.documents:,} documents, {about}{counts.text_bytes:,} bytes, {counts.tokens:,} tokens "
                f"({counts.text_bytes / max(counts.tokens, 1):.2f} bytes per token)"
                + (f", {counts.learned_tokens:,} of them learned" if counts.learned_tokens < counts.tokens else "")
            )
        for name, part in dataset.parts.items():
            of = f"{name}: " * bool(name)
            for line in part.manifest.removals():
                console.say(of + line)
            if not part.in_place:
                for record in packing_report(part, config.data.seq_len):
                    console.say(of + record.line())
            if config.data.packing == "best_fit":
                with console.progress("packing"):
                    dataset.part_rows(name, "train")
            where = "read in place; their record is in" if part.in_place else "written to"
            console.say(f"{of}{where} {part.folder}")
            if args.check:
                with console.progress("checking") as progress:
                    checked = check_tokens(part, progress)
                console.say(checked)
    return 0


def config(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.config.auto import LAYOUT
    from shoal.report.amounts import amounts
    from shoal.resolve.recipe import to_text
    from shoal.resolve.resolve import resolve, to_yaml
    from shoal.resolve.schema import schema

    if args.schema:
        print(json.dumps(schema(), indent=2))
        return 0
    resolved = resolve(recipe_asked(args, overrides), overrides)
    tell_once(resolved.notes, on_stderr=True)
    lost = {
        key: f"{resolved.sources[key]}, not {to_text(s.value)} at {s.where}"
        for key, s in resolved.replaced.items()
        if key in resolved.sources
    }
    print(to_yaml(resolved.config, {**resolved.sources, **lost}, resolved.undecided), end="")
    for line in amounts(resolved.config, chosen=LAYOUT not in resolved.undecided):
        print(f"# {line}")
    return 0
