"""Tables of results as lines of text, which look the same in a terminal, a file and a document. No torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from shoal.system.output import aligned


def table(columns: Mapping[str, Sequence[str]], left: Collection[str] = ()) -> list[str]:
    """Return a line of titles and one for each row; a column whose cells are all empty is omitted. left: left-aligned columns."""
    kept = {title: [title, *cells] for title, cells in columns.items() if any(cells)}
    rows = list(zip(*kept.values(), strict=True))
    return aligned(rows, left=[number for number, title in enumerate(kept) if title in left])


def gathered(rows: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Return the cells of all rows by column; a row without a column's cell gets an empty one."""
    titles = dict.fromkeys(title for row in rows for title in row)
    return {title: [row.get(title, "") for row in rows] for title in titles}


def number(value: float, form: str, unit: str = "") -> str:
    """Return a number in this format; an empty cell if it is NaN."""
    return "" if math.isnan(value) else f"{value:{form}}{unit}"


def spread(values: Sequence[float]) -> str:
    """Return half the distance from the lowest to the highest value, relative to their mean: "±3%"; empty for one value."""
    if len(values) < 2:
        return ""
    return f"±{100 * (max(values) - min(values)) / (max(values) + min(values)):.0f}%"
