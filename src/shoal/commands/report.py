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

FORMATS: Final = ("html", "md")


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
    from shoal.report.page.html import report_html
    from shoal.report.page.markdown import report_markdown
    from shoal.system.disk import write_whole

    make = {"html": report_html, "md": report_markdown}
    written = []
    for each in formats:
        path = out.with_suffix(f".{each}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, [make[each](folders)])
        except OSError as error:
            raise ShoalError(
                f"{on_one_line(path)} cannot be written: {error.strerror}; set --out to another file"
            ) from error
        written.append(path)
    return written


def leave_report(folder: Path, console: Console) -> None:
    """Write `report.html` into the folder of a run that has ended, and say so in one line. Raises nothing: the run is over."""
    try:
        (path,) = write_reports([folder], folder / "report.html", ["html"])
    except Exception as error:  # the report is an extra, and a defect in it must not make a run fail
        console.note(f"no report was written: {on_one_line(error)}")
    else:
        console.note(f"report: {on_one_line(path)}")
