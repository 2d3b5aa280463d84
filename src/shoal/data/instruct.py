"""
Conversations -> tokens, and the answers in them, which alone are learned. No torch.

A chat template formats the conversation. To find an answer, the conversation is rendered up to it with the generation prompt, and
up to its end without: the difference is the answer. Templates' own marks of answers are not used, since most have none. The
first rendering must be a prefix of the second, and the second of the whole conversation, token by token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config.data_options import Data
from shoal.data.corpus.conversations import ANSWER
from shoal.data.corpus.documents import Conversation
from shoal.data.stored.encoded import Encoded, Rejected
from shoal.data.stored.shards import token_dtype
from shoal.data.tokens import template_trials
from shoal.data.tokens.chat_template import ChatTemplate
from shoal.data.tokens.named_templates import NAMED
from shoal.data.tokens.prefixes import Beginnings, SpecialTexts, encode_in_groups
from shoal.data.tokens.tokenize import Tokenizer, tokenizer_folder
from shoal.errors import DataError

TODAY = datetime(2024, 7, 26)  # for templates that write the date: tokens must not depend on the day they are prepared
SHOWN_BEFORE, SHOWN_AFTER = 24, 12  # characters before and after the place where two texts differ, in a message

NOT_A_PREFIX = "the prompt is not a prefix of prompt and answer, token by token"
CHANGED_LATER = "an earlier answer is not learned, because the template writes it differently once others follow"
NO_PROMPT = "an answer is not learned, because the template cannot write the prompt before it"
NOTHING_LEARNED = "nothing to learn: no answer"
TEMPLATE_REJECTS = "the template rejects it"
NO_REASONING = "the template omits reasoning_content"

Messages = Sequence[Mapping[str, Any]]


def open_template(data: Data) -> ChatTemplate:
    """
    Return the chat template that `data.template` names.

    Raises DataError if its file cannot be read or is not valid Jinja, or if the tokenizer has no template.
    """
    if data.template in NAMED:
        return _named(data.template)
    if data.template != "auto":
        return ChatTemplate.read(Path(data.template).expanduser())
    folder = tokenizer_folder(data.tokenizer, data.kept)
    found = ChatTemplate.of(folder) if folder is not None else None
    if found is not None:
        return found
    if data.format == "alpaca":
        return _named("alpaca")
    raise DataError(
        f"data.tokenizer {data.tokenizer} has no chat template, which data.format {data.format} needs; set data.template to "
        f"{', '.join(NAMED)} or a .jinja file, or data.tokenizer to a model's folder with a template"
    )


def _named(name: str) -> ChatTemplate:
    return ChatTemplate(NAMED[name], {}, f"data.template {name}")


@dataclass(frozen=True)
class _Turn:
    """An answer to learn: the text up to it, and the text up to its end."""

    prompt: str
    upto: str


@dataclass(frozen=True)
class _Rendered:
    """
    A conversation as text, the answers to learn, and what is wrong with it.

    ends: whether the last message is learned, so that an end token after it is learned too.
    """

    whole: str
    turns: tuple[_Turn, ...] = ()
    flaws: tuple[str, ...] = ()
    ends: bool = False

    @property
    def cuts(self) -> list[str]:
        """The text up to each answer and up to its end, in order; each is a beginning of the next, and of the whole."""
        return [text for turn in self.turns for text in (turn.prompt, turn.upto)]


class ConversationEncoder:
    """Encodes conversations with a template. May be used by several threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, answers_only: bool) -> None:
        self._tokenizer, self._answers_only = tokenizer, answers_only
        self._template = replace(template, special=special_texts(tokenizer) | dict(template.special))
        self._special = SpecialTexts(tokenizer)
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._why_not: dict[str, str | None] = {}
        # The Alpaca prompt ends without white space, and many tokenizers merge its last character with the answer's first
        # word. Encoded apart, the prompt has the tokens that it has when the model continues it.
        self._apart = template.source == NAMED["alpaca"] and tokenizer.can_be_cut

    def encode(self, named: Sequence[tuple[str, Conversation]]) -> list[Encoded | Rejected]:
        """
        Return each conversation's tokens, or why it cannot be learned.

        named: conversations with their names. Raises DataError, with the first name, if the template does not cover a role,
        calls of functions, or tools.
        """
        rendered = [self._render(name, conversation) for name, conversation in named]
        work = [r if isinstance(r, Rejected) else (r, self._parts(r)) for r in rendered]
        texts = [text for w in work if not isinstance(w, Rejected) for text in w[1].texts]
        encoded = encode_in_groups(self._tokenizer, texts)
        return [w if isinstance(w, Rejected) else self._mark(*w, [next(encoded) for _ in w[1].texts]) for w in work]

    def end_ids(self) -> list[int]:
        """Return the tokens that end an answer: the tokenizer's end, and the last special token that the template writes."""
        try:
            whole = self._tokenizer.encode_chat(self._text([template_trials.USER, template_trials.ANSWER]))
        except DataError:
            whole = []
        last = next((index for index in reversed(whole) if index in self._special.ids), self._tokenizer.eot_id)
        return sorted({self._tokenizer.eot_id, last} if self._has_end(whole) else {self._tokenizer.eot_id})

    def _parts(self, rendered: _Rendered) -> Beginnings | _Pieces:
        if self._apart:
            return _Pieces(rendered.whole, rendered.cuts)
        return Beginnings(self._special, rendered.whole, rendered.cuts)

    # --- rendering ---

    def _render(self, name: str, conversation: Conversation) -> _Rendered | Rejected:
        flaws = self._check_covered(name, conversation)
        try:
            whole = self._text(conversation.messages, conversation.tools)
        except DataError as error:
            return Rejected(TEMPLATE_REJECTS, str(error))
        if not self._answers_only:
            return _Rendered(whole, flaws=tuple(flaws))
        turns: list[_Turn] = []
        learned = list(_learned(conversation))
        for index in learned:
            turn = self._turn(whole, conversation, index)
            if isinstance(turn, Rejected):
                return turn
            if isinstance(turn, str):
                flaws.append(turn)
            else:
                turns.append(turn)
        if not turns:
            return Rejected(flaws[0] if flaws else NOTHING_LEARNED)
        ends = learned[-1] == len(conversation.messages) - 1 and turns[-1].upto == whole
        return _Rendered(whole, tuple(turns), tuple(flaws), ends)

    def _turn(self, whole: str, conversation: Conversation, index: int) -> _Turn | str | Rejected:
        """Return the message to learn as a turn, or why it cannot be learned, or why the whole conversation cannot."""
        messages, tools = conversation.messages[: index + 1], conversation.tools
        try:
            prompt = self._prompt(messages, tools)
            upto = whole if len(messages) == len(conversation.messages) else self._text(messages, tools)
        except DataError:
            return NO_PROMPT
        if not upto.startswith(prompt):
            return Rejected(NOT_A_PREFIX, _difference(prompt, upto))
        return _Turn(prompt, upto) if whole.startswith(upto) else CHANGED_LATER

    def _prompt(self, messages: Messages, tools: Sequence[Any]) -> str:
        """Return the text before the last of `messages`; for an answer, with the start of it."""
        before, is_answer = messages[:-1], messages[-1]["role"] == ANSWER
        return self._text(before, tools, start_answer=is_answer) if before or is_answer else ""

    def _text(self, messages: Messages, tools: Sequence[Any] = (), *, start_answer: bool = False) -> str:
        text = self._write(messages, tools, start_answer)
        return text if start_answer else text.removesuffix(self._opening)

    def _write(self, messages: Messages, tools: Sequence[Any] = (), start_answer: bool = False) -> str:
        return self._template.render(messages, start_answer, tools or None, strftime_now=TODAY.strftime)

    @cached_property
    def _opening(self) -> str:
        """
        The start of an answer, if the template writes it after every conversation, asked or not (the first one of Llama 3 did).

        Raises DataError if it cannot be told apart.
        """
        user, answer = template_trials.USER, template_trials.ANSWER
        try:
            question, whole, longer = (self._write([user, answer, user][:count]) for count in (1, 2, 3))
            if longer.startswith(whole) or question != self._write([user], start_answer=True):
                return ""
            before, _, _ = self._write([{**answer, "content": template_trials.MARK}]).partition(template_trials.MARK)
        except DataError:  # it rejects such conversations
            return ""
        opening = before.removeprefix(self._template.special.get("bos_token", ""))
        if opening and whole.endswith(opening) and longer.startswith(whole.removesuffix(opening)):
            return opening
        raise DataError(
            f"{self._template.name} writes more after the last answer than after an earlier one; correct it (it should ask for "
            "add_generation_prompt), or set data.template to another"
        )

    # --- answers ---

    def _mark(
        self, rendered: _Rendered, parts: Beginnings | _Pieces, encoded: Sequence[list[int]]
    ) -> Encoded | Rejected:
        """Find the answers in the tokens. encoded: the ids of `parts.texts`."""
        whole = _joined(encoded) if isinstance(parts, _Pieces) else encoded[0]
        ids = np.array([*whole, *([] if self._has_end(whole) else [self._tokenizer.eot_id])], self._dtype)
        if not self._answers_only:
            return Encoded(ids, self._bytes(rendered.whole), flaws=rendered.flaws)
        spans, learned, flaws = list[tuple[int, int]](), 0, list(rendered.flaws)
        ends = parts.ends(encoded)
        for turn, first, stop in zip(rendered.turns, ends[::2], ends[1::2], strict=True):
            if stop is None:
                flaws.append(CHANGED_LATER)
            elif first is None:
                return Rejected(NOT_A_PREFIX, "the prompt ends inside a token")
            elif stop > first:
                spans.append((first, stop))
                learned += self._bytes(turn.upto[len(turn.prompt) :])
        if not spans:
            return Rejected(flaws[0] if flaws else NOTHING_LEARNED)
        if rendered.ends and spans[-1][1] == len(whole):
            spans[-1] = (spans[-1][0], len(ids))
        return Encoded(ids, self._bytes(rendered.whole), np.array(spans, np.int64), learned, tuple(flaws))

    def _has_end(self, ids: Sequence[int]) -> bool:
        """Return whether the template ended the conversation with a special token, apart from white space after it."""
        for index in reversed(ids):
            if index in self._special.ids:
                return True
            if self._tokenizer.decode([index]).strip():
                return False
        return False

    def _bytes(self, text: str) -> int:
        """Return the size of a text without special tokens, in UTF-8."""
        return len(self._special.without(text).encode())

    # --- what the template covers ---

    def _check_covered(self, name: str, conversation: Conversation) -> list[str]:
        """
        Return what the template omits without harm to the rest of the conversation.

        Raises DataError if the template fails for a role, or omits its messages, whatever the conversation.
        """
        flaws = []
        for feature in template_trials.features(conversation):
            if feature not in self._why_not:
                self._why_not[feature] = self._why_not_covered(feature)
            why = self._why_not[feature]
            if why is not None and feature == template_trials.REASONING:
                flaws.append(NO_REASONING)
            elif why is not None:
                raise DataError(
                    f"{self._template.name} does not cover {feature} ({why}), first used by {name}; set data.template to one "
                    "that does, or remove such conversations"
                )
        return flaws

    def _why_not_covered(self, feature: str) -> str | None:
        """Return why none of some short conversations shows `feature`; None if one does."""
        why = "it omits them"
        for messages, tools in template_trials.trials(feature):
            try:
                if template_trials.MARK in self._write(messages, tools):
                    return None
            except DataError as error:
                why = str(error).removeprefix(f"{self._template.name} ")
        return why


