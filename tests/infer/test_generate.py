"""Generation against transformers', with and without a cache, alone and in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.errors import GenerateError
from shoal.infer.generate import Sampling, choose, generate
from shoal.models.family import LanguageModel
from tests.models.hf_weights import random_pair
from tests.models.shapes import SHAPES

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
SAMPLED: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return random_pair(SHAPES["qwen3"])[0].eval()


@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_greedy_equals_transformers(name: str) -> None:
    ours, theirs = random_pair(SHAPES[name])
    expected = [
        theirs.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        for prompt in PROMPTS
    ]
    tokens = [ids[0, len(prompt) :].tolist() for ids, prompt in zip(expected, PROMPTS, strict=True)]
    assert generate(ours.eval(), PROMPTS, max_new_tokens=12) == tokens


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_cache_changes_nothing(model: LanguageModel, sampling: dict[str, Any]) -> None:
    cached = generate(model, PROMPTS, max_new_tokens=16, **sampling)
    assert cached == generate(model, PROMPTS, max_new_tokens=16, use_cache=False, **sampling)


def test_batch_equals_alone(model: LanguageModel) -> None:
    alone = [generate(model, [prompt], max_new_tokens=16)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=16) == alone
    first = generate(model, PROMPTS[:1], max_new_tokens=16, **SAMPLED)
    assert generate(model, PROMPTS, max_new_tokens=16, **SAMPLED)[:1] == first


def test_seed_and_row_matter(model: LanguageModel) -> None:
    twice = generate(model, [[5], [5]], max_new_tokens=16, **SAMPLED)
    assert twice[0] != twice[1]
    assert twice != generate(model, [[5], [5]], max_new_tokens=16, **(SAMPLED | {"seed": 4}))
    assert twice == generate(model, [[5], [5]], max_new_tokens=16, **SAMPLED)


def test_stops_at_end_of_text(model: LanguageModel) -> None:
    free = generate(model, PROMPTS, max_new_tokens=16)
    eot = free[1][4]
    heard: list[list[int]] = [[], [], []]
    stopped = generate(
        model, PROMPTS, max_new_tokens=16, eot_id=eot, on_token=lambda row, token: heard[row].append(token)
    )
    assert stopped == [row[: row.index(eot)] if eot in row else row for row in free]
    assert heard == stopped


def test_context_can_be_filled_to_the_end(model: LanguageModel) -> None:
    context = model.shape.max_seq_len
    [tokens] = generate(model, [[1] * (context - 2)], max_new_tokens=2)
    assert len(tokens) == 2


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([[]], {}, "the prompt is empty"),
        ([[1], []], {}, "prompt 2 is empty"),
        ([[1] * 200], {}, "200 tokens, and the model's context is 128"),
        ([[1] * 120], {}, "set max_new_tokens to at most 8"),
        ([[97]], {}, "outside 0..96"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"temperature": -0.5}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
    ],
)
def test_refusals(model: LanguageModel, prompts: list[list[int]], options: dict[str, Any], says: str) -> None:
    with pytest.raises(GenerateError, match=says):
        generate(model, prompts, **({"max_new_tokens": 10} | options))


def test_nothing_to_do(model: LanguageModel) -> None:
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, [[1]], max_new_tokens=0) == [[]]


def test_sampling_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().expand(4000, 4)
    shares = torch.bincount(choose(logits, Sampling(temperature=1.0), 0), minlength=4) / 4000
    torch.testing.assert_close(shares, probabilities, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, top_k=2), {0, 1}),
        (Sampling(1.0, top_p=0.79), {0, 1}),  # 0.5 alone does not reach it, 0.5 + 0.3 do
        (Sampling(1.0, top_p=0.81), {0, 1, 2}),
        (Sampling(1.0, top_p=0.01), {0}),
        (Sampling(1.0, top_k=3, top_p=0.9), {0, 1, 2}),
        (Sampling(1e-3), {0}),
    ],
)
def test_filters(sampling: Sampling, kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).double().log().expand(2000, 4)
    assert set(choose(logits, sampling, 0).tolist()) == kept
