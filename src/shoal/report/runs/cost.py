"""
What a run cost: device-hours by category of `shoal goodput`, times the prices that a user sets. No torch.

    currency: EUR
    per_device_hour:          # the first pattern that fits a device's name counts
      "NVIDIA H200*": 3.10
      cpu: 0.20               # a node without GPUs

Without such a file, devices are the user's own and cost 0.
"""

from __future__ import annotations

import bisect
import fnmatch
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from shoal.errors import ShoalError
from shoal.report.runs.written_options import written_options
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.goodput import MEANINGS, account

PRICES_FILE: Final = "prices.yaml"
OWN: Final = "your own machines: 0"
MICROSECONDS_PER_HOUR: Final = 3_600_000_000


@dataclass(frozen=True)
class Prices:
    """Prices of a device-hour by pattern of the device's name; `by_pattern` None: no price is set, and devices cost 0."""

    currency: str = ""
    by_pattern: Sequence[tuple[str, float]] | None = None

    def of(self, name: str, kind: str) -> float | None:
        """Return the price of an hour of the device `name`, or of its kind, "cpu" or "cuda"; None if no pattern fits."""
        if self.by_pattern is None:
            return 0.0
        names = (name.lower(), kind.lower())
        fits = (
            price for pattern, price in self.by_pattern if any(fnmatch.fnmatchcase(n, pattern.lower()) for n in names)
        )
        return next(fits, None)


def prices(path: Path | None) -> Prices:
    """Return the prices in a file; without a file, "your own machines: 0". Raises `ShoalError` if the file is not a price table."""
    if path is None:
        return Prices()
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ShoalError(f"the prices in {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ShoalError(
            f"{path} is not YAML; write `currency: EUR` and a price for each device under `per_device_hour:`"
        ) from None
    return _checked(path, table)


def _checked(path: Path, table: Any) -> Prices:
    known = {"currency", "per_device_hour"}
    if not isinstance(table, dict) or set(table) != known or not isinstance(table["per_device_hour"], dict):
        raise ShoalError(
            f"{path} needs two keys: `currency`, such as EUR, and `per_device_hour`, a price for each device"
        )
    for pattern, price in table["per_device_hour"].items():
        if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < float("inf"):
            raise ShoalError(f"{path}: the price of {pattern} is {price!r}; set it to a number of at least 0")
    by_pattern = tuple((str(pattern), float(price)) for pattern, price in table["per_device_hour"].items())
    return Prices(str(table["currency"]), by_pattern)


def prices_of(runs: Path, asked: Path | None = None) -> Prices:
    """Return the prices in the file that a user names; else in `prices.yaml` of the folder of all runs; else none are set."""
    beside = runs / PRICES_FILE
    return prices(asked or (beside if beside.is_file() else None))


@dataclass(frozen=True)
class Part:
    """The time of one kind of device: microseconds by category, and the price of an hour (None: unknown)."""

    device: str
    price: float | None
    spent: Mapping[str, int]

    def hours(self, category: str) -> float:
        """Return the device-hours in a category."""
        return self.spent[category] / MICROSECONDS_PER_HOUR


