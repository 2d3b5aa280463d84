"""
Near duplicates: documents whose sets of five-word phrases overlap, by MinHash and LSH (rensa). No torch.

A signature of 128 slots estimates the Jaccard similarity of two documents' phrases (Broder 1997): the share of equal slots.
Only documents that share a band of slots are compared (Indyk and Motwani 1998).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.filters.sorted_runs import SortedRuns
from shoal.data.filters.words import words_of
from shoal.errors import DataError

SLOTS = 128  # the estimate's standard deviation is at most 0.045, and 0.035 at a similarity of 0.8
PHRASE_WORDS = 5
FOUND_AT_THRESHOLD = 0.9  # minimum chance that two documents exactly at the threshold are compared
COMPARED_AT_MOST = 16  # documents compared for each band: bounds the work on pages made from one template
SEED = 1
NO_WORDS = np.uint32(0xFFFFFFFF)  # every slot of a document without words

Words64 = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]  # [documents, SLOTS]
_FACTOR, _MIX_1, _MIX_2 = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def load_rensa() -> Any:
    """Return rensa's class of signatures. Raises DataError if rensa is not installed."""
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise DataError(
            "data.deduplicate near needs rensa: pip install 'shoal[data]'; or set data.deduplicate to exact"
        ) from error
    return RMinHash


def version() -> int:
    """Return the version of rensa's algorithm: signatures of different versions cannot be compared."""
    return int(load_rensa().ALGORITHM_VERSION)


def band_slots(threshold: float) -> int:
    """Return how many slots a band has: the most with which documents at the threshold are still found."""

    def found(slots: int) -> float:
        return 1.0 - float((1 - threshold**slots) ** (SLOTS // slots))

    return max((slots for slots in range(1, SLOTS + 1) if found(slots) >= FOUND_AT_THRESHOLD), default=1)


def signatures_of(texts: Sequence[str]) -> Signatures:
    """Return the signature of each text; `NO_WORDS` in every slot if it has no words."""
    phrases = [_phrases(text) for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(found) for found in phrases])]).astype(np.uint64)
    flat = np.concatenate([*phrases, np.zeros(0, np.uint64)])
    matrix = load_rensa().digest_matrix_from_flat_token_hashes(flat, offsets, SLOTS, SEED)
    return np.array(matrix.to_rows(), np.uint32).reshape(len(texts), SLOTS)


def _phrases(text: str) -> Words64:
    """Return a hash of each five consecutive words; of all words, if there are fewer."""
    words = np.array(load_rensa().hash_token_sets([words_of(text)])[0], np.uint64)
    size = min(PHRASE_WORDS, len(words))
    if not size:
        return words
    hashes = np.zeros(len(words) - size + 1, np.uint64)
    for place in range(size):
        hashes = _mix(hashes * _FACTOR + words[place : place + len(hashes)])
    return hashes


def _mix(x: Words64) -> Words64:
    """Mix by splitmix64's finalizer: each bit of the result depends on each bit of x."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


class NearIndex:
    """
    The kept documents, by the bands of their signatures.

    Memory: 12 bytes a band and document (192 at a threshold of 0.8). Signatures take 512 bytes each, and are read
    through a function.
    """

    def __init__(self, threshold: float, read: Callable[[Sequence[int]], Signatures]) -> None:
        """Begin without documents. read: a function that returns the signatures [n, SLOTS] of kept documents, by number."""
        self._threshold, self._read = threshold, read
        self._slots = band_slots(threshold)
        self._bands = SortedRuns()

    def add(self, signatures: Signatures, first: int) -> None:
        """Add documents that `choose` kept, numbered from `first` on."""
        self._choose(signatures, first, compare=False)

    def choose(self, signatures: Signatures, first: int) -> npt.NDArray[np.bool_]:
        """
        Return which documents are near duplicates of an earlier kept one, and add the others, numbered from `first` on.

        The result does not depend on how documents are grouped into calls.
        """
        return self._choose(signatures, first, compare=True)

    def _choose(self, signatures: Signatures, first: int, *, compare: bool) -> npt.NDArray[np.bool_]:
        keys, has_words = self._keys(signatures), (signatures != NO_WORDS).any(axis=1)
        before, here = self._earlier(keys), _Kept(first)
        duplicate = np.zeros(len(signatures), np.bool_)
        for place, bands in enumerate(keys.tolist()):
            if not has_words[place]:
                here.keep(place, (), {})
                continue
            old, new = before[place], [k for band in bands for k in here.places.get(band, ())]
            others = [signatures[sorted(set(new))]] if compare and new else []
            others += [self._read(sorted({k for found in old.values() for k in found}))] if compare and old else []
            duplicate[place] = any(self._similar(signatures[place], other) for other in others)
            if not duplicate[place]:
                here.keep(place, bands, old)
        self._bands.add(np.array(here.keys, np.uint64), here.numbers)
        return duplicate

    def _similar(self, signature: npt.NDArray[np.uint32], others: Signatures) -> bool:
        return bool(((others == signature).mean(axis=1) >= self._threshold).any())

    def _earlier(self, keys: Words64) -> list[dict[int, list[int]]]:
        """Return, for each document, {band: numbers of the earlier documents that share it}."""
        found: list[dict[int, list[int]]] = [{} for _ in keys]
        flat, bands = keys.ravel().tolist(), keys.shape[1]
        for place, number in zip(*(found.tolist() for found in self._bands.find(keys.ravel())), strict=True):
            found[place // bands].setdefault(flat[place], []).append(number)
        return found

    def _keys(self, signatures: Signatures) -> Words64:
        """Return a hash of each band of each signature: [documents, bands]."""
        bands = SLOTS // self._slots
        slots = signatures[:, : bands * self._slots].reshape(len(signatures), bands, self._slots).astype(np.uint64)
        keys = np.broadcast_to(np.arange(bands, dtype=np.uint64), slots.shape[:2])
        for slot in range(self._slots):
            keys = _mix(keys * _FACTOR + slots[:, :, slot])
        return keys


class _Kept:
    """Documents kept in one call of `NearIndex`: their places by band, and the bands to add to the index."""

    def __init__(self, first: int) -> None:
        self.places: dict[int, list[int]] = {}
        self.keys: list[int] = []
        self.numbers: list[int] = []
        self._next = first

    def keep(self, place: int, bands: Sequence[int], earlier: Mapping[int, Sequence[int]]) -> None:
        """Keep a document. earlier: by band, the documents of earlier calls. A band that has enough gets no more."""
        for band in bands:
            same = self.places.setdefault(band, [])
            if len(earlier.get(band, ())) + len(same) < COMPARED_AT_MOST:
                same.append(place)
                self.keys.append(band)
                self.numbers.append(self._next)
        self._next += 1
