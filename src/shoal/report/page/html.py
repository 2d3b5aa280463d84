"""
The page as one HTML file: its scripts and styles stand in it, and it loads nothing from elsewhere. No torch.

    report_html([Path("runs/a")])  with the data of these runs
    dashboard_html()               the same page, which asks its server for data

Text of runs is data for the scripts, which never make HTML of it. A content security policy allows the page's own scripts
alone, by their hashes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

from shoal.report.curves.curves import Curves
from shoal.report.curves.ranks import RankMap
from shoal.report.page.content import PLACES, named_folders, run_view, runs_view
from shoal.report.page.packing import Arrays, pack_window
from shoal.report.page.rank_view import ranks_view

SCRIPTS: Final = (
    "source.js",  # first, because it asks for data
    "uplot/uPlot.iife.min.js",
    "dom.js",
    "chart.js",
    "ranks.js",
    "profile.js",
    "views.js",
    "page.js",
)
STYLES: Final = ("uplot/uPlot.min.css", "page.css")
# shown until the list of runs has come
FRAME: Final = '<header class="top"><h1><span class="brand">shoal</span> reading the runs</h1></header>'
BUDGET: Final = 1_500_000  # bytes of all curves of a report
COLUMNS: Final = 2000  # of a curve over the whole run; fewer if there are many curves
POINT_BYTES, BUCKET_BYTES = 6, 20  # of a packed point, and of a packed bucket: measured 4.6 and 15
FINE: Final = ("loss", "grad_norm", "spike_score", "tokens_per_second")  # exact first, if the budget allows


def report_html(folders: Sequence[Path]) -> bytes:
    """Return a report of these runs. Raises `OSError` if a run cannot be read."""
    runs = named_folders(list(folders))
    curves = {name: Curves.open(folder.path) for name, folder in runs.items()}
    arrays = Arrays()
    data = {
        "runs": runs_view(runs, curves),
        "run": {name: run_view(folder, curves[name], reads_data=True) for name, folder in runs.items()},
        "ranks": {name: ranks_view(folder, RankMap.open(folder.path)) for name, folder in runs.items()},
        "curves": _packed(curves, arrays),
        "arrays": arrays.packed,
    }
    return _document(f'<script type="application/json" id="shoal-data">{_as_json(data)}</script>', "'none'")


def dashboard_html() -> bytes:
    """Return the page that asks its own server for data, and no other."""
    return _document(FRAME, "'self'")


def _packed(curves: dict[str, Curves], arrays: Arrays) -> dict[str, dict[str, Any]]:
    """Embed every curve in at most `COLUMNS` buckets, then exactly the most important ones that fit."""
    names = [(run, name) for run, each in curves.items() for name in each.names() if name not in PLACES]
    columns = max(100, min(COLUMNS, BUDGET // 2 // (15 * max(1, len(names)))))
    found: dict[str, dict[str, Any]] = {run: {} for run in curves}
    for run, name in names:
        window = curves[run].window(name, 0, None, columns)
        if len(window) and (window.count > window.gaps).any():
            found[run][name] = pack_window(window, arrays)
    for name in FINE:
        having = [run for run in found if name in found[run]]
        for i, run in enumerate(having):
            room = (BUDGET - arrays.size) // (len(having) - i)
            _refine(curves[run], name, columns, room, found[run], arrays)
    return found


def _refine(curves: Curves, name: str, columns: int, room: int, found: dict[str, Any], arrays: Arrays) -> None:
    """Embed all points of a curve instead of its `columns` buckets, or more buckets, as far as `room` bytes allow."""
    window = curves.window(name, 0, None, 1 << 30)
    if len(window) <= columns:
        return
    if POINT_BYTES * len(window) > room:
        finer = room // BUCKET_BYTES
        if finer < 2 * columns:
            return
        window = curves.window(name, 0, None, finer)
    found[name] = pack_window(window, arrays)


def _as_json(data: Any) -> str:
    """Return JSON that may stand in a script element: no tag begins in it. NaN and infinity, which JSON lacks, are null."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if abs(data) < float("inf") else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(each) for each in data] if isinstance(data, list | tuple) else data


@functools.cache
def _static(name: str) -> str:
    return (resources.files("shoal.report.page") / "static" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _document(data: str, connect: str) -> bytes:
    """Return the document with its data and policy. connect: where its scripts may ask for data."""
    scripts, styles = [_static(name) for name in SCRIPTS], [_static(name) for name in STYLES]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src {' '.join(map(_hash, styles))}; "
        f"img-src data:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer">',
        "<title>shoal</title>",
        '<link rel="icon" href="data:,">',
        *(f"<style>{text}</style>" for text in styles),
    ]
    body = ["<noscript>This page draws its curves with JavaScript.</noscript>", data]
    body += [f"<script>{text}</script>" for text in scripts]
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, "</body>", "</html>"]
    return "\n".join(lines).encode()
