"""`shoal plot`: pictures of runs as PNG or SVG."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.commands.flags import Override
from shoal.commands.recipes import resolve_run
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from shoal.config.layout import Layout
    from shoal.config.options import Config
    from shoal.run.folder import RunFolder


def plot(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    """Draw a picture and print where it is."""
    from shoal.config.run_options import Launch
    from shoal.report.pictures.canvas import save, suffix_of

    if args.what != "loss" and len(args.targets) > 1:
        raise ShoalError(
            f"shoal plot {args.what} draws one run, not {len(args.targets)}; shoal plot loss draws several"
        )
    runs = Path(next((text for key, text, _ in reversed(overrides) if key == "launch.runs"), Launch().runs))
    overrides = [each for each in overrides if each[0] != "launch.runs"]
    if overrides and args.what != "architecture":
        raise ShoalError(f"shoal plot {args.what} takes no options of a recipe, but {overrides[0][0]} was given")
    if args.out is not None:
        suffix_of(args.out)  # before the work
    file = args.out or _default_out(args, runs)
    for figure in _figures(args, runs, overrides):
        save(figure, file)
    print(file)
    return 0


def _figures(args: argparse.Namespace, runs: Path, overrides: list[Override]) -> Iterator[Figure]:
    """Yield the figure that the command line asks for."""
    from shoal.report.pictures.seen import read_runs

    if args.what == "architecture":
        from shoal.report.pictures.architecture import draw_architecture

        return draw_architecture(*_asked(args.targets[0], runs, overrides))
    found = read_runs(args.targets, runs)
    if args.what == "loss":
        from shoal.report.pictures.loss import draw_loss

        return draw_loss(found, args.x, args.smooth, args.log)
    if args.what == "details":
        from shoal.report.pictures.details import draw_details

        return draw_details(found[0])
    from shoal.report.pictures.card import draw_card
    from shoal.report.runs.cost import cost, prices_of

    return draw_card(found[0], cost(found[0].folder, prices_of(found[0].folder.path.parent, args.prices)))


def _asked(target: str, runs: Path, overrides: list[Override]) -> tuple[Config, Layout, str]:
    """Return the config, layout and name of a run, or of a recipe that has not run."""
    from shoal.report.amounts import planned_layout, with_vocab_size
    from shoal.resolve.recipe import find_recipe
    from shoal.run.folder import RunFolder

    folder = RunFolder.named(target, runs)
    if folder.config_file.is_file():
        if overrides:
            raise ShoalError(f"{target} is a run, whose own config is drawn; to draw another one, name a recipe")
        config = folder.load_config()
        return with_vocab_size(config), _layout_of(folder, config), folder.path.resolve().name
    config = resolve_run(find_recipe(Path(target)), overrides, named=True, needs_length=False)
    return with_vocab_size(config), planned_layout(config), config.launch.name or target


def _layout_of(folder: RunFolder, config: Config) -> Layout:
    """Return the layout of a run's last start."""
    from shoal.config.layout import Layout, find_layout
    from shoal.report.amounts import planned_layout
    from shoal.run.events import read_json_lines

    start: dict[str, Any] = next(
        (e for e in reversed(read_json_lines(folder.events_file)) if e.get("event") == "started"), {}
    )
    if start.get("layout"):
        return Layout(**start["layout"])
    found = find_layout(config.parallel, start.get("processes"))
    return found if isinstance(found, Layout) else planned_layout(config)


def _default_out(args: argparse.Namespace, runs: Path) -> Path:
    """Return RUN/plots/WHAT.png of the first run; for a recipe or several runs, WHAT.png here."""
    from shoal.run.folder import RunFolder

    folder = RunFolder.named(args.targets[0], runs)
    if folder.config_file.is_file() and len(args.targets) == 1:
        return folder.path / "plots" / f"{args.what}.png"
    return Path(f"{args.what}.png")
