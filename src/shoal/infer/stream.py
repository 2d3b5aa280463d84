"""Generated text, streamed: a piece is returned as soon as no later token can change it."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.data.tokens.tokenize import Tokenizer
from shoal.infer.load import LoadedModel
from shoal.models.sampling import Sampling, check_text

UNFINISHED = "\ufffd"  # incomplete UTF-8 bytes decode to this


class TextStream:
    """
    The text that tokens add to a prompt, in pieces; together the pieces are the text of all tokens.

    One token may be part of a character, and some tokenizers drop the space before a first word. So a piece is the
    difference of two decodings that start a little earlier, and is held back until its last character is complete.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._before = 0  # start of both decodings
        self._given = len(self._ids)  # tokens whose text was returned

    def push(self, token: int) -> str:
        """Add a token; return the text that is now final, often empty."""
        self._ids.append(token)
        return self._take(final=False)

    def close(self) -> str:
        """Return the text that was held back as an incomplete character."""
        return self._take(final=True)

    def _take(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._before : self._given])
        text = self._tokenizer.decode(self._ids[self._before :])
        if text.endswith(UNFINISHED) and not final:
            return ""
        self._before, self._given = self._given, len(self._ids)
        return text[len(before) :]


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int]) -> str:
    """Return the text that `output` adds to `prompt`."""
    stream = TextStream(tokenizer, prompt)
    return "".join([*map(stream.push, output), stream.close()])


def complete(model: LoadedModel, prompt: str, max_new_tokens: int, sampling: Sampling) -> str:
    """
    Return the text that a model adds to `prompt`.

    Raises `GenerateError` if the prompt or an option is invalid, `ModelError` if the model has no tokenizer.
    """
    check_text(prompt, "the prompt")
    tokenizer = model.need_tokenizer()
    ids = tokenizer.encode_prompt(prompt)
    [output] = model.continue_tokens([ids], max_new_tokens=max_new_tokens, sampling=sampling)
    return continuation(tokenizer, ids, output)
