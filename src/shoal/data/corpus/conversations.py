"""
Records with conversations: Alpaca, `messages` and ShareGPT. No torch.

Each becomes messages with the roles of chat templates (system, user, assistant, tool). Conversations that break a rule are
dropped or kept, as `data.broken_conversations` says, and counted by kind in both cases.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from shoal.config.data_options import Source
from shoal.data.corpus.documents import START, Conversation, Corpus, CorpusFile, Cursor, Document, Skipped
from shoal.data.corpus.records import TEXT_KEY, USUAL_KEYS, Shape, looks_like
from shoal.errors import DataError
from shoal.system.output import on_one_line

ANSWER = "assistant"  # the role of the model's own messages
FLAGS = ("train", "loss_weight", "loss_mask")
# The speakers of ShareGPT, by its field `from`. A function_call is an answer too.
SPEAKERS = {
    "human": "user", "user": "user", "gpt": ANSWER, "chatgpt": ANSWER, "bard": ANSWER, "bing": ANSWER, "assistant": ANSWER,
    "function_call": ANSWER, "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip

BEGINS_WITH_ANSWER = "begins with the answer"
DOES_NOT_ALTERNATE = "does not alternate between user and answer"
HAS_EMPTY_MESSAGE = "has an empty message"
IS_CUT = "ends without an answer"
REPEATS_ID = "repeats an id"

# The roles that may follow each role.
_NEXT = {
    "system": ("system", "user"), "user": (ANSWER,), ANSWER: ("user", "tool"), "tool": ("tool", ANSWER),
}  # fmt: skip

Message = dict[str, Any]


class _NoConversationError(Exception):
    """A record is not a conversation; the message is the reason."""

    def __init__(self, reason: str, fields: Mapping[str, int] | None = None) -> None:
        super().__init__(reason)
        self.fields = fields or {}


def conversation_shape(source: Source) -> Shape:
    """
    Return the shape of records with conversations in `source.format`.

    Its `document` raises DataError for a loss flag that is neither true nor false, because it cannot be followed.
    """
    key = USUAL_KEYS[source.format] if source.text_key == TEXT_KEY else source.text_key
    parse = _PARSERS[source.format]

    def document(record: Any, name: str, after: Cursor) -> Document | Skipped:
        try:
            found = _with_flaws(parse(_object(record), key))
            text = _canonical(found)
        except _NoConversationError as error:
            reason = f"{error}{looks_like(record, source.format, source.text_key)}"
            return Skipped(name, reason, after, error.fields)
        except DataError as error:
            raise DataError(f"{on_one_line(name)}: {error}") from None
        if found.flaws and source.broken_conversations == "drop":
            return Skipped(name, found.flaws[0], after)
        return Document(name, text, after, found)

    return Shape(key, document)  # all columns of a table: tools and flags are in others


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _NoConversationError("not an object with fields")
    return record


def _canonical(conversation: Conversation) -> str:
    """Return the JSON by which conversations are told apart: equal for equal messages, tools and flags."""
    said: dict[str, Any] = {"messages": conversation.messages}
    if conversation.tools:
        said["tools"] = conversation.tools
    if any(flag is not None for flag in conversation.learned):
        said["learned"] = conversation.learned
    text = json.dumps(said, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can encode half of a surrogate pair
        raise _NoConversationError("half a surrogate pair, not a character") from None
    return text


# --- formats ---------------------------------------------------------------------------------------------


def _alpaca(record: dict[str, Any], _key: str) -> Conversation:
    """Parse `instruction`, `input` and `output`. Chat templates read the joined `content`, the Alpaca prompt its two parts."""
    instruction, given, output = (record.get(name) for name in ("instruction", "input", "output"))
    if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(given, str | None):
        raise _NoConversationError("no text under 'instruction' and 'output'", _sizes(record, str))
    parts = [instruction, given] if given else [instruction]
    user = {"role": "user", "content": "\n".join(parts), "instruction": instruction, "input": given or ""}
    return Conversation((user, {"role": ANSWER, "content": output}), (None, None), record_id=_id_of(record))


def _messages(record: dict[str, Any], key: str) -> Conversation:
    """Parse a list of `role` and `content`. Other fields of a message are for the template."""
    entries = _list(record, key)
    messages, flags = [], []
    for entry in entries:
        role = entry.get("role")
        if not isinstance(role, str) or not role:
            raise _NoConversationError("a message has no role")
        rest = {name: value for name, value in entry.items() if name not in FLAGS and value is not None}
        messages.append({**rest, "role": role, "content": _text_of(entry.get("content"))})
        flags.append(_flag(entry))
    return Conversation(tuple(messages), tuple(flags), _tools(record), _id_of(record))


def _sharegpt(record: dict[str, Any], key: str) -> Conversation:
    """Parse a list of `from` and `value`, with calls of functions and their results."""
    messages: list[Message] = []
    system = record.get("system")
    if isinstance(system, str) and system:
        messages.append({"role": "system", "content": system})
    flags: list[bool | None] = [None for _ in messages]
    for entry in _list(record, key):
        messages.append(_said(entry))
        flags.append(_flag(entry))
    tools = tuple(t if not isinstance(t, dict) or "function" in t else _function(t) for t in _tools(record))
    return Conversation(tuple(messages), tuple(flags), tools, _id_of(record))


_PARSERS: dict[str, Callable[[dict[str, Any], str], Conversation]] = {
    "alpaca": _alpaca, "messages": _messages, "sharegpt": _sharegpt,
}  # fmt: skip


def _said(entry: dict[str, Any]) -> Message:
    """Return a message of ShareGPT with the role and fields that chat templates know."""
    speaker, value = entry.get("from"), entry.get("value")
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        raise _NoConversationError(f"unknown speaker {ascii(speaker)[:40]}; known: {', '.join(SPEAKERS)}")
    if speaker == "function_call":
        return {"role": ANSWER, "content": "", "tool_calls": _calls(value)}
    return {"role": SPEAKERS[speaker], "content": _text_of(value)}


def _calls(value: Any) -> list[Message]:
    """Return the calls of a function_call, whose value is JSON: an object of name and arguments, or a list of them."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise _NoConversationError("a function_call is not JSON with name and arguments")
    return [_function(call) for call in calls]


