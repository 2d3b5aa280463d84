"""What a reader sees in a figure: its texts and whether they overlap, its pixels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from numpy.typing import NDArray


def texts(figure: Figure) -> list[tuple[str, Any]]:
    """Return each visible text of a figure with its box in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    unseen = set(_labels_of_unseen_ticks(figure))
    found = [
        each for each in figure.findobj(Text) if each.get_visible() and each.get_text().strip() and each not in unseen
    ]
    return [(each.get_text(), each.get_window_extent(renderer)) for each in found]


def _labels_of_unseen_ticks(figure: Figure) -> Iterator[Text]:
    """Yield the labels of ticks beyond an axis, which matplotlib makes and does not draw."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not axes.axison or not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    yield from (tick.label1, tick.label2)


def overlaps(figure: Figure) -> Iterator[str]:
    """Yield the pairs of texts that overlap, and the texts that leave the figure."""
    found = texts(figure)
    for (words, a), (others, b) in itertools.combinations(found, 2):
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 1:
            yield f"{words!r} and {others!r}"
    for words, box in found:
        if box.x0 < -1 or box.x1 > figure.bbox.width + 1 or box.y0 < -1 or box.y1 > figure.bbox.height + 1:
            yield f"{words!r} leaves the picture"


def pixels(file: Path) -> NDArray[np.float64]:
    """Return the colors of a PNG: [height, width, 3], 0 to 1."""
    found: NDArray[np.float64] = imread(file)[..., :3]
    return found


def rows_of(picture: NDArray[np.float64], color: str, tolerance: float = 0.01) -> NDArray[np.int64]:
    """Return the rows with pixels near a color, blended with white or not."""
    wanted = np.array([int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    ink = 1 - picture
    size = np.linalg.norm(ink, axis=-1)
    along = (ink @ (1 - wanted)) / np.maximum(size * np.linalg.norm(1 - wanted), 1e-9)
    return np.unique(np.nonzero((along > 1 - tolerance) & (size > 0.15))[0])
