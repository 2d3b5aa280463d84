"""
Conversations -> tokens, and the answers in them, which alone are learned. No torch.

A chat template formats the conversation. To find an answer, the conversation is rendered up to it with the generation prompt, and
up to its end without: the difference is the answer. Templates' own marks of answers are not used, since most have none. The
first rendering must be a prefix of the second, and the second of the whole conversation, token by token.
"""

from __future__ import annotations

import re
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
from shoal.data.encoded import Encoded, Refused
from shoal.data.shards import Spans, token_dtype
from shoal.data.tokens.chat_template import ChatTemplate
from shoal.data.tokens.named_templates import NAMED
from shoal.data.tokens.tokenize import Tokenizer, tokenizer_folder
from shoal.errors import DataError

GROUP_CHARACTERS = 1_000_000  # conversations whose renderings have this many characters are encoded at once
TODAY = datetime(2024, 7, 26)  # for templates that write the date: tokens must not depend on the day they are prepared

NOT_A_PREFIX = "the prompt is not a prefix of prompt and answer, token by token"
CHANGED_LATER = "an earlier answer is not learned, because the template writes it differently once others follow"
NO_PROMPT = "an answer is not learned, because the template cannot write the prompt before it"
NOTHING_LEARNED = "nothing to learn: no answer"
REJECTED = "the template rejects it"
_MARK = "Kestrel 7 marks"  # a text that no template writes itself


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
    """A conversation as text, with its answers, and what is wrong with it. `ends`: whether the last message is learned."""

    whole: str
    turns: tuple[_Turn, ...]
    flaws: tuple[str, ...]
    ends: bool

    @property
    def renderings(self) -> list[str]:
        return [self.whole, *(text for turn in self.turns for text in (turn.prompt, turn.upto))]

    @property
    def pieces(self) -> list[str]:
        """The whole, cut at the beginning and the end of each answer."""
        cuts = [0, *(len(text) for turn in self.turns for text in (turn.prompt, turn.upto)), len(self.whole)]
        return [self.whole[a:b] for a, b in pairwise(cuts)]


