"""`shoal data`: a first look at what a model will read, where a document is trained on, and what a step reads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.commands.flags import Override
from shoal.commands.recipes import resolve_with_auto
from shoal.errors import EXIT_REQUEUE, DataError, RunError, ShoalError

if TYPE_CHECKING:
    from shoal.config.options import Config
    from shoal.data.dataset import Dataset
    from shoal.data.where import Finder, Seen
    from shoal.run.console import Console
    from shoal.run.folder import RunFolder

SHOWN_STEPS = 64  # rows of a step that are printed; --json has all


def data(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    first, *rest = args.words
    if first in ("where", "at"):
        if len(rest) != 1:
            raise ShoalError(f"shoal data {first} needs one run: shoal data {first} RUN {_NEEDED[first]}")
        return _where(rest[0], args, overrides) if first == "where" else _at(rest[0], args, overrides)
    if rest:
        raise ShoalError(f"shoal data takes one recipe or run, not {' '.join(args.words)}")
    return _look(first, args, overrides)


_NEEDED = {"where": "--document N", "at": "--step N"}


def _look(target: str, args: argparse.Namespace, overrides: list[Override]) -> int:
    """Print a first look at the data of a recipe or a run."""
    from shoal.data.dataset import open_data
    from shoal.report.data_look import histogram, open_look, packing_table, show_rows, source_table
    from shoal.resolve.recipe import find_recipe
    from shoal.run.console import Console
    from shoal.system.signals import ends_when_asked

    console = Console()
    folder = _run_folder(target, overrides)
    is_run = folder.config_file.is_file()
    config = (
        folder.load_config() if is_run else resolve_with_auto(find_recipe(Path(target)), overrides, named=True).config
    )
    with ends_when_asked(EXIT_REQUEUE):
        dataset = _of_run(folder, config, console) if is_run else open_data(config.data, console)
        look = open_look(config, dataset, folder.ledger_file if is_run else None)
        console.show(source_table(config, dataset, look))
        for name, part in dataset.parts.items():
            for line in (*part.manifest.removals(), *part.manifest.overlaps()):
                console.say(f"{name}: " * bool(name) + line)
        title, table = packing_table(config, look)
        console.say(f"\n{title}")
        console.show(table)
        for name, sample in look.samples.items():
            console.say()
            console.say(f"{name}:\n" * bool(name) + "\n".join(histogram(sample, config.data.seq_len)))
        console.say()
        for text in show_rows(dataset, look, args.rows, console.is_terminal):
            console.show(text)
    return 0


def _of_run(folder: RunFolder, config: Config, console: Console) -> Dataset:
    """Open the tokens of a run, which may not have begun."""
    from shoal.data.dataset import open_past
    from shoal.data.where import Timeline

    try:
        data_id = Timeline.of_ledger(folder.ledger_file, config.train.micro_batch)[1].data_id
    except (OSError, ValueError):
        return open_past(config.data, console, "")
    dataset = open_past(config.data, console, data_id)
    if dataset.data_id != data_id:
        console.warn(
            f"{config.data.folder} has other tokens than {folder.path.name} was trained on; this shows the others"
        )
    return dataset


def _where(target: str, args: argparse.Namespace, overrides: list[Override]) -> int:
    """Print the steps and slots in which a document is trained on."""
    if args.document is None:
        raise ShoalError("shoal data where RUN needs --document N or, in a blend, --document SOURCE:N")
    console, finder, last = _open(target, overrides)
    source, number = _read_document(args.document, list(finder.rows))
    try:
        found = finder.where(source, number, last)
    except IndexError:
        there = finder.documents[source].num_documents
        raise DataError(
            f"there is no document {args.document} in the training; the training documents are 0 to {there - 1:,}, and held-out "
            "documents are not trained on"
        ) from None
    if args.json:
        print(json.dumps([_plain(each) for each in found]))
        return 0
    console.say(
        f"document {args.document} is read {len(found):,} times in {last:,} steps:"
        if found
        else _never(finder, source, number)
    )
    for each in found:
        console.say(
            f"  step {each.place.step:,}, micro-batch {each.place.slot}, row {each.place.index} (row {each.row:,} of the data)"
        )
    return 0


def _never(finder: Finder, source: str, number: int) -> str:
    if not len(finder.rows[source].rows_of(*finder.documents[source].document_span(number))):
        return f"document {number} is in the tail of the data, which fills no row"
    return f"document {number} is not read in the steps of this run"


def _at(target: str, args: argparse.Namespace, overrides: list[Override]) -> int:
    """Print the documents that a step reads."""
    if args.step is None:
        raise ShoalError("shoal data at RUN needs --step N")
    console, finder, last = _open(target, overrides)
    if not 1 <= args.step <= last:
        raise DataError(f"there is no step {args.step}; this run's steps are 1 to {last:,}")
    found = finder.at(args.step)
    if args.json:
        print(json.dumps([_plain(each) for each in found]))
        return 0
    console.say(f"step {args.step:,} reads {len(found):,} rows:")
    for each in found[:SHOWN_STEPS]:
        of = f"{each.source}:" if each.source else ""  # as --document takes it
        documents = ", ".join(f"{of}{number}" for number in each.documents[:8]) + ", ..." * (len(each.documents) > 8)
        what = f"document{'s' * (len(each.documents) != 1)} {documents}"
        console.say(f"  micro-batch {each.place.slot}, row {each.place.index}: {what}")
    if len(found) > SHOWN_STEPS:
        console.say(f"  and {len(found) - SHOWN_STEPS:,} more rows; --json prints all")
    return 0


def _open(target: str, overrides: list[Override]) -> tuple[Console, Finder, int]:
    """Return a console, the finder of a run, and the run's last step. Raises `RunError` if there is no such run."""
    from shoal.data.dataset import open_past
    from shoal.data.where import Finder, Timeline
    from shoal.plan.length import count_steps
    from shoal.run.console import Console

    console, aside = Console(), Console(on_stderr=True)  # standard output may be read by a program
    folder = _run_folder(target, overrides)
    config = folder.load_config()
    try:
        timeline, header = Timeline.of_ledger(folder.ledger_file, config.train.micro_batch)
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder.path} has no ledger to read ({error}); it is written when the first step begins"
        ) from error
    dataset = open_past(config.data, aside, header.data_id)
    if dataset.data_id != header.data_id:
        raise DataError(f"{config.data.folder} has other tokens than {folder.path.name} was trained on")
    steps = count_steps(config.train, config.data.seq_len, header.rows)
    with aside.progress("opening") as progress:
        finder = Finder.of(dataset, header.order, timeline, progress)
    return console, finder, steps


