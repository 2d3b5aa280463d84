"""
Generation of tokens for a batch of prompts.

Prompts of different lengths are **padded on the left**, so that all rows end at the same position. Padding is a document
of its own: no token of a prompt sees it, and positions count from a prompt's first token.

**Sampling noise is a function** of (seed, the prompt's index, the token's index). It depends neither on the cache, nor on
the device, nor on the length of other prompts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from shoal.errors import GenerateError
from shoal.models.attention import decoding_kernels
from shoal.models.family import LanguageModel
from shoal.models.sampling import Sampling, check_options

PADDING, TEXT = 0, 1  # documents
NO_TOKEN = -1


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eot_id: int | Collection[int] | None = None,
    known_ids: int | None = None,
    use_cache: bool = True,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """
    Return the new tokens of each prompt, without the prompt and without the token of `eot_id` that ends the text.

    temperature: 0 is greedy. top_k, top_p: sample among the k likeliest tokens, and among the fewest whose probabilities
    sum to top_p; both after the temperature. known_ids: the number of ids that have text; larger ids only pad the
    embedding and are never chosen. None: all ids may be chosen. on_token(prompt's index, token): called as soon as a token
    is chosen. Put the model in eval mode to disable dropout.

    Raises `GenerateError` for an empty or too long prompt, an unknown token, an option out of range, or logits that are
    NaN or Inf.
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    check_options(sampling, max_new_tokens)
    _check_prompts(model, prompts, max_new_tokens)
    ends = frozenset(() if eot_id is None else (eot_id,) if isinstance(eot_id, int) else eot_id)
    if not prompts or not max_new_tokens:
        return [[] for _ in prompts]
    with decoding_kernels():
        return _write(
            _Rows(model, prompts, max_new_tokens, use_cache),
            len(prompts),
            max_new_tokens,
            sampling,
            ends,
            known_ids,
            on_token,
        )


def _write(
    rows: _Rows,
    count: int,
    max_new_tokens: int,
    sampling: Sampling,
    ends: Collection[int],
    known_ids: int | None,
    on_token: Callable[[int, int], None] | None,
) -> list[list[int]]:
    """Generate tokens for `count` checked prompts."""
    outputs: list[list[int]] = [[] for _ in range(count)]
    open_rows = set(range(count))
    for index in range(max_new_tokens):
        tokens_B = choose(rows.next_logits()[:, :known_ids], sampling, index)
        rows.append(tokens_B)
        for row, token in enumerate(tokens_B.tolist()):  # the only wait for the device per token
            if token == NO_TOKEN:
                raise GenerateError("the model's logits are NaN or Inf: its weights are damaged, or training diverged")
            if token in ends:
                open_rows.discard(row)
            if row in open_rows:
                outputs[row].append(token)
                if on_token is not None:
                    on_token(row, token)
        if not open_rows:
            break
    return outputs


class _Rows:
    """The model's next input for all prompts, padded on the left, and the KV cache, if one is used."""

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, use_cache: bool
    ) -> None:
        device = next(model.parameters()).device
        longest = max(map(len, prompts))
        padding_B1 = torch.tensor([[longest - len(p)] for p in prompts], device=device)
        places_T = torch.arange(longest, device=device)
        self._model = model
        # The model's next input, [B, T]: the prompts; then, with a cache, one token at a time.
        self._tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        self._positions = (places_T - padding_B1).clamp(min=0)
        padded = any(len(p) < longest for p in prompts)
        self._documents = torch.where(places_T < padding_B1, PADDING, TEXT) if padded else None
        # The last new token is never an input, so it needs no position in the cache.
        self._cache = model.new_cache(len(prompts), longest + max_new_tokens - 1) if use_cache else None

    def next_logits(self) -> Tensor:
        """Return the logits [B, V] of the next token, float32."""
        hidden_BTD = self._model(self._tokens, self._positions, self._documents, self._cache)
        return self._model.logits(hidden_BTD[:, -1]).float()

    def append(self, tokens_B: Tensor) -> None:
        def go_on(before_BT: Tensor, new_B1: Tensor) -> Tensor:
            return torch.cat((before_BT, new_B1), dim=1) if self._cache is None else new_B1

        tokens_B1 = tokens_B.unsqueeze(1)
        self._tokens = go_on(self._tokens, tokens_B1)
        self._positions = go_on(self._positions, self._positions[:, -1:] + 1)
        if self._documents is not None:
            self._documents = go_on(self._documents, torch.full_like(tokens_B1, TEXT))


