"""A figure's style, colors and file: the same input gives the same bytes, as PNG and as SVG."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shoal.errors import ShoalError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any color blindness can tell apart; the yellow is too pale for lines
COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES: Final = ("solid", (0, (6, 2)), (0, (2, 1.5)), (0, (8, 2, 2, 2)))  # a second cue, for prints without color
INK, PALE, FAINT, PAPER, ALARM = "#24292f", "#57606a", "#d0d7de", "#ffffff", "#b42318"
# The same colors on every picture, in the order in which goodput is told
CATEGORY_COLORS: Final = {
    "step": "#009e73", "data": "#56b4e9", "evaluation": "#0072b2", "checkpoint": "#cc79a7", "compile": "#e69f00",
    "start": "#f0e442", "end": "#8c959f", "lost": "#d55e00", "idle": "#d0d7de",
}  # fmt: skip
PHASE_COLORS: Final = {
    "data": "#56b4e9", "forward": "#0072b2", "backward": "#009e73", "reduce": "#d55e00", "optimizer": "#e69f00",
    "between": "#8c959f",
}  # fmt: skip
SUFFIXES: Final = (".png", ".svg")
DPI: Final = 100
NO_MATPLOTLIB: Final = "drawing needs matplotlib: pip install 'shoal[plots]'"

_STYLE: Final[dict[str, Any]] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "axes.titlelocation": "left",
    "axes.edgecolor": PALE, "axes.labelcolor": INK, "text.color": INK, "xtick.color": PALE, "ytick.color": PALE,
    "axes.grid": True, "grid.color": FAINT, "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.2, "figure.facecolor": PAPER,
    "svg.hashsalt": "shoal", "svg.fonttype": "none", "path.simplify": False, "agg.path.chunksize": 20_000,
}  # fmt: skip


def check_drawing() -> None:
    """Raise `ShoalError` if there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ShoalError(NO_MATPLOTLIB)


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """Yield an empty figure of this size in inches, in shoal's style. Raises `ShoalError` if there is no matplotlib."""
    check_drawing()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {**_defaults(), **_STYLE}
    with rc_context(style):
        yield Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _defaults() -> dict[str, Any]:
    """Return matplotlib's own defaults: a user's matplotlibrc must not change a picture."""
    from matplotlib import rcParamsDefault

    return {
        key: value
        for key, value in rcParamsDefault.items()
        if not key.startswith(("backend", "toolbar", "interactive"))
    }


def suffix_of(file: Path) -> str:
    """Return the format that a file's name asks for. Raises `ShoalError` for one that is neither PNG nor SVG."""
    if file.suffix.lower() not in SUFFIXES:
        raise ShoalError(
            f"a picture is {' or '.join(SUFFIXES)}, not {file.suffix or 'a file without a suffix'}: --out {file}"
        )
    return file.suffix.lower()


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG or SVG, without a date or a version in the file. Raises `ShoalError` if it cannot be written."""
    metadata = {"Date": None, "Creator": None} if suffix_of(file) == ".svg" else {"Software": None}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata=metadata)
    except OSError as error:
        raise ShoalError(f"{file} cannot be written: {error.strerror}; choose another --out") from None


def thousands(axes: Axes) -> None:
    """Write the numbers of linear axes with separators: 12,000."""
    from matplotlib.ticker import StrMethodFormatter

    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        if max(abs(low), abs(high)) >= 1000:
            axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def color(index: int) -> str:
    """Return the color of the run with this index."""
    return COLORS[index % len(COLORS)]


def dash(index: int) -> Any:
    """Return the dash pattern of the run with this index: another one each time the colors start again."""
    return DASHES[index // len(COLORS) % len(DASHES)]


def legend_below(axes: Axes, columns: int, handles: Sequence[Any] | None = None) -> None:
    """Put the legend under the axes, where it hides no curve."""
    found, _ = axes.get_legend_handles_labels()
    handles = found if handles is None else handles
    if handles:
        axes.figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8)
