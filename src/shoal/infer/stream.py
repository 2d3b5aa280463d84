"""Text as its tokens come: a piece is given out when no later token can change it."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.data.tokens.tokenize import Tokenizer
from shoal.infer.load import LoadedModel
from shoal.models.sampling import Sampling, check_text

UNFINISHED = "\ufffd"  # what bytes decode to that are no whole character (yet)


class TextStream:
    """
    The text that tokens add to a prompt, a token at a time; the pieces together are the text of all of them.

    A token alone may be a part of a character, and some tokenizers drop the space before a first word. So a piece is
    the difference between two decodings that begin a little before it, and waits until its last character is whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._before = 0  # where both decodings begin
        self._given = len(self._ids)  # tokens whose text is out

    def push(self, token: int) -> str:
        """The text that is settled now; often empty."""
        self._ids.append(token)
        return self._take(final=False)

    def close(self) -> str:
        """What still waited for the rest of its character."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._before : self._given])
        text = self._tokenizer.decode(self._ids[self._before :])
        if text.endswith(UNFINISHED) and not final:
            return ""
        self._before, self._given = self._given, len(self._ids)
        return text[len(before) :]


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int]) -> str:
    """The text that `output` adds to `prompt`."""
    stream = TextStream(tokenizer, prompt)
    return "".join([*map(stream.push, output), stream.close()])


def complete(model: LoadedModel, prompt: str, max_new_tokens: int, sampling: Sampling) -> str:
    """Return the text that a model adds to `prompt`. Raises `GenerateError`, or `ModelError` without a tokenizer."""
    check_text(prompt, "the prompt")
    tokenizer = model.need_tokenizer()
    ids = tokenizer.encode_prompt(prompt)
    [output] = model.continue_tokens([ids], max_new_tokens=max_new_tokens, sampling=sampling)
    return continuation(tokenizer, ids, output)
