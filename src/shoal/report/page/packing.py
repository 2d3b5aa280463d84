"""
Arrays for a page, small: bytes of the same weight together, deflated, in base64. No torch.

A curve is embedded once, as finely as the budget allows; the page merges its buckets for each zoom. Steps, tokens and
seconds are stored as differences of whole numbers, which are nearly constant.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.report.curves.curves import Window


@dataclass
class Arrays:
    """The arrays of a page, each stored once; `add` methods return an array's place in `packed`."""

    packed: list[dict[str, Any]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def add_values(self, values: npt.ArrayLike) -> int:
        """Add values in float32."""
        return self._add("float32", np.asarray(values, dtype="<f4"), 1)

    def add_rising(self, values: npt.ArrayLike, unit: float = 1) -> int:
        """Add values that rise, as differences of multiples of `unit`."""
        whole = np.rint(np.asarray(values, dtype=np.float64) / unit)
        return self._add("differences", np.diff(whole, prepend=0.0).astype("<f8"), unit)

    @property
    def size(self) -> int:
        """Return the bytes of all arrays so far."""
        return sum(len(each["data"]) for each in self.packed)

    def _add(self, kind: str, values: npt.NDArray[Any], unit: float) -> int:
        planes = values.view(np.uint8).reshape(len(values), -1).T.tobytes()
        data = base64.b64encode(zlib.compress(planes, 6)).decode()
        if data not in self._places:
            self._places[data] = len(self.packed)
            self.packed.append({"kind": kind, "unit": unit, "data": data})
        return self._places[data]


def pack_window(window: Window, arrays: Arrays) -> Mapping[str, int]:
    """Add a window's arrays; return {field: place}. The page takes `low` and `high` from `mean`, 1 for `count` and 0 for `gaps` if they are absent."""
    found = {
        "step": arrays.add_rising(window.step),
        "tokens": arrays.add_rising(window.tokens),
        "seconds": arrays.add_rising(window.seconds, 1e-3),
        "mean": arrays.add_values(window.mean),
    }
    if window.count.max(initial=0) > 1:
        found |= {name: arrays.add_values(getattr(window, name)) for name in ("low", "high", "count")}
    if window.gaps.any():
        found["gaps"] = arrays.add_values(window.gaps)
    return found
