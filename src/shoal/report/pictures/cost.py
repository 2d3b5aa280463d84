"""What a run would take on several kinds of devices: hours and money, as `shoal plan` predicts them, with 90% intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from shoal.plan.choice.devices import Offer
from shoal.plan.speed.corrections import Interval
from shoal.report.pictures.canvas import COLORS, PALE, canvas, thousands

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH: Final = 9.0  # inches
BAR: Final = 0.4  # inches of height for a kind of device
HOUR: Final = 3600.0


def draw_cost(offers: Sequence[Offer], currency: str, title: str) -> Iterator[Figure]:
    """Yield a figure with a bar for each offer: its hours and, if priced, its cost."""
    hours = [offer.whole.scaled(1 / HOUR) for offer in offers if offer.whole]
    costs = [offer.cost for offer in offers if offer.cost]
    panels = [(hours, "time (hours)", COLORS[0]), *([(costs, f"cost ({currency})", COLORS[1])] if costs else [])]
    with canvas(WIDTH, 1.5 + BAR * len(offers)) as figure:
        figure.suptitle(
            f"{title}\nthe fastest layout on each kind of device, as shoal plan predicts it; lines: 90% intervals",
            x=0.01,
            ha="left",
            fontsize=9,
        )
        for axes, (values, label, paint) in zip(
            figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
        ):
            _bars(axes, values, label, paint)
            axes.set_yticks(range(len(offers)), [f"{offer.machine}\n{offer.best.need.layout}" for offer in offers])
        axes.invert_yaxis()
        yield figure


def _bars(axes: Axes, values: Sequence[Interval], label: str, paint: str) -> None:
    """Draw a bar for each value, with its interval and the number at its end."""
    spans = [[v.middle - v.low for v in values], [v.high - v.middle for v in values]]
    axes.barh(
        range(len(values)),
        [v.middle for v in values],
        height=0.6,
        color=paint,
        xerr=spans,
        error_kw={"ecolor": PALE, "capsize": 3},
    )
    for place, value in enumerate(values):
        axes.annotate(
            f" {value.middle:,.3g}" if value.middle < 1000 else f" {value.middle:,.0f}",
            (value.high, place),
            va="center",
            fontsize=8,
        )
    axes.set(xlabel=label, xlim=(0, 1.15 * max(v.high for v in values)))
    axes.grid(visible=False, axis="y")
    thousands(axes)
