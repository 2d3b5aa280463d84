"""
How well a model foretells a text: its loss in windows that slide over it.

The tokens are cut into windows of `context` tokens, each starting `stride` after the one before; a window foretells
the token after each of its own, and what an earlier window has foretold is not counted again. So every token but the
first is scored once, with at least context - stride tokens before it where the text has them. The last window is
moved back to end where the text ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from shoal.errors import DataError, ShoalError
from shoal.models.family import LanguageModel
from shoal.models.loss import IGNORED

DEFAULT_CONTEXT: Final = 2048  # at most: longer windows cost more for little
TOKENS_AT_A_TIME: Final = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) go in; those from `first` to `stop` (included) are scored."""

    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Score:
    """The loss over a text: `nats` over `tokens` scored tokens, in `windows`."""

    nats: float
    tokens: int
    windows: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return perplexity(self.nats_per_token)

    def bits_per_byte(self, text_bytes: int) -> float:
        return self.nats / math.log(2) / text_bytes


def perplexity(nats_per_token: float) -> float:
    """e to the nats per token: infinite where that is no float, and nan of nan."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def choose_windows(max_seq_len: int, context: int | None, stride: int | None) -> tuple[int, int]:
    """
    (context, stride): by default the model's context up to 2,048 tokens, and half of it.

    Raises `ShoalError` where they are out of range.
    """
    context = min(max_seq_len, DEFAULT_CONTEXT) if context is None else context
    if not 1 <= context <= max_seq_len:
        raise ShoalError(f"--context is {context}; the model takes 1 to {max_seq_len} tokens")
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride <= context:
        raise ShoalError(
            f"--stride is {stride}; it must be 1 to {context} (--context), or tokens between two windows are never scored"
        )
    return context, stride


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """All windows over `num_tokens` tokens; each token but the first is scored in one of them."""
    last = num_tokens - 1  # foretold by the one before it, and foretells nothing
    scored = 0
    for start in range(0, last, stride):
        stop = min(start + context, last)
        yield Window(max(0, stop - context), stop, scored + 1)
        scored = stop
        if stop == last:
            return


@torch.inference_mode()
def score(
    model: LanguageModel,
    ids: Sequence[int],
    *,
    context: int,
    stride: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """
    The loss of a model (in eval mode) over the tokens `ids`, in windows.

    progress(scored tokens, all of them) is called after each batch. Raises `DataError` where there is nothing to
    foretell, or a token that the model does not have.
    """
    vocab_size = model.shape.vocab_size
    if len(ids) < 2:
        raise DataError(f"{len(ids)} tokens: the first one is never scored, so there is nothing to foretell")
    if vocab_size is not None and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise DataError(f"the text has a token outside the model's 0..{vocab_size - 1}; its tokenizer is another's")
    device = next(model.parameters()).device
    tokens = torch.tensor(ids, device=device)
    plan = list(windows(len(ids), context, stride))
    at_a_time = max(1, TOKENS_AT_A_TIME[device.type] // context)
    # The first window scores all of itself, and the others a part: they go apart from it.
    turns = [plan[:1], *(plan[low : low + at_a_time] for low in range(1, len(plan), at_a_time))]
    nats = 0.0
    for turn in turns:
        nats += _loss(model, tokens, turn).item()
        progress(turn[-1].stop, len(ids) - 1)
    return Score(nats, len(ids) - 1, len(plan))


def _loss(model: LanguageModel, tokens_N: Tensor, turn: Sequence[Window]) -> Tensor:
    """The summed loss of some windows of one length."""
    inputs_BT = torch.stack([tokens_N[w.start : w.stop] for w in turn])
    labels_BT = torch.stack([tokens_N[w.start + 1 : w.stop + 1] for w in turn])
    firsts = [w.first - w.start - 1 for w in turn]
    for row, first in enumerate(firsts):
        labels_BT[row, :first] = IGNORED
    low = min(firsts)  # no logits for what no row scores
    hidden_BTD = model(inputs_BT)[:, low:]
    return model.loss(hidden_BTD, labels_BT[:, low:])
