"""Sampling options, checked before a model is loaded. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import GenerateError

PROMPT_TOKENS, CHAT_TOKENS = 100, 512  # default maximum of new tokens: after a prompt, and per reply in a chat
FLAGS = {"max_new_tokens": "--tokens", "temperature": "--temperature", "top_k": "--top-k", "top_p": "--top-p"}


@dataclass(frozen=True)
class Sampling:
    """Options for choosing the next token; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0


def check_text(text: str, what: str) -> None:
    """Raise `GenerateError` for text decoded from bytes that are not UTF-8, which Python keeps as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise GenerateError(f"{what} is not UTF-8 text: {error.reason} at character {error.start}") from None


def check_prompts(prompts: Sequence[str], system: str | None) -> None:
    """Raise `GenerateError` if a prompt is empty, or if a prompt or the system prompt is not UTF-8 text."""
    if any(not prompt for prompt in prompts):
        raise GenerateError("an empty --prompt: give a text to continue")
    for prompt in prompts:
        check_text(prompt, "--prompt")
    check_text(system or "", "--system")


def check_options(sampling: Sampling, max_new_tokens: int) -> None:
    """Raise `GenerateError` for an option out of range."""
    if max_new_tokens < 0:
        raise GenerateError(f"{{option}} is {max_new_tokens}; it must be 0 or more", option="max_new_tokens")
    if not (sampling.temperature >= 0 and math.isfinite(sampling.temperature)):
        raise GenerateError(
            f"{{option}} is {sampling.temperature}; it must be 0 (greedy) or a positive number", option="temperature"
        )
    if sampling.top_k is not None and sampling.top_k < 1:
        raise GenerateError(f"{{option}} is {sampling.top_k}; it must be 1 or more, or unset", option="top_k")
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        raise GenerateError(
            f"{{option}} is {sampling.top_p}; it must be above 0 and at most 1, or unset", option="top_p"
        )
