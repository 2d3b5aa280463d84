"""Amounts with their units, in at most ten characters."""

from __future__ import annotations


def seconds(value: float) -> str:
    """Return "1.23 s", "45.6 ms" or "789 us"."""
    for limit, factor, unit in ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "us")):
        if value >= limit:
            return f"{value * factor:.{_digits(value * factor)}f} {unit}"
    return "0 s"


def size(value: float) -> str:
    """Return "1.23 GiB", "45.6 MiB" or "789 B"."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.{_digits(value / 1024**power)}f} {unit}"
    return f"{value:.0f} B"


def percent(value: float | None, digits: int = 1) -> str:
    """Return "12.3%"; "-" if there is none."""
    return "-" if value is None else f"{value:.{digits}f}%"


def _digits(value: float) -> int:
    """Return how many digits behind the point leave three in all."""
    return 2 if value < 10 else 1 if value < 100 else 0
