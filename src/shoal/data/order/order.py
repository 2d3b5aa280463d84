"""
The order of samples: a pure function of (seed, position), and its inverse. No torch, no state.

An epoch visits range(n) in the order of a keyed Feistel permutation. Nothing is shuffled in memory, so any process can
compute the sample at any position, or the position of any sample, and a run can resume with another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

ROUNDS = 6
# Odd constants of splitmix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195).
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def sample_at(seed: int, positions: npt.ArrayLike, num_samples: npt.ArrayLike, source: npt.ArrayLike = 0) -> Ints:
    """
    Return the sample number at each of `positions`, in [0, num_samples); same shape.

    A position counts the samples since the start of training.
    Positions e*n to (e+1)*n - 1 are epoch e. Each epoch is a different permutation of all n samples.
    source: index of the source in a blend; sources of equal size have different orders. num_samples and source may be
    arrays of the shape of `positions`.
    """
    at, n, of = _arrays(positions, num_samples, source)
    if (at < 0).any():
        raise ValueError("positions must not be negative")
    epoch, slot = np.divmod(at, n)
    return _walk(_feistel, slot, _key(seed, epoch, of), n).reshape(np.shape(positions))


def position_of(
    seed: int, samples: npt.ArrayLike, epochs: npt.ArrayLike, num_samples: npt.ArrayLike, source: npt.ArrayLike = 0
) -> Ints:
    """Return the position of each of `samples` in each of `epochs`, the inverse of `sample_at`. All are broadcast."""
    wanted, epoch, n, of = _arrays(samples, epochs, num_samples, source)
    if ((wanted < 0) | (wanted >= n)).any():
        raise ValueError(f"samples must be in range({n.max()})")
    found: Ints = _walk(_inverse, wanted, _key(seed, epoch, of), n) + epoch * n
    return found.reshape(np.broadcast_shapes(np.shape(samples), np.shape(epochs)))


def _arrays(*values: npt.ArrayLike) -> list[Ints]:
    """Return the values as flat arrays of one shape; the second to last are numbers of samples."""
    found = [np.atleast_1d(each).ravel() for each in np.broadcast_arrays(*(np.asarray(v, np.int64) for v in values))]
    if found[-2].size and found[-2].min() < 1:
        raise ValueError(f"num_samples must be at least 1, not {found[-2].min()}")
    return found


def _key(seed: int, epoch: Ints, source: Ints) -> Words:
    """Return a 64-bit key for each (seed, source, epoch); a seed may be any non-negative integer."""
    key = np.zeros(1, np.uint64)  # not a scalar: numpy warns if a scalar product overflows, which is intended here
    for word in range(max(1, -(-seed.bit_length() // 64))):
        key = _mix(key ^ np.uint64(seed >> (64 * word) & 0xFFFFFFFFFFFFFFFF))
    # mixed seeds are far apart, and epochs and sources small: no two of them collide
    return _mix(key + epoch.astype(np.uint64) + (source.astype(np.uint64) << np.uint64(48)))


def _mix(x: Words) -> Words:
    """Mix by splitmix64: each bit of the result depends on each bit of x."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


Permute = Callable[[Words, Words, Words], Words]
"""(values, round keys [ROUNDS, values], bits of half a value) -> permuted values"""


def _walk(permute: Permute, values: Ints, key: Words, num_samples: Ints) -> Ints:
    """
    Permute range(n) by cycle walking: permute the next power of four, and repeat for values outside range(n).

    The power is at most 4n, so a value needs at most four passes on average. The inverse walks the same cycles backward.
    """
    n = num_samples.astype(np.uint64)
    bits = np.maximum(1, (_bit_length(num_samples - 1) + 1) // 2).astype(np.uint64)
    round_keys = _mix(key + np.arange(ROUNDS, dtype=np.uint64)[:, None])
    x = permute(values.astype(np.uint64), round_keys, bits)
    while (outside := np.flatnonzero(x >= n)).size:
        x[outside] = permute(x[outside], round_keys[:, outside], bits[outside])
    return x.astype(np.int64)


def _bit_length(values: Ints) -> Ints:
    """Return the bits of each number: exact, since a float64 has the exponent of any number below 2^53."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)


def _feistel(x: Words, round_keys: Words, bits: Words) -> Words:
    """Apply a Feistel network: a bijection of range(4**bits) for each key (Luby and Rackoff 1988)."""
    mask = (np.uint64(1) << bits) - np.uint64(1)
    left, right = x >> bits, x & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << bits) | right


def _inverse(x: Words, round_keys: Words, bits: Words) -> Words:
    """Undo `_feistel`: each round only XORs one half with a function of the other, which is still there."""
    mask = (np.uint64(1) << bits) - np.uint64(1)
    left, right = x >> bits, x & mask
    for round_key in round_keys[::-1]:
        before: Words = np.bitwise_xor(right, _mix(left ^ round_key) & mask)
        left, right = before, left
    return (left << bits) | right
