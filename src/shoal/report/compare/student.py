"""
Student's t distribution: its distribution function and quantiles, with the standard library alone.

The distribution function is a regularized incomplete beta function, computed by its continued fraction (DLMF 8.17.22).
"""

from __future__ import annotations

import math
from typing import Final

_SMALL: Final = 1e-300
_AS_NORMAL: Final = 1e7  # beyond, the normal distribution is as close as rounding
_TERMS: Final = 10_000  # more than any number of degrees of freedom needs


def cdf(t: float, df: float) -> float:
    """Return P(T <= t) for `df` > 0 degrees of freedom; `df` may be infinite, which is the normal distribution."""
    if df > _AS_NORMAL:
        return 0.5 * math.erfc(-t / math.sqrt(2))
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return 1 - tail if t > 0 else tail


def quantile(p: float, df: float) -> float:
    """Return the t with P(T <= t) = p, for p in (0, 1)."""
    if p == 0.5:
        return 0.0
    if p < 0.5:
        return -quantile(1 - p, df)
    low, high = 0.0, 1.0
    while cdf(high, df) < p:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if cdf(middle, df) < p else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b), for x in [0, 1]."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only below its mean
        return 1 - _incomplete_beta(b, a, 1 - x)
    logs = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(logs) / a * _fraction(a, b, x)


def _fraction(a: float, b: float, x: float) -> float:
    """Evaluate the continued fraction by Lentz's method, as modified by Thompson and Barnett."""
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _TERMS):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _nonzero(1 + term * d)
            c = _nonzero(1 + term / c)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def _nonzero(value: float) -> float:
    return value if abs(value) > _SMALL else _SMALL
