"""A run in detail: throughput, MFU or step time, memory, the time split of a step, and where all its time went."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from shoal.report.pictures.canvas import CATEGORY_COLORS, COLORS, INK, PALE, PHASE_COLORS, canvas, thousands
from shoal.report.pictures.loss import COLUMNS, band
from shoal.report.pictures.seen import Seen
from shoal.run.console import duration
from shoal.run.goodput import Account, account
from shoal.run.records import read_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 11.0, 8.6  # inches
GIGABYTE: Final = 1e9
PHASES: Final = ("data", "forward", "backward", "reduce", "optimizer")


def draw_details(run: Seen) -> Iterator[Figure]:
    """Yield the figure, inside the style that it must be saved in."""
    with canvas(WIDTH, HEIGHT) as figure:
        panels = figure.subplot_mosaic(
            [["speed", "use"], ["memory", "split"], ["goodput", "goodput"]], height_ratios=[1, 1, 0.32]
        )
        figure.suptitle(
            f"Details of {run.name}{', dotted lines: restarts' * bool(run.marks().keys() & {'started', 'went back'})}",
            x=0.01,
            ha="left",
            fontweight="bold",
            fontsize=12,
        )
        draw_curve(panels["speed"], run, "tokens_per_second", "throughput (tokens/s, all processes)", COLORS[0])
        draw_use(panels["use"], run)
        draw_memory(panels["memory"], run)
        draw_split(panels["split"], run)
        draw_goodput(panels["goodput"], run)
        for panel in panels.values():
            thousands(panel)
        yield figure


def draw_curve(axes: Axes, run: Seen, name: str, label: str, paint: str, unit: float = 1.0) -> None:
    """Draw the mean of a metric by step, and the band of all its values; mark restarts."""
    window = run.window(name, COLUMNS)
    axes.set(xlabel="step", ylabel=label)
    if window is None or not np.isfinite(window.mean).any():
        return say_nothing(axes, "not recorded")
    band(axes, np.asarray(window.step, float), window, paint, f"band-{name}", unit)
    axes.plot(window.step, window.mean / unit, color=paint, gid=name)
    axes.set_ylim(0, 1.08 * float(np.nanmax(window.high)) / unit or 1.0)
    axes.margins(x=0.01)
    mark_restarts(axes, run)
    return None


def mark_restarts(axes: Axes, run: Seen) -> None:
    """Draw a dotted line at each restart and rollback."""
    for name in ("started", "went back"):
        for step in run.marks().get(name, ()):
            axes.axvline(step, color=PALE, linewidth=0.8, linestyle=(0, (1, 2)))


def say_nothing(axes: Axes, words: str) -> None:
    """Write why a panel is empty."""
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color=PALE)


def draw_use(axes: Axes, run: Seen) -> None:
    """Draw MFU in percent; the time of a step if the device's peak is unknown."""
    mfu = run.window("mfu", COLUMNS)
    if mfu is not None and np.isfinite(mfu.mean).any():
        draw_curve(axes, run, "mfu", "MFU (% of the peak)", COLORS[2], unit=0.01)
    else:
        draw_curve(axes, run, "step_seconds", "time of a step (s)", COLORS[2])
        axes.set_title("no MFU: the peak of this device is unknown", fontsize=8, color=PALE)


def draw_memory(axes: Axes, run: Seen) -> None:
    """Draw the peak memory of process 0, and of all ranks what each holds: from the least to the most."""
    draw_curve(axes, run, "memory_bytes", "memory of a process (GB)", COLORS[1], unit=GIGABYTE)
    records = read_ranks(run.folder.ranks_file)
    if records:
        steps = [record.step for record in records]
        low, high = ([pick(r.memory_bytes) / GIGABYTE for r in records] for pick in (min, max))
        peak = [max(r.peak_memory_bytes) / GIGABYTE for r in records]
        axes.plot(
            steps,
            peak,
            color=INK,
            linewidth=0.9,
            linestyle=(0, (6, 2)),
            label="peak of the largest rank",
            gid="memory-peak",
        )
        count = len(records[-1].memory_bytes)
        axes.fill_between(
            steps,
            low,
            high,
            color=COLORS[4],
            alpha=0.5,
            label=f"in use, least to most of {count} ranks",
            gid="memory-ranks",
        )
        highest = max(*peak, *high, float(axes.get_ylim()[1]))
        axes.set_ylim(0, 1.05 * highest)
    if lines := axes.get_lines():
        lines[0].set_label("peak of process 0")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, fontsize=7, borderpad=0)


def draw_split(axes: Axes, run: Seen) -> None:
    """Draw the phases of measured steps, stacked: their sum is what a step's phases took on process 0."""
    found = {phase: w for phase in PHASES if (w := run.window(f"split_seconds/{phase}", COLUMNS)) is not None}
    axes.set(xlabel="step", ylabel="time split of a step (ms, process 0)")
    if not found:
        return say_nothing(axes, "not measured: see metrics.split_every")
    steps = next(iter(found.values())).step
    values = [1e3 * np.nan_to_num(np.interp(steps, w.step, w.mean)) for w in found.values()]
    axes.stackplot(steps, values, colors=[PHASE_COLORS[phase] for phase in found], labels=list(found), linewidth=0)
    axes.margins(x=0.01)
    mark_restarts(axes, run)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, fontsize=7, borderpad=0, handlelength=1.2, columnspacing=1.0
    )
    return None


def draw_goodput(axes: Axes, run: Seen) -> None:
    """Draw where all time went, as one bar with its legend below."""
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    if not run.folder.time_file.is_file():
        return say_nothing(axes, "no record of the time")
    found = account(run.folder.time_file)
    goodput_bar(axes, found)
    axes.set_xlabel(f"share of {duration(found.total / 1e6)}, restarts included (%)")
    axes.set_title(f"goodput {100 * found.goodput:.1f}%: time in steps that count", fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.75), ncols=5, fontsize=7, borderpad=0)
    return None


def goodput_bar(axes: Axes, found: Account) -> None:
    """Draw one bar of all time by category, with a label for each category that took some."""
    left = 0.0
    for category, paint in CATEGORY_COLORS.items():
        share = 100 * found.spent[category] / max(found.total, 1)
        if found.spent[category]:
            words = f"{category} {share:.1f}% ({_brief(found.spent[category] / 1e6)})"
            axes.barh(0, share, left=left, height=0.8, color=paint, label=words, gid=f"goodput-{category}")
            left += share
    axes.set(xlim=(0, 100), ylim=(-0.4, 0.4))


def _brief(seconds: float) -> str:
    return f"{seconds:.2g}s" if seconds < 10 else duration(seconds)