def _function(described: dict[str, Any]) -> Message:
    """Return a function's description or call in the form that chat templates expect."""
    return {"type": "function", "function": described}


def _list(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = record.get(key)
    if not isinstance(found, list):
        raise _NoConversationError(f"no list under {key!r} (data.text_key)", _sizes(record, list))
    if not found:
        raise _NoConversationError("no messages")
    if not all(isinstance(entry, dict) for entry in found):
        raise _NoConversationError("a message is not an object")
    return found


def _sizes(record: dict[str, Any], kind: type[str | list[Any]]) -> dict[str, int]:
    """Return the size of each field of a type, to suggest one as data.text_key."""
    return {name: len(said) for name, said in record.items() if isinstance(said, kind)}


def _text_of(content: Any) -> str:
    """Return a message's text, given as text or as a list of parts {type: text, text} (`value` in LLaMA-Factory's files)."""
    if content is None:  # a call of a function has no text
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _NoConversationError("a message's content is neither text nor a list of parts")
    return "".join(map(_part, content))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text":
        raise _NoConversationError(f"a message has a part of type {ascii(kind)[:40]}, not text")
    text = part.get("text", part.get("value"))
    if not isinstance(text, str):
        raise _NoConversationError("a part of type text has no text")
    return text


def _tools(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return the record's tools: a list, or a JSON text of one."""
    tools = record.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or []
    except (ValueError, RecursionError):
        raise _NoConversationError("tools are not JSON") from None
    if not isinstance(tools, list):
        raise _NoConversationError("tools are not a list")
    return tuple(tools)


def _id_of(record: dict[str, Any]) -> str | None:
    found = record.get("id")
    return ascii(found) if isinstance(found, str | int) and found != "" else None


def _flag(entry: dict[str, Any]) -> bool | None:
    """Return whether a message's flag asks to learn it. Raises DataError if a flag is neither 0 nor 1, or flags disagree."""
    given = {name: entry[name] for name in FLAGS if entry.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"a message has {name} {ascii(value)[:40]}; only 0 and 1 (false and true) are possible")
    if len({bool(value) for value in given.values()}) > 1:
        raise DataError(f"a message has {' and '.join(given)}, which disagree; remove one")
    return next((bool(value) for value in given.values()), None)


# --- rules -----------------------------------------------------------------------------------------------


def _with_flaws(conversation: Conversation) -> Conversation:
    return replace(conversation, flaws=tuple(_flaws(conversation.messages)))


def _flaws(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield each rule that the messages break, once."""
    roles = [{"developer": "system", "function": "tool", "ipython": "tool"}.get(m["role"], m["role"]) for m in messages]
    spoken = [role for role in roles if role != "system"]
    if spoken[:1] == [ANSWER]:
        yield BEGINS_WITH_ANSWER
    pairs = pairwise(roles)
    if any(after not in _NEXT[role] for role, after in pairs if role in _NEXT and (role, after) != ("system", ANSWER)):
        yield DOES_NOT_ALTERNATE
    if any(map(_is_empty, messages)):
        yield HAS_EMPTY_MESSAGE
    if roles[-1] != ANSWER:
        yield IS_CUT


def _is_empty(message: Mapping[str, Any]) -> bool:
    """Return whether a message says nothing. An empty system message may be meant: it replaces a template's default."""
    return message["role"] != "system" and not message["content"].strip() and not message.get("tool_calls")


@dataclass(frozen=True)
class UniqueIds:
    """A corpus that treats each conversation whose id was read before as broken; `keep` yields it with that flaw."""

    corpus: Corpus
    keep: bool

    @property
    def held_out_files(self) -> int:
        return self.corpus.held_out_files

    def listing(self) -> list[CorpusFile]:
        return self.corpus.listing()

    def digest(self, index: int) -> str:
        return self.corpus.digest(index)

    def skipped_files(self) -> Mapping[str, int]:
        return self.corpus.skipped_files()

    def read(self, start: Cursor = START) -> Iterator[Document | Skipped]:
        """Yield the items after `start`. Reads from the beginning, because an id may have been used before `start`."""
        seen: set[str] = set()
        for item in self.corpus.read():
            talk = item.conversation if isinstance(item, Document) else None
            again = talk is not None and talk.record_id in seen
            if talk is not None and talk.record_id is not None:
                seen.add(talk.record_id)
            if item.after > start:
                yield self._repeated(item) if again and isinstance(item, Document) else item

    def _repeated(self, item: Document) -> Document | Skipped:
        assert item.conversation is not None
        if not self.keep:
            return Skipped(item.name, REPEATS_ID, item.after)
        return replace(item, conversation=replace(item.conversation, flaws=(*item.conversation.flaws, REPEATS_ID)))
