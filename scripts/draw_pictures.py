#!/usr/bin/env python
"""
Draw the pictures of docs/SEEING.md from real runs: python scripts/draw_pictures.py runs/quickstart runs/lower-lr.

The first run is shown everywhere; all runs are in the picture of losses. Needs shoal[plots], playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from shoal.report.live.sight import Gatherer
from shoal.report.live.view import frame
from shoal.report.pictures.architecture import draw_architecture
from shoal.report.pictures.canvas import save
from shoal.report.pictures.card import draw_card
from shoal.report.pictures.details import draw_details
from shoal.report.pictures.loss import draw_loss
from shoal.report.pictures.seen import read_runs
from shoal.report.runs.cost import cost, prices_of
from shoal.run.folder import RunFolder

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
LARGEST = 150_000  # bytes
COLUMNS, LINES = 100, 30
BROWSER = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs with some hundred steps")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser for the page's pictures")
    args = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    draw_plots(args.runs)
    (PICTURES / "see-top.svg").write_text(top_as_svg(RunFolder(args.runs[0])), encoding="utf-8")
    draw_page(args.runs, args.chromium)
    for file in sorted(PICTURES.glob("see-*")):
        print(f"{file.stat().st_size:>8,} bytes  {file.name}")
        if file.stat().st_size > LARGEST:
            sys.exit(f"{file.name} is larger than {LARGEST:,} bytes")


def draw_plots(folders: list[Path]) -> None:
    """Draw what `shoal plot` draws."""
    runs = read_runs([str(folder) for folder in folders], folders[0].parent)
    first = runs[0]
    pictures = {
        "see-loss.svg": draw_loss(runs, "tokens", smooth=10),
        "see-details.svg": draw_details(first),
        "see-card.png": draw_card(first, cost(first.folder, prices_of(folders[0].parent))),
        "see-architecture.svg": draw_example_architecture(),
    }
    for name, figures in pictures.items():
        for figure in figures:
            save(figure, PICTURES / name)


def draw_example_architecture():  # type: ignore[no-untyped-def]
    """Draw the quickstart's model on eight processes, before any training."""
    from shoal.report.amounts import planned_layout, with_vocab_size
    from shoal.resolve.recipe import find_recipe
    from shoal.resolve.resolve import resolve

    sizes = {"parallel.pp": "2", "parallel.dp_shard": "2", "parallel.tp": "2"}
    found = resolve(find_recipe(Path("quickstart")), [(key, text, f"--{key}") for key, text in sizes.items()])
    config = with_vocab_size(found.config)
    return draw_architecture(config, planned_layout(config), "quickstart")


def top_as_svg(folder: RunFolder) -> str:
    """Return one frame of `shoal top` as SVG."""
    gatherer = Gatherer(folder)
    sight = gatherer.look(whole=True)
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in frame(sight, COLUMNS, LINES):
        console.print(line, no_wrap=True, crop=True)
    gatherer.close()
    drawn = console.export_svg(title="shoal top quickstart", unique_id="top")
    # rich names a font on a server; a picture loads nothing from elsewhere
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL).replace("Fira Code, ", "")


def draw_page(folders: list[Path], chromium: str) -> None:
    """Take pictures of the report in both themes."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        shoal = [sys.executable, "-m", "shoal", "report", *map(str, folders), "--out", str(page)]
        subprocess.run(shoal, check=True, stdout=subprocess.DEVNULL)
        for theme in ("light", "dark"):
            file = PICTURES / f"see-page-{theme}.png"
            _take_picture(page, file, theme, chromium)


def _take_picture(page: Path, file: Path, theme: str, chromium: str) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chromium, args=[*BROWSER, "--disable-quic"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme=theme)  # type: ignore[arg-type]
        tab.goto(page.as_uri())
        tab.wait_for_selector("canvas")
        tab.wait_for_timeout(1500)
        tab.screenshot(path=str(file))
        browser.close()
    _shrink(file)


def _shrink(file: Path) -> None:
    """Store a screenshot with a palette of 128 colors, which the eye cannot tell apart here."""
    from PIL import Image

    Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    main()