class ConversationEncoder:
    """Encodes conversations with a template. May be used by several threads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, *, answers_only: bool) -> None:
        self._tokenizer, self._answers_only = tokenizer, answers_only
        self._template = replace(template, special=_special(tokenizer) | dict(template.special))
        self._dtype = token_dtype(tokenizer.vocab_size)
        # The Alpaca prompt ends without white space, and many tokenizers merge its last character with the answer's first
        # word. Encoded apart, the prompt has the tokens that it has when the model continues it.
        self._apart = template.source == NAMED["alpaca"] and tokenizer.can_be_cut
        self._covered: set[str] = set()

    def encode(self, named: Sequence[tuple[str, Conversation]]) -> list[Encoded | Refused]:
        """
        Return each conversation's tokens, or why it cannot be learned.

        named: conversations with their names. Raises DataError, with the first name, if the template does not cover a role,
        calls of functions, or tools.
        """
        rendered = [self._render(name, conversation) for name, conversation in named]
        texts = [[] if isinstance(r, Refused) else r.pieces if self._apart else r.renderings for r in rendered]
        encoded = self._encode_texts([text for of_one in texts for text in of_one])
        found: list[Encoded | Refused] = []
        for r, of_one in zip(rendered, texts, strict=True):
            ids = [next(encoded) for _ in of_one]
            found.append(r if isinstance(r, Refused) else self._mark(r, _joined(ids) if self._apart else ids))
        return found

    def _encode_texts(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield the ids of each text, encoding a group at a time, since Rust's ids take far more memory than the text."""
        group, size = list[str](), 0
        for text in texts:
            group.append(text)
            size += len(text)
            if size >= GROUP_CHARACTERS:
                yield from self._tokenizer.encode_chat_batch(group)
                group, size = [], 0
        yield from self._tokenizer.encode_chat_batch(group)

    # --- rendering ---

    def _render(self, name: str, conversation: Conversation) -> _Rendered | Refused:
        self._check_covered(name, conversation)
        messages, tools = conversation.messages, conversation.tools
        try:
            whole = self._text(messages, tools)
        except DataError as error:
            return Refused(REJECTED, str(error))
        if not self._answers_only:
            return _Rendered(whole, (), (), True)
        turns, flaws, ends = list[_Turn](), list[str](), False
        for index in _learned(conversation):
            last = index == len(messages) - 1
            try:
                prompt = self._prompt(messages[: index + 1], tools)
                turns.append(_Turn(prompt, whole if last else self._text(messages[: index + 1], tools)))
                ends = last
            except DataError:
                flaws.append(NO_PROMPT)
        return _Rendered(whole, tuple(turns), tuple(flaws), ends)

    def _prompt(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any]) -> str:
        """Return the text before the last of `messages`; for an answer, with the start of it."""
        before, is_answer = messages[:-1], messages[-1]["role"] == ANSWER
        return self._text(before, tools, start_answer=is_answer) if before or is_answer else ""

    def _text(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, start_answer: bool = False
    ) -> str:
        text = self._write(messages, tools, start_answer)
        return text if start_answer else text.removesuffix(self._opening)

    def _write(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), start_answer: bool = False
    ) -> str:
        return self._template.render(messages, start_answer, tools or None, strftime_now=TODAY.strftime)

    @cached_property
    def _opening(self) -> str:
        """
        The start of an answer, if the template writes it after every conversation, asked or not (the first one of Llama 3 did).

        Raises DataError if it cannot be told apart.
        """
        try:
            question, whole, longer = (self._write([_USER, _ANSWER, _USER][:count]) for count in (1, 2, 3))
            if longer.startswith(whole) or question != self._write([_USER], start_answer=True):
                return ""
            before, _, _ = self._write([{"role": ANSWER, "content": _MARK}]).partition(_MARK)
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

    def _mark(self, rendered: _Rendered, encoded: Sequence[list[int]]) -> Encoded | Refused:
        """Find the answers in the tokens. encoded: the ids of `rendered.renderings`."""
        whole, text = encoded[0], rendered.whole
        end = [] if self._ends(whole) else [self._tokenizer.eot_id]
        ids = np.array([*whole, *end], self._dtype)
        if not self._answers_only:
            return Encoded(ids, self._bytes(text))
        spans, learned, flaws = list[tuple[int, int]](), 0, list(rendered.flaws)
        for turn, prompt, upto in zip(rendered.turns, encoded[1::2], encoded[2::2], strict=True):
            if not turn.upto.startswith(turn.prompt) or not _begins(upto, prompt):
                return Refused(NOT_A_PREFIX)
            if not _begins(whole, upto):
                flaws.append(CHANGED_LATER)
            elif len(upto) > len(prompt):
                spans.append((len(prompt), len(upto)))
                learned += self._bytes(turn.upto[len(turn.prompt) :])
        if not spans:
            return Refused(flaws[0] if flaws else NOTHING_LEARNED)
        if rendered.ends and spans[-1][1] == len(whole):
            spans[-1] = (spans[-1][0], len(ids))
        return Encoded(ids, self._bytes(text), _array(spans), learned, tuple(flaws))

    def _ends(self, ids: Sequence[int]) -> bool:
        """Return whether the template ended the conversation with a special token, apart from white space after it."""
        for index in reversed(ids):
            if index in self._special_ids:
                return True
            if self._tokenizer.decode([index]).strip():
                return False
        return False

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return self._tokenizer.special_ids | {self._tokenizer.eot_id}

    def _bytes(self, text: str) -> int:
        """Return the size of a text without special tokens, in UTF-8."""
        return len(self._special_texts.sub("", text).encode())

    @cached_property
    def _special_texts(self) -> re.Pattern[str]:
        texts = [self._tokenizer.decode([index]) for index in self._special_ids]
        return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True) if text))

    # --- what the template covers ---

    def _check_covered(self, name: str, conversation: Conversation) -> None:
        """Raise DataError if the template fails for a role, or leaves out its messages, whatever the conversation."""
        for feature in _features(conversation):
            if feature not in self._covered:
                if why := self._why_not_covered(feature):
                    raise DataError(
                        f"{self._template.name} does not cover {feature} ({why}), first used by {name}; set data.template "
                        "to a template that does, or remove such conversations"
                    )
                self._covered.add(feature)

    def _why_not_covered(self, feature: str) -> str | None:
        """Return why none of some short conversations shows `feature`; None if one does."""
        why = "it leaves them out"
        for messages, tools in _trials(feature):
            try:
                if _MARK in self._text(messages, tools):
                    return None
            except DataError as error:
                why = str(error).removeprefix(f"{self._template.name} ")
        return why


