"""Short conversations that show what a chat template covers: roles, calls of functions, descriptions of functions. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from shoal.data.corpus.documents import Conversation

Message = dict[str, Any]
Trial = tuple[list[Message], list[Message]]
"""Messages and tools."""

MARK: Final = "Kestrel 7 marks"  # a text that no template writes itself
USER: Final[Message] = {"role": "user", "content": "a"}
ANSWER: Final[Message] = {"role": "assistant", "content": "b"}
TOOL_CALLS: Final = "calls of functions (tool_calls)"
TOOLS: Final = "descriptions of functions (tools)"
REASONING: Final = "reasoning (reasoning_content)"

_PARAMETERS = {"type": "object", "properties": {"p": {"type": "string", "description": "d"}}, "required": ["p"]}


def features(conversation: Conversation) -> Iterator[str]:
    """Yield what a template must cover to render the conversation."""
    for role in dict.fromkeys(message["role"] for message in conversation.messages):
        yield f"the role {role}"
    if any(message.get("tool_calls") for message in conversation.messages):
        yield TOOL_CALLS
    if any(message.get("reasoning_content") for message in conversation.messages):
        yield REASONING
    if conversation.tools:
        yield TOOLS


def trials(feature: str) -> Iterator[Trial]:
    """Yield short conversations, with tools, that show `feature` by `MARK`; templates differ in where they allow it."""
    match feature:
        case "calls of functions (tool_calls)":
            calling = _calling(MARK)
            yield from (([USER, calling], []), ([USER, calling, _of_tool("tool", "c"), ANSWER], []))
        case "descriptions of functions (tools)":
            described, system = _function(description=MARK, parameters=_PARAMETERS), {"role": "system", "content": "s"}
            yield from (([USER], [described]), ([system, USER], [described]))
        case "reasoning (reasoning_content)":
            yield [USER, {**ANSWER, "reasoning_content": MARK}], []
        case _:
            yield from _trials_of_role(feature.removeprefix("the role "))


def _trials_of_role(role: str) -> Iterator[Trial]:
    said, result = {"role": role, "content": MARK}, _of_tool(role, MARK)
    if role == "assistant":
        yield [USER, said], []
        return
    for messages in ([said], [USER, said], [said, USER], [said, USER, ANSWER], [USER, ANSWER, said]):
        yield messages, []
    yield from (([USER, _calling("e"), result], []), ([USER, _calling("e"), result, ANSWER], []))


def _function(**said: Any) -> Message:
    return {"type": "function", "id": "call00000", "function": {"name": "f", **said}}


def _calling(argument: str) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [_function(arguments={"p": argument})]}


def _of_tool(role: str, content: str) -> Message:
    """Return the result of `_calling`; the fields are those that some template needs."""
    return {"role": role, "content": content, "tool_call_id": "call00000", "name": "f"}
