"""
Times the matrix products of a spec's step alone: `python -m scripts.peers.products SPEC ANSWER`.

For each linear layer: the forward product, the gradient of its input and the gradient of its weight, by the libraries that
shoal's layers use. All of them are the least time that a step's linear layers can take with these.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from scripts.peers.contract import Recorder, Spec, write_answer

from shoal.models.layers import linear


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


class Layer:
    """The three products of a linear layer, rows x ins to rows x outs."""

    def __init__(self, rows: int, ins: int, outs: int, dtype: torch.dtype, *, is_head: bool) -> None:
        shapes = (rows, ins), (outs, ins), (rows, outs)
        self.is_head = is_head  # the loss computes its products itself
        self.x, self.weight, self.grad = (torch.randn(shape).to(dtype) for shape in shapes)
        self.d_x, self.d_weight = torch.empty_like(self.x), torch.empty_like(self.weight)

    def multiply(self) -> None:
        """Compute the layer's output and both gradients."""
        linear(self.x, self.weight)
        if self.is_head:
            torch.mm(self.grad, self.weight, out=self.d_x)
        else:
            linear(self.grad, self.weight.T)
        torch.mm(self.grad.T, self.x, out=self.d_weight)


def main(spec: Spec, answer: Path) -> None:
    """Compute the products of all steps, and write their seconds and the operations of a step."""
    torch.set_num_threads(spec.threads)
    dtype, recorder = getattr(torch, spec.dtype), Recorder()
    rows, head = spec.tokens_per_step, (spec.dim, spec.vocab_size)
    counted = {Layer(rows, *widths, dtype, is_head=widths == head): times for widths, times in layers(spec).items()}
    recorder.start()
    for _ in range(spec.steps):
        for layer, times in counted.items():
            for _ in range(times):
                layer.multiply()
        recorder.tick()
    write_answer(answer, recorder, product_flops=flops(spec))


if __name__ == "__main__":
    main(Spec.read(Path(sys.argv[1])), Path(sys.argv[2]))
