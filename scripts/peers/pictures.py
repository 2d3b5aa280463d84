"""The two pictures of the page: losses on the same axes, and bars of tokens/s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from shoal.report.pictures.canvas import canvas, color, dash, save, thousands

SMALLEST: Final = 1e-7  # distance of losses that is drawn; float32 rounds at about this

Losses = Mapping[str, Sequence[float]]  # by contender
Speeds = Mapping[str, Mapping[str, float]]  # middle, lower and upper by contender


def draw_losses(cases: Mapping[str, Losses], file: Path) -> None:
    """
    Draw the losses of each case on the same axes, lines from wide to narrow as they overlap; below, distances from the first.

    A distance of 0 is drawn at the bottom.
    """
    names = _all_names(cases)
    with canvas(4.5 * len(cases), 5.4) as figure:
        panels = figure.subplots(2, len(cases), squeeze=False, sharex="col", height_ratios=(3, 2))
        for (above, below), (title, losses) in zip(panels.T, cases.items(), strict=True):
            first = next(iter(losses.values()))
            for name, values in losses.items():
                index, steps = names.index(name), range(1, len(values) + 1)
                style = {"color": color(index), "linestyle": dash(index)}
                above.plot(steps, values, linewidth=8.0 - 7.0 * index / len(names), label=name, **style)
                distances = [max(SMALLEST, abs(a - b)) for a, b in zip(values, first, strict=True)]
                if values is not first:
                    below.plot(steps, distances, marker="o", markersize=3, **style)
            above.set_title(title)
            above.set_ylabel("training loss (nats per token)")
            below.set_ylabel("distance from shoal's loss")
            below.set_xlabel("step")
            below.set_yscale("log")
            below.set_ylim(SMALLEST, 1e-1)
        handles = {
            label: handle for axes in panels[0] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", ncols=2 * len(cases), fontsize=8)
        save(figure, file)


def draw_speeds(cases: Mapping[str, Speeds], file: Path) -> None:
    """Draw tokens/s: a panel for each case, a bar for each contender, with a line between the quartiles of its steps."""
    everyone = _all_names(cases)
    with canvas(4.5 * len(cases), 3.0) as figure:
        panels = figure.subplots(1, len(cases), squeeze=False)[0]
        for axes, (title, speeds) in zip(panels, cases.items(), strict=True):
            names = list(speeds)
            middle = [speeds[name]["middle"] for name in names]
            below = [speeds[name]["middle"] - speeds[name]["lower"] for name in names]
            above = [speeds[name]["upper"] - speeds[name]["middle"] for name in names]
            colors = [color(everyone.index(name)) for name in names]
            axes.barh(names, middle, xerr=(below, above), color=colors, error_kw={"linewidth": 0.8})
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_title(title)
            axes.set_xlabel("tokens/s")
            thousands(axes)
        save(figure, file)


def _all_names(cases: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Return the contenders of all cases: each has the same color everywhere."""
    return list(dict.fromkeys(name for case in cases.values() for name in case))
