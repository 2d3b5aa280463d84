"""
A model's loss on a text, in sliding windows.

Windows have `context` tokens and start `stride` tokens apart. A window predicts the next token after each of its tokens.
Tokens that an earlier window scored are not counted again. So every token but the first is scored once, given at least
context - stride earlier tokens if the text has that many. The last window is moved back to end with the text.
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

DEFAULT_CONTEXT: Final = 2048  # upper limit: longer windows cost more and gain little
TOKENS_AT_A_TIME: Final = {"cpu": 4096, "cuda": 16384}


@dataclass(frozen=True)
class Window:
    """A window: tokens [start, stop) are the input; tokens [first, stop] are scored."""

    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Score:
    """The loss on a text: a sum of `nats` over `tokens` scored tokens, in `windows` windows."""

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
    """Return exp(nats per token): Inf on overflow, NaN for NaN."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def choose_windows(max_seq_len: int, context: int | None, stride: int | None) -> tuple[int, int]:
    """
    Return (context, stride); the defaults are the model's context up to 2,048 tokens, and half of that.

    Raises `ShoalError` if one is out of range.
    """
    context = min(max_seq_len, DEFAULT_CONTEXT) if context is None else context
    if not 1 <= context <= max_seq_len:
        raise ShoalError(f"--context is {context}; it must be 1 to {max_seq_len}, the model's context in tokens")
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride <= context:
        raise ShoalError(
            f"--stride is {stride}; it must be 1 to {context} (--context), or tokens between windows are not scored"
        )
    return context, stride


def windows(num_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows over `num_tokens` tokens; exactly one of them scores each token but the first."""
    last = num_tokens - 1  # the last token is predicted, and predicts nothing
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
    Return the loss of a model (in eval mode) on the tokens `ids`, in windows.

    progress(scored tokens, all tokens) is called after each batch. Raises `DataError` for fewer than two tokens, or a token
    outside the model's vocabulary.
    """
    vocab_size = model.shape.vocab_size
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; at least 2 are needed, because the first is never scored")
    if vocab_size is not None and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise DataError(
            f"the text has a token outside the model's vocabulary of 0 to {vocab_size - 1}; the tokenizer is of another model"
        )
    device = next(model.parameters()).device
    tokens = torch.tensor(ids, device=device)
    plan = list(windows(len(ids), context, stride))
    at_a_time = max(1, TOKENS_AT_A_TIME[device.type] // context)
    # The first window scores all of its tokens, and the others only some of their tokens: it gets a separate batch.
    turns = [plan[:1], *(plan[low : low + at_a_time] for low in range(1, len(plan), at_a_time))]
    nats = 0.0
    for turn in turns:
        nats += _loss(model, tokens, turn).item()
        progress(turn[-1].stop, len(ids) - 1)
    return Score(nats, len(ids) - 1, len(plan))


def _loss(model: LanguageModel, tokens_N: Tensor, turn: Sequence[Window]) -> Tensor:
    """Return the summed loss of windows of the same length."""
    inputs_BT = torch.stack([tokens_N[w.start : w.stop] for w in turn])
    labels_BT = torch.stack([tokens_N[w.start + 1 : w.stop + 1] for w in turn])
    firsts = [w.first - w.start - 1 for w in turn]
    for row, first in enumerate(firsts):
        labels_BT[row, :first] = IGNORED
    low = min(firsts)  # skip logits that no row scores
    hidden_BTD = model(inputs_BT)[:, low:]
    return model.loss(hidden_BTD, labels_BT[:, low:])
