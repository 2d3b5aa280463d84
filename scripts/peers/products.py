"""
Times the matrix products of a spec's step alone: `python -m scripts.peers.products SPEC ANSWER`.

For each linear layer: the forward product, the gradient of its input and the gradient of its weight, each into memory that
exists already. The sum over all layers is the least time that a step's linear layers can take with this library.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from scripts.peers.contract import Spec

SECONDS: Final = 2.0  # for each product, after one that does not count
FEWEST: Final = 2


def layers(spec: Spec) -> dict[tuple[int, int], int]:
    """Return how often each linear layer occurs, by its widths (in, out)."""
    counted: dict[tuple[int, int], int] = {}
    d, f = spec.dim, spec.ffn_dim
    for widths, times in {(d, d): 4, (d, f): 2, (f, d): 1}.items():
        counted[widths] = counted.get(widths, 0) + times * spec.num_layers
    head = (d, spec.vocab_size)
    counted[head] = counted.get(head, 0) + 1
    return counted


def flops(spec: Spec) -> int:
    """Return the operations of a step's linear layers: 2 for each element of a weight and token, three times."""
    return sum(6 * spec.tokens_per_step * ins * outs * times for (ins, outs), times in layers(spec).items())


def layer_seconds(rows: int, ins: int, outs: int, dtype: torch.dtype) -> float:
    """Return the seconds of a layer's three products."""
    x, weight, grad = (torch.randn(shape).to(dtype) for shape in ((rows, ins), (outs, ins), (rows, outs)))
    out, d_x, d_weight = (torch.empty_like(each) for each in (grad, x, weight))
    return sum(
        median_seconds(product)
        for product in (
            lambda: torch.mm(x, weight.T, out=out),
            lambda: torch.mm(grad, weight, out=d_x),
            lambda: torch.mm(grad.T, x, out=d_weight),
        )
    )


def median_seconds(product: Callable[[], object]) -> float:
    """Return the median time of a product."""
    product()
    taken: list[float] = []
    while len(taken) < FEWEST or sum(taken) < SECONDS:
        begun = time.perf_counter()
        product()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def main(spec: Spec, answer: Path) -> None:
    """Write the seconds and operations of all products of a step."""
    torch.set_num_threads(spec.threads)
    dtype = getattr(torch, spec.dtype)
    seconds = sum(times * layer_seconds(spec.tokens_per_step, *widths, dtype) for widths, times in layers(spec).items())
    answer.write_text(json.dumps({"product_seconds": seconds, "product_flops": flops(spec)}), encoding="utf-8")


if __name__ == "__main__":
    main(Spec.read(Path(sys.argv[1])), Path(sys.argv[2]))
