"""`shoal bench`: what is fast, what scales, what fits, measured on this machine."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shoal.commands.flags import Override
from shoal.commands.models import narrated
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from shoal.bench.trial import Asked
    from shoal.run.narrator import Narrator


@contextmanager
def _asked(
    args: argparse.Namespace, overrides: list[Override], argv: Sequence[str], **more: Any
) -> Iterator[tuple[Asked, Narrator]]:
    """Yield what the user asked for, and a narrator. more: fields of `Asked` that differ from its defaults."""
    from shoal.bench.trial import Asked
    from shoal.report.pictures.canvas import check_drawing
    from shoal.resolve.recipe import find_recipe

    asked = Asked(
        verb=args.verb, command=shlex.join(["shoal", *argv]), recipe=args.recipe and find_recipe(args.recipe),
        overrides=overrides, repeats=args.repeats, as_json=args.json, out=args.out, pictures=args.pictures, disk=args.disk,
        **more,
    )  # fmt: skip
    if asked.pictures is not None:
        check_drawing()  # before the work
    with narrated() as narrator:
        narrator.begin(None)
        yield asked, narrator


def speed(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.speed import bench_speed

    if args.recipe is None:
        overrides = [("launch.processes", "1", "benchmark default"), *overrides]
    with _asked(args, overrides, argv) as (asked, narrator):
        bench_speed(asked, peers=args.peers, narrator=narrator)
    return 0


def scaling(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.layouts import MODES
    from shoal.bench.scaling import DEFAULT, bench_scaling

    _no_processes(args, overrides)
    modes = [mode for mode in MODES if args.strong == args.weak or getattr(args, mode)]
    with _asked(args, overrides, argv, default=DEFAULT) as (asked, narrator):
        bench_scaling(asked, processes=args.processes, modes=modes, methods=args.method, narrator=narrator)
    return 0


def memory(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.memory import DEFAULT, bench_memory

    _no_processes(args, overrides)
    with _asked(args, overrides, argv, default=DEFAULT) as (asked, narrator):
        bench_memory(asked, processes=args.processes, narrator=narrator)
    return 0


def io(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.io import DEFAULT, bench_io

    with _asked(args, overrides, argv, default=DEFAULT) as (asked, narrator):
        bench_io(asked, narrator=narrator)
    return 0


def save(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.save import bench_save

    with _asked(args, overrides, argv) as (asked, narrator):
        bench_save(asked, narrator=narrator)
    return 0


def generate(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.generate import DEFAULT, Lengths, bench_generate

    lengths = Lengths.read(args.batches, args.prompt_tokens, args.new_tokens, unequal=args.unequal)
    with _asked(args, overrides, argv, default=DEFAULT) as (asked, narrator):
        bench_generate(asked, lengths, narrator=narrator)
    return 0


def _no_processes(args: argparse.Namespace, overrides: Sequence[Override]) -> None:
    """Raise `ShoalError` if launch.processes is given, which this benchmark sets for each case."""
    if any(key == "launch.processes" for key, _, _ in overrides):
        raise ShoalError(f"shoal {args.verb} sets launch.processes for each case; use --processes 1,2")
