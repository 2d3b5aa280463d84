"""Find documents that contain text of evaluation sets, by n-grams of words. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shoal.data.corpus.documents import CorpusFile
from shoal.data.filters.words import words_of
from shoal.errors import DataError, ModelError
from shoal.hub.find import find_path, near_path
from shoal.system.output import on_one_line

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing


class EvaluationTexts:
    """
    The n-grams of evaluation sets: files of text, or of JSON lines in which every string is a text.

    They are read when the first document is compared. Texts of fewer words than n cannot be found in the corpus.
    Memory: about 150 bytes for each n-gram.
    """

    def __init__(self, paths: Sequence[str], ngram: int) -> None:
        """Find the files. ngram: words in an n-gram. Raises DataError if a file is missing."""
        self._names, self._ngram = list(paths), ngram
        self._paths = [_find(path) for path in paths]

    def listing(self) -> list[CorpusFile]:
        """Return the files, so that a change to one is noticed."""
        status = [path.stat() for path in self._paths]
        return [CorpusFile(name, s.st_size, s.st_mtime_ns) for name, s in zip(self._names, status, strict=True)]

    def digest(self, index: int) -> str:
        """Return a hash of the content of one file of the listing."""
        with self._paths[index].open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]

    def touches(self, text: str) -> bool:
        """
        Return whether a text shares an n-gram of words with the evaluation sets.

        Raises DataError if a file of evaluation texts cannot be read, or if none of them has n words.
        """
        return self._grams.in_words(words_of(text))

    @cached_property
    def _grams(self) -> _Grams:
        grams = _Grams(self._ngram)
        for path in self._names:
            for text in _texts(path):
                grams.add(words_of(text))
        if not grams.grams:
            raise DataError(
                f"no text in {', '.join(map(on_one_line, self._names))} has {self._ngram} words, so none can be found in "
                "the corpus; lower data.decontaminate_ngram or correct data.decontaminate"
            )
        return grams


class _Grams:
    """N-grams as the numbers of their words, which are exact, and as hashes, which are fast to look up."""

    def __init__(self, ngram: int) -> None:
        self._ngram, self._word_ids = ngram, dict[str, int]()
        self.grams: set[bytes] = set()

    def add(self, words: list[str]) -> None:
        ids = np.array([self._word_ids.setdefault(word, len(self._word_ids)) for word in words], np.int32)
        self.grams.update(ids[at : at + self._ngram].tobytes() for at in range(len(ids) - self._ngram + 1))

    def in_words(self, words: list[str]) -> bool:
        """Return whether an n-gram of these words is one of them."""
        known = self._word_ids
        ids = np.array([known.get(word, -1) for word in words], np.int32)
        count = len(ids) - self._ngram + 1
        if count < 1:
            return False
        unknown = np.concatenate([[0], np.cumsum(ids < 0)])
        starts = np.flatnonzero(unknown[self._ngram :] == unknown[:count])
        if not len(starts):
            return False
        hashes = self._hashes([ids[starts + place] for place in range(self._ngram)])
        at = np.searchsorted(self._sorted_hashes, hashes)
        likely = starts[self._sorted_hashes[np.minimum(at, len(self._sorted_hashes) - 1)] == hashes]
        return any(ids[start : start + self._ngram].tobytes() in self.grams for start in likely.tolist())

    @cached_property
    def _sorted_hashes(self) -> npt.NDArray[np.uint64]:
        ids = np.frombuffer(b"".join(self.grams), np.int32).reshape(-1, self._ngram)
        return np.unique(self._hashes(list(ids.T)))

    def _hashes(self, columns: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.uint64]:
        """Return a hash of each n-gram. columns: [ngram, n], the word ids at each place of the n-grams."""
        hashes = np.zeros(len(columns[0]), np.uint64)
        for column in columns:
            hashes = hashes * _FACTOR + column.astype(np.uint64)
        return hashes


def _find(path: str) -> Path:
    try:
        found = find_path(path)
    except ModelError as error:
        raise DataError(f"cannot read {on_one_line(path)}: {error}; correct data.decontaminate") from error
    if found is None or not found.is_file():
        what = "no such file" if found is None else "not a file"
        raise DataError(f"{what}: {on_one_line(path)}{near_path(path)}; correct data.decontaminate")
    return found


def _texts(path: str) -> Iterator[str]:
    try:
        with Path(path).expanduser().open(encoding="utf-8") as file:
            if path.endswith(".jsonl"):
                for number, line in enumerate(file, 1):
                    yield from _strings(_parse(line, f"{on_one_line(path)}:{number}")) if line.strip() else ()
            else:
                yield file.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{on_one_line(path)} is not UTF-8 text ({error.reason}); correct data.decontaminate"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {on_one_line(path)}: {why}; correct data.decontaminate") from error


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON, so its evaluation text would be missed; correct the file") from error


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, but not the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
