"""Generation against transformers, with and without a cache, alone and in a batch, and as a distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.errors import GenerateError
from shoal.models.family import LanguageModel
from shoal.models.generate import choose, generate
from shoal.models.sampling import Sampling

from ..models.hf_weights import random_pair
from ..models.shapes import LLAMA, SHAPES

PROMPTS = [[5, 17, 80, 3], [44], [9, 8, 7, 6, 5, 4, 3, 2, 1], [60, 61]]
SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "seed": 3}


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return random_pair(SHAPES[request.param])[0].eval()


@pytest.fixture(scope="module")
def llama() -> LanguageModel:
    return random_pair(LLAMA)[0].eval()


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_equals_transformers(name: str) -> None:
    ours, theirs = random_pair(SHAPES[name])
    for prompt in PROMPTS:
        expected = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert generate(ours, [prompt], max_new_tokens=20) == [expected[0, len(prompt) :].tolist()]


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_the_cache_changes_nothing(model: LanguageModel, options: dict[str, Any]) -> None:
    cached = generate(model, PROMPTS, max_new_tokens=16, **options)
    assert cached == generate(model, PROMPTS, max_new_tokens=16, use_cache=False, **options)


def test_a_batch_equals_each_prompt_alone(model: LanguageModel) -> None:
    together = generate(model, PROMPTS, max_new_tokens=16)
    assert together == [generate(model, [prompt], max_new_tokens=16)[0] for prompt in PROMPTS]


def test_the_seed_decides(llama: LanguageModel) -> None:
    first = generate(llama, PROMPTS, max_new_tokens=16, temperature=1.0, seed=1)
    torch.manual_seed(123)  # generation must not use this seed
    assert first == generate(llama, PROMPTS, max_new_tokens=16, temperature=1.0, seed=1)
    assert first != generate(llama, PROMPTS, max_new_tokens=16, temperature=1.0, seed=2)


def test_rows_of_the_same_prompt_are_different_samples(llama: LanguageModel) -> None:
    outputs = generate(llama, [PROMPTS[0]] * 4, max_new_tokens=16, temperature=1.0)
    assert len({tuple(output) for output in outputs}) == 4


def test_one_prompts_sample_does_not_depend_on_the_others(llama: LanguageModel) -> None:
    both = generate(llama, [[5, 6], [7, 8, 9, 10]], max_new_tokens=12, temperature=1.0)
    other = generate(llama, [[5, 6], [90]], max_new_tokens=12, temperature=1.0)
    assert both[0] == other[0]


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-3}, {"temperature": 1e-310}], ids=str
)
def test_the_narrowest_sampling_is_greedy(llama: LanguageModel, narrow: dict[str, Any]) -> None:
    sampled = generate(llama, PROMPTS, max_new_tokens=16, **({"temperature": 1.0} | narrow))
    assert sampled == generate(llama, PROMPTS, max_new_tokens=16)


PROBABILITIES = torch.tensor([0.02, 0.4, 0.08, 0.25, 0.0, 0.15, 0.1], dtype=torch.float64)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3, 5, 6]),
        (Sampling(temperature=1.0, top_k=3), [1, 3, 5]),
        (Sampling(temperature=1.0, top_k=100), [0, 1, 2, 3, 5, 6]),
        (Sampling(temperature=1.0, top_p=0.7), [1, 3, 5]),  # 0.4 + 0.25 is not yet 0.7
        (Sampling(temperature=1.0, top_p=0.64), [1, 3]),
        (Sampling(temperature=1.0, top_k=4, top_p=0.7), [1, 3]),  # top_p applies to the remaining 0.9
        (Sampling(temperature=0.5, top_p=0.9), [1, 3, 5]),  # of 0.16, 0.0625, 0.0225, ...
    ],
    ids=str,
)
def test_the_distribution_is_softmax_over_what_is_kept(sampling: Sampling, kept: list[int]) -> None:
    draws = 8_000
    logits = (PROBABILITIES.log() + 1.5).float().expand(draws, -1)
    counts = torch.bincount(choose(logits, sampling, index=2), minlength=7).double()
    wanted = torch.zeros(7, dtype=torch.float64)
    wanted[kept] = PROBABILITIES[kept] ** (1 / sampling.temperature)
    wanted *= draws / wanted.sum()
    assert not counts[wanted == 0].any()
    chi_square = ((counts - wanted).square() / wanted)[kept].sum().item()
    assert chi_square < 20.5  # 5 degrees of freedom reach it once in 1,000 seeds; this seed is fixed


def test_generation_stops_at_the_end_of_text(llama: LanguageModel) -> None:
    free = generate(llama, PROMPTS, max_new_tokens=16)
    end = free[0][3]
    heard: dict[int, list[int]] = {row: [] for row in range(4)}
    stopped = generate(llama, PROMPTS, max_new_tokens=16, eot_id=end, on_token=lambda row, t: heard[row].append(t))
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]
    assert stopped == list(heard.values())


def test_any_of_several_ends_stops(llama: LanguageModel) -> None:
    free = generate(llama, PROMPTS, max_new_tokens=16)
    ends = {free[0][3], free[1][1]}
    stopped = generate(llama, PROMPTS, max_new_tokens=16, eot_id=ends)
    for whole, row in zip(free, stopped, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), len(whole))
        assert row == whole[:first]


@pytest.mark.parametrize("options", [{}, {"temperature": 5.0}, {"temperature": 5.0, "top_p": 0.9}], ids=str)
def test_ids_that_only_pad_the_vocabulary_are_never_chosen(llama: LanguageModel, options: dict[str, Any]) -> None:
    free = generate(llama, PROMPTS, max_new_tokens=40, **options)
    assert max(map(max, free)) >= 50
    bounded = generate(llama, PROMPTS, max_new_tokens=40, known_ids=50, **options)
    assert max(map(max, bounded)) < 50
    assert generate(llama, PROMPTS, max_new_tokens=40, known_ids=1000, **options) == free


def test_nothing_asked_is_nothing(llama: LanguageModel) -> None:
    assert generate(llama, [], max_new_tokens=4) == []
    assert generate(llama, PROMPTS, max_new_tokens=0) == [[], [], [], []]


def test_the_whole_context_can_be_filled(llama: LanguageModel) -> None:
    assert len(generate(llama, [[1] * 126], max_new_tokens=2)[0]) == 2


@pytest.mark.parametrize(
    ("prompts", "options", "says"),
    [
        ([[1], []], {}, "prompt 2 is empty"),
        ([[]], {}, "the prompt is empty"),
        ([[1] * 129], {}, "shorten it"),
        ([[1] * 120], {"max_new_tokens": 9}, "at most 8"),
        ([[1, 97]], {}, "0..96"),
        ([[-1]], {}, "tokenizer"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": float("inf")}, "temperature is inf"),
        ([[1]], {"top_k": 0}, "top_k is 0"),
        ([[1]], {"top_p": 0.0}, "top_p is 0"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[1]], {"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(
    llama: LanguageModel, prompts: list[list[int]], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(GenerateError, match=says):
        generate(llama, prompts, **({"max_new_tokens": 4} | options))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_numbers_are_none_says_so(temperature: float) -> None:
    model = random_pair(LLAMA)[0].eval()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(GenerateError, match="NaN or Inf"):
        generate(model, PROMPTS, max_new_tokens=2, temperature=temperature)
