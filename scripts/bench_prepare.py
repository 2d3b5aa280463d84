"""
Measure preparing a corpus against its tokenizer alone: `python scripts/bench_prepare.py FOLDER`.

FOLDER holds text files, such as Debian's documentation packages unpacked with `dpkg-deb -x`. They are joined in `--folder` into
one jsonl file of `--megabytes`, a document a file, and a BPE tokenizer is trained on a part of it. Then, in turn, each in a
process of its own: the fastest installed tokenizer encodes all texts by its own batch call, from memory; and `prepare`
makes token shards of the file. The ratio is that of neighboring runs' speeds. Memory is the peak of prepare's process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from shoal.config.data_options import Data
from shoal.data.prepare import prepare
from shoal.data.tokens.fastokens import fast_encoder
from shoal.data.tokens.tokenize import Tokenizer, load_tokenizer, train_bpe

SUFFIXES = (".html", ".htm", ".txt", ".md", ".rst", ".xml")
SMALLEST = 500  # bytes of a file
BATCH_BYTES = 8_000_000  # of the tokenizer alone; batches of 2 and 4 MB take as long
TRAINED_ON_BYTES = 30_000_000


def texts_under(folder: Path, total_bytes: int) -> Iterator[str]:
    """Yield the content of text files, evenly chosen over the folder, until `total_bytes` are reached."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file() and not p.is_symlink())
    sizes = {p: p.stat().st_size for p in files}
    share, taken, passed = total_bytes / sum(sizes.values()), 0, 0
    if share > 1:
        raise SystemExit(f"{folder} has {sum(sizes.values()) / 1e6:.0f} MB of text, too little; lower --megabytes")
    for path in files:
        passed += sizes[path]
        if sizes[path] >= SMALLEST and taken < share * passed:
            text = path.read_bytes().decode("utf-8", "replace").replace("\0", "")
            taken += len(text.encode())
            yield text


def make(source: Path, folder: Path, megabytes: int, vocab_size: int) -> tuple[Path, Path]:
    """Return the jsonl file and the tokenizer.json, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus, tokenizer = folder / f"text-{megabytes}.jsonl", folder / f"bpe-{megabytes}-{vocab_size}.json"
    if not corpus.exists():
        with corpus.open("w", encoding="utf-8") as file:
            for text in texts_under(source, megabytes * 1_000_000):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    if not tokenizer.exists():
        texts = texts_of(corpus)
        step = max(1, sum(map(len, texts)) // TRAINED_ON_BYTES)
        tokenizer.write_text(train_bpe(iter(texts[::step]), vocab_size).to_json())
    return corpus, tokenizer


def texts_of(corpus: Path) -> list[str]:
    with corpus.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def batches_of(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def seconds_alone(kind: str, tokenizer: Tokenizer, texts: list[str]) -> float:
    """Return how long the tokenizer takes for all texts, by its own batch call."""
    fast = None
    if kind == "fastokens":
        import fastokens

        fast = fastokens.Tokenizer.from_json_str(tokenizer.to_json())
    begun = time.perf_counter()
    for batch in batches_of(texts):
        if fast is not None:
            fast.encode_batch_flat(batch, split_special_tokens=True)
        else:
            tokenizer._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    return time.perf_counter() - begun


def work(kind: str, corpus: Path, tokenizer: Path, folder: Path) -> None:
    """Run one measurement in this process; print its seconds, bytes of text and tokens as JSON."""
    if kind != "prepare":
        texts = texts_of(corpus)
        seconds = seconds_alone(kind, load_tokenizer(str(tokenizer)), texts)
        print(json.dumps({"seconds": seconds, "bytes": sum(len(text.encode()) for text in texts)}))
        return
    shutil.rmtree(folder / "tokens", ignore_errors=True)
    data = Data(corpus="jsonl", paths=(str(corpus),), tokenizer=str(tokenizer), folder=str(folder / "tokens"))
    begun = time.perf_counter()
    prepared = prepare(data)
    seconds = time.perf_counter() - begun
    counts = prepared.counts.values()
    print(json.dumps({"seconds": seconds, "bytes": sum(c.text_bytes for c in counts), "data_id": prepared.data_id}))


def run(kind: str, corpus: Path, tokenizer: Path, folder: Path, library: str) -> tuple[dict[str, float], float]:
    """Run `work` in a new process; return what it printed, and the process's peak memory in MiB."""
    command = [sys.executable, __file__, "--work", kind, "--library", library, "--folder", str(folder)]
    command += [str(corpus), str(tokenizer)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{kind} failed")
    return json.loads(out), usage.ru_maxrss / 1024


def processor() -> str:
    lines = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
    named = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    return f"{named.get('Model name', '?')}, model {named.get('Model', '?')}, {os.cpu_count()} cores"


def measure(corpus: Path, tokenizer: Path, folder: Path, repeats: int, kind: str) -> None:
    """Print a table row for each pair of runs, and the medians."""
    if kind == "fastokens" and fast_encoder(load_tokenizer(str(tokenizer))) is None:
        raise SystemExit("fastokens is not installed or does not support this tokenizer; use --library tokenizers")
    print(f"{processor()}; {kind}; {corpus} of {corpus.stat().st_size / 1e6:.0f} MB\n")
    print("| tokenizer alone, MB/s | prepare, MB/s | ratio | peak memory, MiB |\n| --- | --- | --- | --- |")
    ratios, peaks = [], []
    for _ in range(repeats):
        alone, _ = run(kind, corpus, tokenizer, folder, kind)
        ours, peak = run("prepare", corpus, tokenizer, folder, kind)
        speeds = [found["bytes"] / found["seconds"] / 1e6 for found in (alone, ours)]
        ratios.append(speeds[1] / speeds[0])
        peaks.append(peak)
        print(f"| {speeds[0]:.2f} | {speeds[1]:.2f} | {ratios[-1]:.3f} | {peak:.0f} |", flush=True)
    print(f"\nmedian ratio {statistics.median(ratios):.3f}, peak {max(peaks):.0f} MiB, data_id {ours['data_id']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--folder", type=Path, default=Path("build/prepare"))
    parser.add_argument("--megabytes", type=int, default=250)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--library", choices=["fastokens", "tokenizers"], default="fastokens")
    parser.add_argument("--work", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.library == "tokenizers":
        sys.modules["fastokens"] = None  # type: ignore[assignment]  # as if it were not installed
    if args.work:
        corpus, tokenizer = args.source
        work(args.work, corpus, tokenizer, args.folder)
        return
    corpus, tokenizer = make(args.source[0], args.folder, args.megabytes, args.vocab_size)
    measure(corpus, tokenizer, args.folder, args.repeats, args.library)


if __name__ == "__main__":
    main()