def choose(logits_BV: Tensor, sampling: Sampling, index: int) -> Tensor:
    """
    Return one token per row [B]: the likeliest, or a sampled one; `NO_TOKEN` if the largest logit is NaN or Inf.
    """
    largest_B1 = logits_BV.amax(-1, keepdim=True)  # NaN if any logit is
    if sampling.temperature == 0:
        tokens_B = logits_BV.argmax(-1)
    else:
        tokens_B = _draw(
            logits_BV.double() - largest_B1, sampling, index
        )  # <= 0, so that a tiny temperature cannot overflow
    return tokens_B.where(largest_B1.squeeze(1).isfinite(), NO_TOKEN)


def _draw(logits_BV: Tensor, sampling: Sampling, index: int) -> Tensor:
    """
    Sample by inverse transform: the first token whose cumulative probability exceeds the uniform noise.

    `logits_BV` are shifted so that each row's largest is 0.
    """
    # float64: rounding of a sum over 150,000 tokens, whose order differs by device, must not change the token
    probabilities_BV = torch.softmax(logits_BV / sampling.temperature, -1)
    probabilities_BV = _keep_likeliest(probabilities_BV, sampling.top_k, sampling.top_p)
    cumulative_BV = probabilities_BV.cumsum(-1)
    uniform = [_uniform(sampling.seed, row, index) for row in range(len(logits_BV))]
    noise_B1 = torch.tensor(uniform, dtype=torch.float64, device=logits_BV.device).unsqueeze(1)
    return torch.searchsorted(cumulative_BV, noise_B1 * cumulative_BV[:, -1:], right=True).squeeze(1)


def _keep_likeliest(probabilities_BV: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """
    Keep the `top_k` likeliest tokens and, of these, the fewest that hold `top_p` of their probability; set all others to 0.

    Nucleus sampling: Holtzman et al. 2019 (arXiv:1904.09751), section 3.1. The likeliest token always remains.
    """
    if top_k is None and top_p is None:
        return probabilities_BV
    ordered, tokens = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = 0
    if top_p is not None:
        before = ordered.cumsum(-1) - ordered
        ordered[before >= top_p * ordered.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(ordered).scatter_(1, tokens, ordered)


def _uniform(seed: int, row: int, index: int) -> float:
    """Return a number in [0, 1) with 53 bits, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{row}/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _check_prompts(model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    for number, prompt in enumerate(prompts, 1):
        _check_prompt(model, f"prompt {number}" if len(prompts) > 1 else "the prompt", prompt, max_new_tokens)


def _check_prompt(model: LanguageModel, which: str, prompt: Sequence[int], max_new_tokens: int) -> None:
    context, vocab_size = model.shape.max_seq_len, model.shape.vocab_size
    assert vocab_size is not None
    if not prompt:
        raise GenerateError(f"{which} is empty; it needs at least one token")
    if len(prompt) > context:
        raise GenerateError(f"{which} has {len(prompt)} tokens, and the model's context is {context}; shorten it")
    if len(prompt) + max_new_tokens > context:
        raise GenerateError(
            f"{which} has {len(prompt)} tokens, and {max_new_tokens} more do not fit the model's context of {context}; "
            f"set {{option}} to at most {context - len(prompt)}",
            option="max_new_tokens",
        )
    if not all(0 <= token < vocab_size for token in prompt):
        raise GenerateError(f"{which} has a token outside 0..{vocab_size - 1}; use the model's own tokenizer")
