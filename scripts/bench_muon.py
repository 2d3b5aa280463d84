"""
Measure Muon's share of a training step: `python scripts/bench_muon.py [--device cpu] [--only 10M] [--repeats 5]`.

In one process, alternates updates of the blocks' matrices (by Muon, torch's Muon and fused AdamW) with forward and backward of
a fixed number of tokens, shown in the table. Times are medians. Muon's time does not depend on the tokens per step, so its
share of a step falls with more tokens. The last column is the number of tokens per step at which this share is 5%. On a CPU,
gpt2 takes minutes per repeat.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from shoal.bench.environment import describe
from shoal.config.options import Model
from shoal.config.presets import PRESETS
from shoal.mesh.mesh import Axis
from shoal.mesh.region import Region, Shard
from shoal.models.build import build_model, initialize
from shoal.models.loss import linear_cross_entropy_sum
from shoal.optim.muon import Muon

CASES = {  # shape, rows of one forward, tokens per row
    "10M": (Model(family="llama", dim=384, num_layers=6, num_heads=6, vocab_size=256, max_seq_len=256), 12, 256),
    "gpt2": (Model(**PRESETS["gpt2"]), 2, 512),
    "gpt2-medium": (Model(**PRESETS["gpt2-medium"]), 2, 512),
}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(name: str, device: torch.device, dtype: torch.dtype, repeats: int) -> str:
    """Return the table row of the case `name`."""
    shape, rows, seq_len = CASES[name]
    model = build_model(shape, compute_dtype=dtype)
    initialize(model, 0, device)
    assert shape.vocab_size is not None
    tokens = torch.randint(shape.vocab_size, (rows, seq_len), device=device)

    def forward_backward() -> None:
        linear_cross_entropy_sum(model(tokens), model.head_weight(), tokens, 1 / tokens.numel()).backward()

    forward_backward()
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    shards = [Shard(n, Region.whole(p.shape), p.detach(), p) for n, p in matrices.items()]
    for shard in shards:
        shard.tensor.grad = torch.randn_like(shard.tensor)
    tensors = [shard.tensor for shard in shards]
    work: list[Callable[[], object]] = [
        torch.optim.AdamW(tensors, lr=1e-6, fused=True).step,
        Muon(shards, Axis(), lr=1e-6, momentum=0.95, weight_decay=0.1).step,
        Muon(shards, Axis(), lr=1e-6, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16).step,
        torch.optim.Muon(tensors, lr=1e-6, adjust_lr_fn="match_rms_adamw").step,  # computes in bfloat16
        forward_backward,
    ]
    for each in work:
        each()
    taken = [[seconds(each, device) for each in work] for _ in range(repeats)]
    adamw, muon, half, torchs, passes = (statistics.median(column) for column in zip(*taken, strict=True))
    count = sum(t.numel() for t in tensors)
    # the n (tokens per step) at which share = muon / (muon + passes * n / tokens) = 5%
    enough = 19 * muon / passes * tokens.numel()
    return (
        f"| {name} | {len(tensors)}, {count / 1e6:.1f}M | {1e3 * adamw:.2f} | {1e3 * muon:.1f} | {1e3 * half:.1f} | "
        f"{1e3 * torchs:.1f} | {tokens.numel():,} in {1e3 * passes:.0f} | {100 * muon / (muon + passes):.0f}% | {enough:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="dtype of forward and backward"
    )
    parser.add_argument("--only", choices=list(CASES), action="append")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"```\n{describe()}\n```\n\nMilliseconds on {device}; forward and backward in {arguments.dtype}.\n")
    print(
        "| model | matrices | AdamW | Muon | Muon, bf16 | torch's Muon | tokens, forward and backward | Muon's share | tokens for 5% |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.only or CASES:
        print(measure(name, device, getattr(torch, arguments.dtype), arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
