"""Loss curves of one or several runs. Nothing is sampled away: a band spans the lowest and highest step of each pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shoal.report.pictures.canvas import INK, PALE, PAPER, canvas, color, dash, legend_below, thousands
from shoal.report.pictures.labels import labels
from shoal.report.pictures.seen import MARKED, Floats, Scale, Seen, XAxis, scale_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from shoal.report.curves.curves import Window

WIDTH, HEIGHT = 9.6, 5.4  # inches
NOT_FINITE: Final = ("NaN or Inf", "X")
COLUMNS: Final = 800  # buckets of a curve: about one for each pixel of the axes


def draw_loss(runs: Sequence[Seen], axis: XAxis = "tokens", smooth: int = 1, log: bool = False) -> Iterator[Figure]:
    """
    Yield the figure, inside the style that it must be saved in.

    smooth: the line is a mean over that many steps; the band behind it still has every step. log: a logarithmic y axis.
    """
    with canvas(WIDTH, HEIGHT + 0.18 * len(runs)) as figure:
        axes = figure.add_subplot()
        scale = scale_of(axis, max(run.x(w, axis)[-1] for run in runs if (w := run.window("loss", 1))))
        names = labels(runs)
        for number, run in enumerate(runs):
            draw_run(axes, run, axis, scale, number, names[number], smooth)
        axes.set(xlabel=scale.label, ylabel="loss (nats per token)", title=title(runs, smooth))
        thousands(axes)
        if log:
            log_loss(axes)
        axes.margins(x=0.01)
        legend_below(axes, 1 if len(runs) > 1 else 3, handles=_handles(axes, runs, smooth))
        yield figure


def title(runs: Sequence[Seen], smooth: int) -> str:
    """Return the title of a loss figure."""
    named = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return f"Loss of {named}" + (f", line: mean of {smooth:,} steps" if smooth > 1 else "")


def log_loss(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(LogLocator(subs=()))


def draw_run(axes: Axes, run: Seen, axis: XAxis, scale: Scale, number: int, name: str, smooth: int = 1) -> None:
    """Draw a run's training loss with its band, its held-out loss and its events."""
    window = run.window("loss", COLUMNS)
    assert window is not None
    x = run.x(window, axis) / scale.unit
    band(axes, x, window, color(number), gid=f"band-{number}")
    line = running_mean(window, smooth)
    axes.plot(x, line, color=color(number), linestyle=dash(number), linewidth=1.3, label=name, gid=f"loss-{number}")
    held_out = run.window("val_loss", COLUMNS)
    if held_out is not None:
        axes.plot(
            run.x(held_out, axis) / scale.unit, held_out.mean, color=INK, linewidth=0.8, linestyle=dash(number), marker="o",
            markersize=5, markerfacecolor=PAPER, markeredgecolor=color(number), markeredgewidth=1.5, label="_held-out", gid=f"held-out-{number}",
        )  # fmt: skip
    draw_marks(axes, run, window, x, number)
    if window.gaps.any():
        draw_mark(axes, x[window.gaps > 0], NOT_FINITE, number)


def band(axes: Axes, x: Floats, window: Window, paint: str, gid: str, unit: float = 1.0) -> None:
    """Fill from the lowest to the highest value of each bucket. Its outline is drawn too, so one step is at least a pixel wide."""
    axes.fill_between(
        x, window.low / unit, window.high / unit, facecolor=(paint, 0.25), edgecolor=(paint, 0.75), linewidth=0.8, gid=gid
    )  # fmt: skip


def running_mean(window: Window, steps: int) -> Floats:
    """Return the mean of each bucket together with the buckets before it that begin in its last `steps` steps."""
    mean, count = np.asarray(window.mean, float), np.asarray(window.count, float)
    weight = np.where(np.isfinite(mean), count, 0.0)
    sums = np.cumsum(np.where(weight > 0, mean, 0.0) * weight)
    total = np.cumsum(weight)
    begin = np.searchsorted(window.step, np.asarray(window.step) - steps, side="right") - 1
    before = begin >= 0
    part, divisor = sums - np.where(before, sums[begin], 0.0), total - np.where(before, total[begin], 0.0)
    result: Floats = np.divide(part, divisor, out=np.full_like(part, np.nan), where=divisor > 0)
    return result


def draw_marks(axes: Axes, run: Seen, window: Window, x: Floats, number: int) -> None:
    """Mark a run's events at the top of the axes."""
    for name, steps in run.marks().items():
        words, marker = MARKED[name]
        at = np.interp(np.asarray(steps, float), np.asarray(window.step, float), x)
        for each in at:
            axes.axvline(each, color=color(number), linewidth=0.6, linestyle=(0, (1, 2)), zorder=1)
        draw_mark(axes, at, (words, marker), number)


def draw_mark(axes: Axes, x: Floats, mark: tuple[str, str], number: int) -> None:
    """Draw marks of one kind on the upper edge of the axes."""
    words, marker = mark
    axes.plot(
        x, np.ones_like(x), transform=axes.get_xaxis_transform(), linestyle="none", marker=marker, markersize=6,
        color=color(number), markeredgecolor=INK, markeredgewidth=0.6, clip_on=False, label=f"_{words}", gid=f"{words}-{number}",
    )  # fmt: skip


def _handles(axes: Axes, runs: Sequence[Seen], smooth: int) -> list[Any]:
    """Return the legend: one entry a run, then what bands, dots and marks mean."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles, _ = axes.get_legend_handles_labels()
    if len(runs) == 1:
        handles[0].set_label("training, mean")
    if smooth > 1 or any((w := run.window("loss", COLUMNS)) is not None and w.count.max() > 1 for run in runs):
        handles.append(Patch(facecolor=PALE, alpha=0.3, label="lowest to highest step"))
    if any(run.window("val_loss", 1) is not None for run in runs):
        handles.append(
            Line2D(
                [], [], color=INK, linewidth=0.8, marker="o", markersize=5, markerfacecolor=PAPER, label="held-out text"
            )
        )
    found = {MARKED[name] for run in runs for name in run.marks()}
    if any((w := run.window("loss", COLUMNS)) is not None and w.gaps.any() for run in runs):
        found.add(NOT_FINITE)
    for words, marker in (*MARKED.values(), NOT_FINITE):
        if (words, marker) in found:
            handles.append(
                Line2D([], [], linestyle="none", marker=marker, color=PALE, markeredgecolor=INK, label=words)
            )
    return handles
