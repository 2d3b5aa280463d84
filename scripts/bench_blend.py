"""
Time a blend: the two questions of `shoal data`, its loader, and the losses by source.

    python scripts/bench_blend.py

questions: on five sources of ten trillion tokens with two stages. The index of documents is a formula and the tokens are sparse
files, so nothing is generated. Prints the median and the 99th percentile of 300 questions: where a document is trained on,
and which documents a step reads.
loader: processor time of a step's batches, of five sources against one with the same tokens, in pairs.
step: the same training step with and without the losses by source, alternating in one process.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shoal.config.data_options import BlendSource, Data
from shoal.config.options import Config, Model, Train
from shoal.config.run_options import Launch
from shoal.data.dataset import Dataset, new_order, prepare_dataset
from shoal.data.loader import Loader
from shoal.data.order.blend import Blend, Stage
from shoal.data.packing.pack import PackedStream
from shoal.data.where import Finder, Life, Timeline
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.system.cpu import model_name
from shoal.system.signals import StopRequest
from shoal.training.loop import record, take_step
from shoal.training.run import Run

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


def time_loader(folder: Path) -> None:
    """Print the loader's cost of five sources relative to one, as the median of pairs in turn."""
    draw = random.Random(0)
    paths = [folder / f"{number}.jsonl" for number in range(5)]
    for path in paths:
        texts = ("".join(draw.choices("abcdefgh ", k=draw.randint(200, 6000))) for _ in range(800))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    common: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 2048, "folder": str(folder / "data")}
    sources = {
        path.stem: BlendSource(corpus="jsonl", paths=(str(path),), weight=weight)
        for path, weight in zip(paths, (0.4, 0.25, 0.15, 0.12, 0.08), strict=True)
    }
    one = prepare_dataset(Data(corpus="jsonl", paths=tuple(map(str, paths)), **common))
    five = prepare_dataset(Data(sources=sources, **common))
    ratios = []
    for pair in range(15):
        order = (one, five) if pair % 2 else (five, one)
        taken = {id(each): processor_seconds(each) for each in order}
        ratios.append(taken[id(five)] / taken[id(one)])
    print(
        f"loader, five sources over one: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
    )


def processor_seconds(dataset: Dataset, steps: int = 100) -> float:
    """Return the processor time of reading these steps, the least of three times."""
    rows = dataset.rows("train")
    order = new_order(dataset.data, rows.sizes, 0, 64)
    loader = Loader(rows, order, global_batch=64, micro_batch=8, dp_rank=0, dp_size=1)
    taken = []
    for _ in range(3):
        begun = time.process_time()
        for _ in range(steps):
            loader.next_step()
        taken.append(time.process_time() - begun)
    loader.close()
    return min(taken)


def time_step(folder: Path) -> None:
    """Print the cost of the losses by source, relative to a step without them, as the median of pairs in turn."""
    sources = {f"s{n}": BlendSource(corpus="dummy", dummy_documents=200 + n, weight=1.0) for n in range(5)}
    config = Config(
        model=Model(dim=256, num_layers=4, num_heads=4, max_seq_len=512),
        data=Data(sources=sources, tokenizer="bytes", seq_len=512, folder=str(folder / "dummies")),
        train=Train(steps=1000, global_batch=8, micro_batch=4, dtype="float32"),
        launch=Launch(runs=str(folder / "runs"), name="blend"),
    )
    torch.set_num_threads(1)
    run = Run.open(config, Mesh(Place(), torch.device("cpu")), StopRequest())
    ratios: list[float] = []
    for _ in range(40):
        taken = {}
        for count in (5, 1) if len(ratios) % 2 else (1, 5):
            run.runnable.num_sources = count
            begun = time.perf_counter()
            record(run, take_step(run))
            taken[count] = time.perf_counter() - begun
        ratios.append(taken[5] / taken[1])
    run.close()
    quarter = statistics.quantiles(ratios, n=4)
    print(
        f"step, with losses by source over without: median {quarter[1]:.4f}, quartiles {quarter[0]:.4f} to {quarter[2]:.4f}"
    )


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
        tracemalloc.stop()
        time_loader(Path(folder))
        time_step(Path(folder))


if __name__ == "__main__":
    main()
