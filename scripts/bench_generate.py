"""
Compare greedy generation with a KV cache to `transformers.generate` on the same weights, in one process.

    python scripts/bench_generate.py
    python scripts/bench_generate.py --shapes llama-10m --batches 1 --dtypes float32 --pairs 9

Weights are random. Prompts have 64 tokens, or 33 to 64 with left padding in the table rows "unequal"; outputs have 128. The
two programs alternate on the same prompts; a ratio is the median over neighboring pairs, which cancels drift of the machine's
speed. On a shared machine, set OMP_NUM_THREADS=1 and --clock cpu to count only this process's CPU time. In float32 both must
generate the same tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from shoal.infer.load import load_folder
from shoal.models.generate import generate

SHAPES: dict[str, dict[str, Any]] = {
    "llama-10m": {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 6, "intermediate_size": 1024, "max_position_embeddings": 1024,
    },
    "SmolLM2-135M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "rope_theta": 100_000.0, "rms_norm_eps": 1e-5,
    },
    "gpt2-124M": {"model_type": "gpt2", "vocab_size": 50257, "bos_token_id": 0, "eos_token_id": 0},
}  # fmt: skip
PROMPT, NEW = 64, 128
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def make_folder(shape: str, parent: Path) -> Path:
    """Make a folder with random weights, spread widely enough that rounding changes no token."""
    torch.manual_seed(0)
    values = dict(SHAPES[shape])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), initializer_range=0.05, **values)
    folder = parent / shape
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def make_prompts(batch: int, unequal: bool, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [PROMPT - (row * 31) // max(batch - 1, 1) if unequal else PROMPT for row in range(batch)]
    return [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def theirs_of(model: Any, prompts: list[list[int]]) -> Callable[[], list[list[int]]]:
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    model.generation_config.eos_token_id = None

    def run() -> list[list[int]]:
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return [row[longest:].tolist() for row in out]

    return run


def timed(run: Callable[[], list[list[int]]], clock: Callable[[], float]) -> tuple[float, list[list[int]]]:
    begun = clock()
    tokens = run()
    return clock() - begun, tokens


def compare(
    folder: Path, dtype: str, batch: int, unequal: bool, pairs: int, clock: Callable[[], float]
) -> tuple[float, float, float, int]:
    """Return (shoal's tokens/s, transformers' tokens/s, median ratio, number of tokens that differ in the last pair)."""
    ours = load_folder(str(folder), device="cpu", dtype=dtype).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    prompts = make_prompts(batch, unequal, ours.shape.vocab_size or 0)
    runs = (lambda: generate(ours, prompts, max_new_tokens=NEW)), theirs_of(theirs, prompts)
    for run in runs:
        run()
    seconds: list[tuple[float, float]] = []
    different = 0
    for pair in range(pairs):
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        both = {who: timed(runs[who], clock) for who in order}
        seconds.append((both[0][0], both[1][0]))
        rows = zip(both[0][1], both[1][1], strict=True)
        different = sum(a != b for mine, other in rows for a, b in zip(mine, other, strict=True))
    ratio = statistics.median(theirs_s / ours_s for ours_s, theirs_s in seconds)
    rate = [batch * NEW / statistics.median(column) for column in zip(*seconds, strict=True)]
    return rate[0], rate[1], ratio, different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument(
        "--batches",
        nargs="+",
        default=["1", "16", "16-unequal"],
        help="prompts in a batch; N-unequal: N prompts of unequal length",
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: this process's CPU time")
    args = parser.parse_args()
    if args.clock == "cpu" and torch.get_num_threads() > 1:
        parser.error("--clock cpu adds up the time of all threads; set OMP_NUM_THREADS=1")
    transformers.logging.set_verbosity_error()
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads, "
        f"{args.clock} time\n"
    )
    print(
        "| model | dtype | batch | shoal, tokens/s | `transformers.generate`, tokens/s | ratio | tokens that differ |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    wrong = False
    with tempfile.TemporaryDirectory() as parent:
        for shape in args.shapes:
            folder = make_folder(shape, Path(parent))
            for dtype in args.dtypes:
                for name in args.batches:
                    batch, _, unequal = name.partition("-")
                    mine, other, ratio, differ = compare(
                        folder, dtype, int(batch), bool(unequal), args.pairs, CLOCKS[args.clock]
                    )
                    cells = (shape, dtype, name, f"{mine:,.0f}", f"{other:,.0f}", f"{ratio:.2f}", differ)
                    print("|", " | ".join(map(str, cells)), "|", flush=True)
                    wrong |= dtype == "float32" and differ > 0
    if wrong:
        print("error: tokens differ in float32", file=sys.stderr)
    sys.stdout.flush()
    os._exit(int(wrong))  # a library thread that outlives Python could hang the shutdown


if __name__ == "__main__":
    main()
