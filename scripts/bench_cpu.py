"""
Write the CPU page of docs/benchmarks: `python scripts/bench_cpu.py [--repeats N] [--only WORD] > docs/benchmarks/NAME.md`.

Each row is one call of `shoal bench speed --json`; the two sides of a ratio alternate. Run it on an idle machine: it prints
the rates of matrix products before and after the benchmarks, and the two should agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from shoal.bench.environment import describe
from shoal.metrics.products import product_rates

RECIPES = {
    "10M": "model: {family: llama, dim: 384, num_layers: 6, num_heads: 6, max_seq_len: 256}\n"
    "data: {corpus: dummy, tokenizer: bytes, seq_len: 256}\ntrain: {steps: 10, global_batch: 12, micro_batch: 12, device: cpu}\n",
    "124M": "model: {preset: gpt2}\ndata: {corpus: dummy, tokenizer: bytes, seq_len: 512}\n"
    "train: {steps: 6, global_batch: 2, micro_batch: 2, device: cpu}\n",
    "10M-8k": "model: {family: llama, dim: 384, num_layers: 6, num_heads: 6, max_seq_len: 256}\n"
    "data: {corpus: dummy, tokenizer: bytes, seq_len: 256}\ntrain: {steps: 8, global_batch: 32, micro_batch: 4, device: cpu}\n",
}


def bench(recipe: str, *options: str) -> dict[str, Any]:
    """Return the report of one `shoal bench speed`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(RECIPES[recipe], encoding="utf-8")
        command = [sys.executable, "-m", "shoal", "bench", "speed", str(path), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise RuntimeError(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def matmul() -> str:
    rates = [product_rates([dtype], torch.device("cpu"), 2.0)[0] / 1e9 for dtype in (torch.float32, torch.bfloat16)]
    return (
        f"float32 {rates[0]:.0f}, bfloat16 {rates[1]:.0f} GFLOP/s (matrix products, {torch.get_num_threads()} threads)"
    )


def beside_trainer(repeats: int) -> None:
    print("\n## One process, compared with transformers.Trainer\n")
    print(
        "`shoal bench speed RECIPE --peers --processes 1 --train.dtype DTYPE`: same architecture, batch, sequence, threads.\n"
    )
    print(
        "| model | dtype | shoal, tokens/s | Trainer, tokens/s | ratio (median of pairs) | share of a matrix product's rate | share of the step: data | optimizer |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for recipe in ("10M", "124M"):
        for dtype in ("float32", "bfloat16"):
            report = bench(recipe, "--peers", "--processes", "1", "--train.dtype", dtype, "--repeats", str(repeats))
            ours, theirs = report["shoal"], report["transformers.Trainer"]
            print(
                f"| {ours['model']} | {dtype} | {ours['tokens_per_second']:,.0f} | {theirs['tokens_per_second']:,.0f} | "
                f"{ours['times_trainer']:.2f} | {100 * ours['of_product']:.0f}% | {100 * ours['split']['data']:.2f}% | {100 * ours['split']['optimizer']:.1f}% |",
                flush=True,
            )


def two_processes(repeats: int) -> None:
    print("\n## Two processes of one thread, compared with one process of two\n")
    print("`shoal bench speed RECIPE --processes N`, 8,192 tokens per step, alternating.\n")
    print(
        "| model | dtype | 1 x 2 threads, tokens/s | 2 x 1 thread, tokens/s | ratio (median of pairs) | exposed reduce |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for dtype in ("float32", "bfloat16"):
        pairs = []
        for _ in range(repeats):
            pair = [
                bench("10M-8k", "--processes", n, "--train.dtype", dtype, "--repeats", "1")["shoal"] for n in ("1", "2")
            ]
            pairs.append(pair)
        one, two = (statistics.median(p[i]["tokens_per_second"] for p in pairs) for i in (0, 1))
        ratio = statistics.median(p[1]["tokens_per_second"] / p[0]["tokens_per_second"] for p in pairs)
        reduce = statistics.median(p[1]["split"]["reduce"] for p in pairs)
        print(
            f"| {pairs[0][0]['model']} | {dtype} | {one:,.0f} | {two:,.0f} | {ratio:.2f} | {100 * reduce:.1f}% |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["trainer", "processes"])
    arguments = parser.parse_args()
    print(
        f"# CPU\n\n```\n{describe()}\n```\n\nCommand: `python scripts/bench_cpu.py --repeats {arguments.repeats}`\n\nBefore: {matmul()}"
    )
    if arguments.only != "processes":
        beside_trainer(arguments.repeats)
    if arguments.only != "trainer":
        two_processes(arguments.repeats)
    print(f"\nAfter: {matmul()}")


if __name__ == "__main__":
    main()