@dataclass(frozen=True)
class Cost:
    """
    Device-hours and money of a run.

    Time between two lives of a run is `idle`: it costs money only if the devices stayed reserved, so totals omit it.
    """

    currency: str
    is_priced: bool
    parts: Sequence[Part]

    @property
    def hours(self) -> Mapping[str, float]:
        """Return the device-hours by category of `shoal goodput`, `idle` included."""
        return {category: sum(part.hours(category) for part in self.parts) for category in MEANINGS}

    @property
    def amounts(self) -> Mapping[str, float]:
        """Return the money by category, `idle` included; devices without a price count 0."""
        return {c: sum(part.hours(c) * (part.price or 0.0) for part in self.parts) for c in MEANINGS}

    @property
    def device_hours(self) -> float:
        """Return the device-hours in which processes ran."""
        return sum(each for category, each in self.hours.items() if category != "idle")

    @property
    def amount(self) -> float:
        """Return the money for the hours in which processes ran."""
        return sum(each for category, each in self.amounts.items() if category != "idle")

    @property
    def unpriced(self) -> Sequence[str]:
        """Return the devices that the price table lacks."""
        return [part.device for part in self.parts if part.price is None]

    def in_words(self) -> str:
        """Return "4.20 EUR for 1.40 device-hours (0.30 EUR of it lost)"."""
        hours = f"{device_hours(self.device_hours)} device-hours"
        if not self.is_priced:
            return f"{OWN}, {hours}"
        if self.unpriced:
            return f"no price for {', '.join(self.unpriced)}, {hours}"
        lost = f" ({money(self.amounts['lost'], self.currency)} of it lost)" if self.amounts["lost"] else ""
        return f"{money(self.amount, self.currency)} for {hours}{lost}"

    def as_json(self) -> dict[str, Any]:
        """Return the cost for `--json` and the page."""
        return {
            "currency": self.currency, "amount": self.amount, "device_hours": self.device_hours, "words": self.in_words(),
            "is_priced": self.is_priced, "unpriced": list(self.unpriced), "hours": dict(self.hours), "amounts": dict(self.amounts),
            "devices": [{"name": part.device, "per_hour": part.price} for part in self.parts],
        }  # fmt: skip


def money(amount: float, currency: str) -> str:
    """Return "4.20 EUR"; amounts below a hundredth keep two digits that count."""
    return f"{amount:,.2f} {currency}" if amount >= 0.01 or not amount else f"{amount:.2g} {currency}"


def device_hours(hours: float) -> str:
    """Return hours with three digits that count: "0.0123", "1.23", "1,234"."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def cost(folder: RunFolder, prices: Prices) -> Cost | None:
    """Return what a run cost so far; None if it has no record of its time."""
    if not folder.time_file.is_file():
        return None
    devices = _Devices(folder)
    names = sorted({devices.of(life) for life in _lives(folder.time_file)})
    parts = []
    for kind, name in names:
        # Each kind of device apart: a life on another kind counts no device of this one
        found = account(folder.time_file, functools.partial(_count_of, devices, (kind, name)))
        parts.append(Part(name, prices.of(name, kind), found.spent))
    return Cost(prices.currency, prices.by_pattern is not None, parts)


def _lives(path: Path) -> list[int]:
    """Return when each life began, in the file's order."""
    return list(dict.fromkeys(line["life"] for line in read_json_lines(path)))


def _count_of(devices: _Devices, kind: tuple[str, str], life: int) -> int:
    """Return the devices of one kind in a life."""
    return devices.count(life) if devices.of(life) == kind else 0


class _Devices:
    """The devices of each life of a run, from its `started` events."""

    def __init__(self, folder: RunFolder) -> None:
        self._starts = [e for e in read_json_lines(folder.events_file) if e.get("event") == "started"]
        self._times = [start["time"] * 1e6 for start in self._starts]
        self._options = written_options(folder.config_file)

    def of(self, life: int) -> tuple[str, str]:
        """Return ("cpu" or "cuda", the device's name)."""
        start = self._start(life)
        kind = str(start.get("device", "cpu")).partition(":")[0]
        gpus = start.get("gpus") or [{}]
        return kind, str(
            gpus[0].get("name") or start.get("device_name") or start.get("machine", {}).get("processor") or kind
        )

    def count(self, life: int) -> int:
        """Return the number of GPUs, or of nodes without GPUs."""
        start = self._start(life)
        per_node = self._options.get("launch.processes") or 0
        processes = int(start.get("processes") or max(1, per_node) * self._options.get("launch.nodes", 1))
        if self.of(life)[0] != "cpu":
            return processes
        return -(-processes // (per_node or processes))

    def _start(self, life: int) -> Mapping[str, Any]:
        """Return the first start after a life began. A life that ended before its start has the devices of the next one, or the last."""
        if not self._starts:
            return {}
        return self._starts[min(bisect.bisect_left(self._times, life), len(self._starts) - 1)]
