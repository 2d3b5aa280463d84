"""Scoring in windows: each token once, after enough context, with the loss that transformers computes."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shoal.errors import DataError, ShoalError
from shoal.infer.load import load_folder
from shoal.infer.score import Score, choose_windows, perplexity, score, windows

from ..hub.small import load, save

TEXT = "Sliding windows: every token once, and each with something before it. Größe, naïve, 漢字.\n" * 5


def their_nats(model: Any, ids: list[int], context: int, stride: int) -> float:
    """Return the sum of transformers' losses in nats, one token at a time, each with the context of its window."""
    total, tokens = 0.0, torch.tensor([ids])
    starts = [max(0, min(k, len(ids) - 1 - context)) for k in range(0, len(ids), stride)]
    with torch.no_grad():
        logits = {s: model(tokens[:, s : s + context]).logits[0].double() for s in set(starts)}
    for place in range(1, len(ids)):
        start = next(s for s in starts if place - s <= context)  # the first window that includes it
        total += F.cross_entropy(logits[start][place - 1 - start], tokens[0, place]).item()
    return total


@pytest.mark.parametrize("num_tokens", [2, 3, 8, 9, 10, 17, 50])
@pytest.mark.parametrize("context", [1, 2, 8, 49, 64])
def test_each_token_but_the_first_is_scored_once_and_late_enough(num_tokens: int, context: int) -> None:
    for stride in range(1, context + 1):
        seen: Counter[int] = Counter()
        for window in windows(num_tokens, context, stride):
            assert window.start < window.first <= window.stop < num_tokens
            assert window.stop - window.start == min(context, num_tokens - 1)
            for token in range(window.first, window.stop + 1):
                seen[token] += 1
                assert token - window.start >= min(context - stride + 1, token)
        assert seen == Counter(range(1, num_tokens))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("context", "stride"), [(128, 64), (32, 32), (50, 7), (4, 1)])
def test_the_loss_is_that_of_transformers(kind: str, context: int, stride: int, tmp_path: Path) -> None:
    theirs = load(save(kind, tmp_path))
    model = load_folder(str(tmp_path), device="cpu", dtype="float32")
    ids = model.need_tokenizer().encode(TEXT)
    result = score(model.model, ids, context=context, stride=stride)
    assert result.tokens == len(ids) - 1
    expected = their_nats(theirs, ids, context, stride)
    assert result.nats == pytest.approx(expected, rel=1e-5)
    assert result.nats_per_token == pytest.approx(expected / (len(ids) - 1), abs=1e-4)


def test_progress_ends_at_the_end(tmp_path: Path) -> None:
    model = load_folder(str(save("llama", tmp_path)), device="cpu").model
    told: list[tuple[int, int]] = []
    score(model, list(range(200)), context=16, stride=8, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (199, 199)
    assert told == sorted(told)


def test_a_perplexity_is_a_number_or_says_that_it_is_none() -> None:
    assert perplexity(2.0) == Score(6.0, 3, 1).perplexity == math.exp(2.0)
    assert perplexity(709.0) == math.exp(709.0)
    assert perplexity(710.0) == Score(2130.0, 3, 1).perplexity == math.inf
    assert math.isnan(perplexity(math.nan))
    assert math.isnan(Score(math.nan, 3, 1).perplexity)


def test_what_is_chosen_where_nothing_is_said() -> None:
    assert choose_windows(128, None, None) == (128, 64)
    assert choose_windows(100_000, None, None) == (2048, 1024)
    assert choose_windows(100_000, 4096, None) == (4096, 2048)
    assert choose_windows(1, None, None) == (1, 1)


@pytest.mark.parametrize(
    ("context", "stride", "says"),
    [(0, None, "--context is 0"), (129, None, "1 to 128"), (8, 9, "--stride is 9"), (8, 0, "--stride is 0")],
)
def test_windows_out_of_range(context: int, stride: int | None, says: str) -> None:
    with pytest.raises(ShoalError, match=says):
        choose_windows(128, context, stride)


def test_what_cannot_be_scored(tmp_path: Path) -> None:
    model = load_folder(str(save("llama", tmp_path)), device="cpu").model
    for ids, says in (([], "0 tokens"), ([5], "1 tokens"), ([5, 272], "0 to 271")):
        with pytest.raises(DataError, match=says):
            score(model, ids, context=8, stride=8)