@dataclass(frozen=True)
class _Pieces:
    """A text to be encoded in pieces, cut at its beginnings, so that no token crosses a cut."""

    whole: str
    cuts: Sequence[str]

    @property
    def texts(self) -> list[str]:
        lengths = [0, *map(len, self.cuts), len(self.whole)]
        return [self.whole[a:b] for a, b in pairwise(lengths)]

    def ends(self, encoded: Sequence[list[int]]) -> list[int | None]:
        """Return how many tokens each beginning has. encoded: the ids of `texts`."""
        return list(accumulate(len(ids) for ids in encoded[:-1]))


def _difference(prompt: str, upto: str) -> str:
    """Return where a prompt differs from the beginning of prompt and answer."""
    at = len(os.path.commonprefix([prompt, upto]))  # noqa: RUF071 - of characters, as meant
    asked, given = (text[max(0, at - SHOWN_BEFORE) : at + SHOWN_AFTER] for text in (prompt, upto))
    return f"with add_generation_prompt the template writes {asked!r}, for the same answer {given!r}"


def _joined(pieces: Sequence[list[int]]) -> list[int]:
    return [index for piece in pieces for index in piece]


def special_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the tokens that begin and end documents, by the names that templates use."""
    bos = "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id])
    return {"bos_token": bos, "eos_token": tokenizer.decode([tokenizer.eot_id])}


def _learned(conversation: Conversation) -> Iterator[int]:
    """Yield the index of each message to learn: by its flag, or without one if it is an answer."""
    for index, (message, flag) in enumerate(zip(conversation.messages, conversation.learned, strict=True)):
        if flag if flag is not None else message["role"] == ANSWER:
            yield index
