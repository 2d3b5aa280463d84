"""Pictures of a benchmark's result, as PNG and SVG: bars with the spread of the repeats, and curves of scaling beside the ideal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.bench.result import Result, Row
from shoal.report.pictures.canvas import COLORS, INK, PALE, SUFFIXES, canvas, color, legend_below, save, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH: Final = 9.0  # inches
BAR: Final = 0.34  # inches of height for a row
Panel = tuple[str, float, str, str]  # a figure, the unit it is drawn in, the label of its axis, the word in a legend
PANELS: Final[Mapping[str, Sequence[Sequence[Panel]]]] = {
    "bench speed": [
        [("tokens_per_second", 1, "tokens/s, all processes", "")],
        [("of_product", 0.01, "model FLOP/s, % of a matrix product", "")],
    ],
    "bench scaling": [[("tokens_per_second", 1, "tokens/s, all processes", "")]],
    "bench memory": [
        [
            ("allocated_bytes", 2**20, "peak memory of a process (MiB)", "measured"),
            ("predicted_bytes", 2**20, "", "predicted by shoal plan"),
        ]
    ],
    "bench io": [
        [("tokens_per_second", 1, "tokens/s", "")],
        [("bytes_per_second", 1e6, "text (MB/s)", "")],
    ],
    "bench save": [[("seconds", 1, "seconds", "")]],
    "bench generate": [
        [("prefill_tokens_per_second", 1, "prefill (tokens/s)", "")],
        [("decode_tokens_per_second", 1, "decode (tokens/s)", "")],
    ],
}  # fmt: skip


def draw(result: Result, folder: Path) -> list[Path]:
    """Draw a result into a folder, and return the files. Raises `ShoalError` if one cannot be written, or without matplotlib."""
    pictures: dict[str, Callable[[Result], Iterator[Figure]]] = {"performance": draw_performance}
    if result.verb == "bench scaling":
        pictures["scaling"] = draw_scaling
    files = []
    for name, picture in pictures.items():
        for figure in picture(result):
            for suffix in SUFFIXES:
                save(figure, folder / f"{name}{suffix}")
                files.append(folder / f"{name}{suffix}")
    return files


def draw_performance(result: Result) -> Iterator[Figure]:
    """Yield a figure with a bar for each row, as long as its median, and the span of its repeats."""
    panels = [[p for p in panel if any(row.figures.get(p[0]) for row in result.rows)] for panel in PANELS[result.verb]]
    panels = [panel for panel in panels if panel]
    with _titled(result, 1.6 + sum(0.55 + BAR * len(_with(result, panel)) for panel in panels)) as figure:
        heights = [1 + len(_with(result, panel)) for panel in panels]
        columns = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, panel in zip(columns, panels, strict=True):
            _bars(axes, _with(result, panel), panel)
        yield figure


@contextmanager
def _titled(result: Result, height: float) -> Iterator[Figure]:
    """Yield an empty figure with the benchmark, the model and the machine above."""
    with canvas(WIDTH, height) as figure:
        title = f"shoal {result.verb}"
        figure.suptitle(f"{title}\n{result.headline()}", x=0.01, ha="left", fontsize=9)
        yield figure


def _with(result: Result, panel: Sequence[Panel]) -> list[Row]:
    """Return the rows that have a figure of the panel."""
    return [row for row in result.rows if any(row.figures.get(name) for name, *_ in panel)]


def _bars(axes: Axes, rows: Sequence[Row], panel: Sequence[Panel]) -> None:
    """Draw the rows from above, with a bar for each figure of the panel."""
    thick = 0.8 / len(panel)
    for number, (name, unit, label, word) in enumerate(panel):
        places = [place + (number - (len(panel) - 1) / 2) * thick for place in range(len(rows))]
        middles = [row.median(name) / unit for row in rows]
        spans = [
            [middle - min(row.figures[name]) / unit for row, middle in zip(rows, middles, strict=True)],
            [max(row.figures[name]) / unit - middle for row, middle in zip(rows, middles, strict=True)],
        ]
        axes.barh(
            places, middles, height=0.9 * thick, color=COLORS[number], xerr=spans, label=word, gid=name,
            error_kw={"ecolor": PALE, "capsize": 3, "linewidth": 1},
        )  # fmt: skip
        axes.set_xlabel(label or str(axes.get_xlabel()))
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0)
    thousands(axes)
    repeats = max(len(row.figures[name]) for row in rows for name, *_ in panel[:1])
    if repeats > 1:
        axes.set_title(f"median of {repeats} repeats; lines: lowest to highest", fontsize=8, color=PALE)
    if any(word for *_, word in panel):
        legend_below(axes, len(panel))


def draw_scaling(result: Result) -> Iterator[Figure]:
    """Yield a figure of throughput by processes, with the ideal beside it, for strong and for weak scaling."""
    modes = [mode for mode in ("strong", "weak") if any(row.facts["mode"] == mode for row in result.rows)]
    if not modes:
        return
    with _titled(result, 4.6) as figure:
        panels = figure.subplots(1, len(modes), squeeze=False, sharey=True)[0]
        for axes, mode in zip(panels, modes, strict=True):
            _curves(axes, [row for row in result.rows if row.facts["mode"] in (mode, "")], mode)
        legend_below(panels[0], 6)
        yield figure


def _curves(axes: Axes, rows: Sequence[Row], mode: str) -> None:
    """Draw the curve of each method, from the fewest processes on, the span of its repeats, and the ideal, dashed."""
    batch = "the same batch" if mode == "strong" else "a batch that grows with the processes"
    axes.set(xlabel="processes", title=f"{mode} scaling: {batch}")
    axes.set_ylabel("tokens/s, all processes")
    single = [row for row in rows if row.facts["mode"] == ""]
    methods = dict.fromkeys(row.facts["method"] for row in rows if row.facts["mode"])
    for number, method in enumerate(methods):
        some = sorted([*single, *(r for r in rows if r.facts["method"] == method)], key=lambda r: r.facts["processes"])
        counts = [row.facts["processes"] for row in some]
        rates = [row.figures["tokens_per_second"] for row in some]
        axes.fill_between(
            counts, [min(r) for r in rates], [max(r) for r in rates], color=color(number), alpha=0.2, linewidth=0
        )
        middles = [row.median("tokens_per_second") for row in some]
        axes.plot(counts, middles, color=color(number), marker="o", markersize=4, label=method, gid=f"{mode}-{method}")
        if not single or number == 0:  # all methods have the same single process
            ideal = [middles[0] * row.facts["devices"] / some[0].facts["devices"] for row in some]
            word, paint = ("ideal", INK) if single else (f"{method}, ideal", color(number))
            axes.plot(
                counts, ideal, color=paint, linestyle=(0, (4, 3)), linewidth=0.9, label=word, gid=f"{mode}-{word}"
            )
    ticks = sorted({row.facts["processes"] for row in rows})
    if shared := [row.facts["processes"] for row in rows if row.facts["shares_cores"]]:
        first = (max([n for n in ticks if n < min(shared)], default=1) + min(shared)) / 2
        axes.axvspan(first, 1.03 * max(shared), color=PALE, alpha=0.12, linewidth=0, label="more processes than cores")
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_ylim(bottom=0)
    thousands(axes)
