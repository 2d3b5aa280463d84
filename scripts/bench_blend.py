"""
Time the two questions of `shoal data` on a blend of five sources with ten trillion tokens and two stages.

    python scripts/bench_blend.py

The index of documents is a formula and the tokens are sparse files, so nothing is generated. Prints the median and the 99th
percentile of 300 questions each: where a document is trained on, and which documents are in one row or one step.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shoal.data.blend import Blend, Stage
from shoal.data.pack import PackedStream
from shoal.data.where import Finder, Life, Timeline
from shoal.system.cpu import model_name

BILLIONS = (5_000, 2_500, 1_500, 700, 300)
SEQ_LEN, GLOBAL_BATCH, MICRO_BATCH, LAST = 4096, 64, 4, 30_000_000


class FormulaStream:
    """A stream whose documents all have `length` tokens: its index is a formula, its tokens are a sparse file."""

    def __init__(self, path: Path, num_tokens: int, length: int) -> None:
        with path.open("wb") as file:
            file.truncate(2 * num_tokens)
        self.tokens = np.memmap(path, np.uint16, "r", 0, (num_tokens,))
        self.num_tokens, self.length = num_tokens, length
        self.num_documents = -(-num_tokens // length)

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint16]:
        return self.tokens[start:stop]

    def document_span(self, number: int) -> tuple[int, int]:
        return number * self.length, min((number + 1) * self.length, self.num_tokens)

    def documents_in(self, start: int, stop: int) -> range:
        return range(start // self.length, (stop - 1) // self.length + 1)


def open_finder(folder: Path) -> Finder:
    """Return the finder of a run on the blend; its shares change after 10 million steps."""
    streams = {
        f"source{n}": FormulaStream(folder / f"{n}.bin", billions * 10**9, 700 + n)
        for n, billions in enumerate(BILLIONS)
    }
    rows = {name: PackedStream(stream, SEQ_LEN, document_mask=False) for name, stream in streams.items()}  # type: ignore[arg-type]
    stages = [Stage(0, (50, 25, 15, 7, 3)), Stage(10_000_000 * GLOBAL_BATCH, (1, 1, 1, 1, 1))]
    order = Blend(0, [len(each) for each in rows.values()], stages)
    return Finder(order, Timeline([Life(0, 0, GLOBAL_BATCH)], MICRO_BATCH), rows, streams)


def milliseconds(asked: Callable[[int], object], questions: Sequence[int]) -> str:
    """Time each question; return the median and the 99th percentile."""
    taken = []
    for question in questions:
        begun = time.perf_counter()
        asked(question)
        taken.append(1e3 * (time.perf_counter() - begun))
    return f"median {statistics.median(taken):.3f} ms, 99th percentile {np.percentile(taken, 99):.3f} ms"


def main() -> None:
    print(
        f"{model_name()}; {len(BILLIONS)} sources, {sum(BILLIONS):,} billion tokens, rows of {SEQ_LEN:,}, {LAST:,} steps"
    )
    with tempfile.TemporaryDirectory() as folder:
        finder = open_finder(Path(folder))
        draw = np.random.default_rng(0)
        documents = draw.integers(0, 10**9 * BILLIONS[-1] // 710, 300).tolist()
        steps = draw.integers(1, LAST, 300).tolist()
        print("where:", milliseconds(lambda n: finder.where(f"source{n % 5}", n, LAST), documents))
        print(f"at, {GLOBAL_BATCH} rows:", milliseconds(finder.at, steps))
        tracemalloc.start()
        finder.where("source4", documents[0], LAST), finder.at(LAST)
        print(f"peak memory of Python's objects: {tracemalloc.get_traced_memory()[1] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
