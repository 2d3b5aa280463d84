"""Prices of devices, as `shoal plan --price` takes them. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from shoal.errors import ShoalError

CURRENCY: Final = "[a-zA-Z]{3}|[$€£]"


@dataclass(frozen=True)
class Price:
    """What a device costs for an hour."""

    amount: float
    currency: str


def read_price(text: str) -> Price:
    """Read "2.49usd". Raises `ShoalError` if it has no amount or no currency."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({CURRENCY})(?:/h)?", text.strip())
    if found is None:
        raise ShoalError(f"--price {text}: give what one device costs for an hour, with its currency, such as 2.49usd")
    return Price(float(found[1]), found[2].upper())