def _joined(pieces: Sequence[list[int]]) -> list[list[int]]:
    """Return the ids of the whole conversation, then of each beginning that ends with a piece."""
    whole = [index for piece in pieces for index in piece]
    ends = accumulate(len(piece) for piece in pieces[:-1])
    return [whole, *(whole[:end] for end in ends)]


def _special(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the tokens that begin and end documents, by the names that templates use."""
    bos = "" if tokenizer.bos_id is None else tokenizer.decode([tokenizer.bos_id])
    return {"bos_token": bos, "eos_token": tokenizer.decode([tokenizer.eot_id])}


def _learned(conversation: Conversation) -> Iterator[int]:
    """Yield the index of each message to learn: by its flag, or without one if it is an answer."""
    for index, (message, flag) in enumerate(zip(conversation.messages, conversation.learned, strict=True)):
        if flag if flag is not None else message["role"] == ANSWER:
            yield index


def _begins(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    return ids[: len(prefix)] == prefix


def _array(spans: Sequence[tuple[int, int]]) -> Spans:
    return np.array(spans, np.int64).reshape(-1, 2)


_TOOL_CALLS, _TOOLS = "calls of functions (tool_calls)", "descriptions of functions (tools)"


def _features(conversation: Conversation) -> Iterator[str]:
    """Yield what a template must cover to render the conversation."""
    for role in dict.fromkeys(message["role"] for message in conversation.messages):
        yield f"the role {role}"
    if any(message.get("tool_calls") for message in conversation.messages):
        yield _TOOL_CALLS
    if conversation.tools:
        yield _TOOLS


def _trials(feature: str) -> Iterator[_Trial]:
    """Yield short conversations, with tools, that show `feature` by `_MARK`; templates differ in where they allow it."""
    if feature == _TOOLS:
        described = _function(description=_MARK, parameters=_PARAMETERS)
        system: _Message = {"role": "system", "content": "s"}
        yield from (([_USER], [described]), ([system, _USER], [described]))
    elif feature == _TOOL_CALLS:
        calling = _calling(_MARK)
        yield from (([_USER, calling], []), ([_USER, calling, _of_tool("tool", "c"), _ANSWER], []))
    else:
        role = feature.removeprefix("the role ")
        said: _Message = {"role": role, "content": _MARK}
        for messages in ([said], [_USER, said], [said, _USER], [said, _USER, _ANSWER], [_USER, _ANSWER, said]):
            yield messages, []
        result = _of_tool(role, _MARK)
        yield from (([_USER, _calling("e"), result], []), ([_USER, _calling("e"), result, _ANSWER], []))


_Message = dict[str, Any]
_Trial = tuple[list[_Message], list[_Message]]
_USER: _Message = {"role": "user", "content": "a"}
_ANSWER: _Message = {"role": ANSWER, "content": "b"}
_PARAMETERS = {"type": "object", "properties": {"p": {"type": "string", "description": "d"}}, "required": ["p"]}


def _function(**said: Any) -> _Message:
    return {"type": "function", "id": "call00000", "function": {"name": "f", **said}}


def _calling(argument: str) -> _Message:
    return {"role": ANSWER, "content": "", "tool_calls": [_function(arguments={"p": argument})]}


def _of_tool(role: str, content: str) -> _Message:
    """Return the result of `_calling`; the fields are those that some template needs."""
    return {"role": role, "content": content, "tool_call_id": "call00000", "name": "f"}