def _run_folder(target: str, overrides: list[Override]) -> RunFolder:
    """Return the folder of a run, by its path or by its name below launch.runs."""
    from shoal.config.run_options import Launch
    from shoal.run.folder import RunFolder

    runs = next((text for key, text, _ in reversed(overrides) if key == "launch.runs"), Launch().runs)
    return RunFolder.named(target, Path(runs))


def _read_document(text: str, sources: list[str]) -> tuple[str, int]:
    """Return source and number of `N` or `SOURCE:N`."""
    source, colon, number = text.rpartition(":")
    if not number.replace(",", "").isdigit():
        raise ShoalError(f"--document {text} is not a number, or SOURCE:NUMBER")
    if source not in sources:
        valid = " or ".join(f"{name}:{number}" for name in sources if name) or f"{number} alone, as this is not a blend"
        wrong = f"there is no source {source}" if colon else f"--document {text} lacks a source"
        raise ShoalError(f"{wrong}; give --document {valid}")
    return source, int(number.replace(",", ""))


def _plain(seen: Seen) -> dict[str, Any]:
    """Return a row in the training as values for JSON."""
    place = {"step": seen.place.step, "micro_batch": seen.place.slot, "row_in_micro_batch": seen.place.index}
    return {**place, "source": seen.source, "row": seen.row, "documents": [int(n) for n in seen.documents]}
