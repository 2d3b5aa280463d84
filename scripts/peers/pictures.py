"""The two pictures of the page: losses on the same axes, and bars of tokens/s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shoal.report.pictures.canvas import canvas, color, dash, save, thousands

Losses = Mapping[str, Sequence[float]]  # by contender
Speeds = Mapping[str, Mapping[str, float]]  # middle, lowest and highest by contender


def draw_losses(cases: Mapping[str, Losses], file: Path) -> None:
    """Draw the loss of each step: a panel for each case, a line for each contender, from wide to narrow as they overlap."""
    with canvas(4.5 * len(cases), 3.6) as figure:
        for axes, (title, losses) in zip(_row(figure, len(cases)), cases.items(), strict=True):
            for index, (name, values) in enumerate(losses.items()):
                steps = range(1, len(values) + 1)
                width = 6.0 - 5.0 * index / len(losses)
                axes.plot(steps, values, color=color(index), linestyle=dash(index), linewidth=width, label=name)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylabel("training loss (nats per token)")
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=4, fontsize=8)
        save(figure, file)


def draw_speeds(cases: Mapping[str, Speeds], file: Path) -> None:
    """Draw tokens/s: a panel for each case, a bar for each contender, with a line from the lowest to the highest run."""
    with canvas(4.5 * len(cases), 3.0) as figure:
        for axes, (title, speeds) in zip(_row(figure, len(cases)), cases.items(), strict=True):
            names = list(speeds)
            middle = [speeds[name]["middle"] for name in names]
            below = [speeds[name]["middle"] - speeds[name]["lowest"] for name in names]
            above = [speeds[name]["highest"] - speeds[name]["middle"] for name in names]
            colors = [color(index) for index in range(len(names))]
            axes.barh(names, middle, xerr=(below, above), color=colors, error_kw={"linewidth": 0.8})
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_title(title)
            axes.set_xlabel("tokens/s")
            thousands(axes)
        save(figure, file)


def _row(figure, count: int):  # type: ignore[no-untyped-def]
    """Return `count` axes beside each other."""
    return figure.subplots(1, count, squeeze=False)[0]
