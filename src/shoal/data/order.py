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


def sample_at(seed: int, positions: npt.ArrayLike, num_samples: int, source: int = 0) -> Ints:
    """
    Return the sample number at each of `positions`, in [0, num_samples); same shape.

    A position counts the samples since the start of training.
    Positions e*n to (e+1)*n - 1 are epoch e. Each epoch is a different permutation of all n samples.
    source: index of the source in a blend; sources of equal size have different orders.
    """
    _check(num_samples)
    at = np.atleast_1d(np.asarray(positions, np.int64))
    if (at < 0).any():
        raise ValueError("positions must not be negative")
    epoch, slot = np.divmod(at, num_samples)
    samples = _walk(_feistel, slot, _key(seed, epoch, source), num_samples)
    return samples.reshape(np.shape(positions))


def position_of(seed: int, samples: npt.ArrayLike, epochs: npt.ArrayLike, num_samples: int, source: int = 0) -> Ints:
    """Return the position of each of `samples` in each of `epochs`, the inverse of `sample_at`. The two are broadcast."""
    _check(num_samples)
    wanted, epoch = np.broadcast_arrays(np.asarray(samples, np.int64), np.asarray(epochs, np.int64))
    if ((wanted < 0) | (wanted >= num_samples)).any():
        raise ValueError(f"samples must be in range({num_samples})")
    slots = _walk(_inverse, np.atleast_1d(wanted), _key(seed, np.atleast_1d(epoch), source), num_samples)
    found: Ints = slots.reshape(wanted.shape) + epoch * num_samples
    return found


def _check(num_samples: int) -> None:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")


def _key(seed: int, epoch: Ints, source: int) -> Words:
    """Return a 64-bit key for each (seed, source, epoch); a seed may be any non-negative integer."""
    key = np.zeros(1, np.uint64)  # not a scalar: numpy warns if a scalar product overflows, which is intended here
    for word in range(max(1, -(-seed.bit_length() // 64))):
        key = _mix(key ^ np.uint64(seed >> (64 * word) & 0xFFFFFFFFFFFFFFFF))
    # mixed seeds are far apart, and epochs and sources small: no two of them collide
    return _mix(key + epoch.astype(np.uint64) + (np.uint64(source) << np.uint64(48)))


def _mix(x: Words) -> Words:
    """Mix by splitmix64: each bit of the result depends on each bit of x."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _walk(permute: Callable[[Words, list[Words], int], Words], values: Ints, key: Words, n: int) -> Ints:
    """
    Permute range(n) by cycle walking: permute the next power of four, and repeat for values outside range(n).

    The power is at most 4n, so a value needs at most four passes on average. The inverse walks the same cycles backward.
    """
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = [_mix(key + np.uint64(turn)) for turn in range(ROUNDS)]
    x = permute(values.astype(np.uint64), round_keys, half_bits)
    while (outside := x >= n).any():
        x = np.where(outside, permute(x, round_keys, half_bits), x)
    return x.astype(np.int64)


def _feistel(x: Words, round_keys: list[Words], half_bits: int) -> Words:
    """Apply a Feistel network: a bijection of range(4**half_bits) for each key (Luby and Rackoff 1988)."""
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> bits, x & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << bits) | right


def _inverse(x: Words, round_keys: list[Words], half_bits: int) -> Words:
    """Undo `_feistel`: each round only XORs one half with a function of the other, which is still there."""
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = x >> bits, x & mask
    for round_key in reversed(round_keys):
        left, right = right ^ (_mix(left ^ round_key) & mask), left
    return (left << bits) | right
