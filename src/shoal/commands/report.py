"""`shoal report`, and the report that a run leaves when it ends."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.commands.flags import Override
from shoal.errors import ShoalError
from shoal.system.output import on_one_line

if TYPE_CHECKING:
    from shoal.run.console import Console

FORMATS: Final = ("html", "md", "png", "svg")


def report(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.run.folder import RunFolder

    folders = [RunFolder.named(target, Path(args.runs)) for target in args.targets]
    for folder in folders:
        folder.load_config()
    out = args.out or (folders[0].path if len(folders) == 1 else Path(args.runs)) / "report.html"
    for path in write_reports([folder.path for folder in folders], out, _formats(args.format, out)):
        print(f"wrote {on_one_line(path)} ({path.stat().st_size / 1000:,.0f} kB)")
    return 0


def _formats(asked: str | None, out: Path) -> list[str]:
    """Return the formats asked for; by default that of the file's name. Raises `ShoalError` if one is unknown."""
    formats = asked.split(",") if asked else [out.suffix.removeprefix(".") or "html"]
    if unknown := [each for each in formats if each not in FORMATS]:
        raise ShoalError(f"--format must be some of {', '.join(FORMATS)}, not {on_one_line(unknown[0])}")
    return formats


def write_reports(folders: Sequence[Path], out: Path, formats: Sequence[str]) -> list[Path]:
    """Write a report of these runs in each format, beside each other; return the files. Raises `ShoalError` if one cannot be written."""
    written = []
    for each in formats:
        path = out.with_suffix(f".{each}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(folders, path, each)
        except OSError as error:
            raise ShoalError(
                f"{on_one_line(path)} cannot be written: {error.strerror}; set --out to another file"
            ) from error
        written.append(path)
    return written


def _write(folders: Sequence[Path], path: Path, form: str) -> None:
    """Write one report. Raises `OSError` if that fails."""
    from shoal.report.page.html import report_html
    from shoal.report.page.markdown import report_markdown
    from shoal.system.disk import write_whole

    if form in ("png", "svg"):
        _draw(folders, path)
    else:
        write_whole(path, [report_html(folders) if form == "html" else report_markdown(folders)])


def _draw(folders: Sequence[Path], path: Path) -> None:
    """Draw the summary card of one run, or the losses of several (needs shoal[plots])."""
    from shoal.report.pictures.canvas import save
    from shoal.report.pictures.card import draw_card
    from shoal.report.pictures.loss import draw_loss
    from shoal.report.pictures.seen import read_runs
    from shoal.report.runs.cost import cost, prices_of

    runs = read_runs([str(folder) for folder in folders], Path())
    one = runs[0].folder
    figures = draw_loss(runs) if len(runs) > 1 else draw_card(runs[0], cost(one, prices_of(one.path.parent)))
    for figure in figures:
        save(figure, path)


def leave_report(folder: Path, console: Console) -> None:
    """Write `report.html` into the folder of a run that has ended, and say so in one line. Raises nothing: the run is over."""
    try:
        (path,) = write_reports([folder], folder / "report.html", ["html"])
    except Exception as error:  # the report is an extra, and a defect in it must not make a run fail
        console.note(f"no report was written: {on_one_line(error)}")
    else:
        console.note(f"report: {on_one_line(path)}")
