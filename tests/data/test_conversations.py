"""Records of three formats become conversations; those that break a rule are counted by kind, and dropped or kept."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest

from shoal.config.data_options import Source
from shoal.data.corpus import conversations as rules
from shoal.data.corpus.conversations import conversation_shape
from shoal.data.corpus.documents import Conversation, Cursor, Document, Skipped
from shoal.data.corpus.sources import open_corpus
from shoal.errors import DataError
from tests.data.chats import write_lines

Format = Literal["alpaca", "messages", "sharegpt"]
USER: dict[str, Any] = {"role": "user", "content": "a"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "b"}


def parse(form: Format, record: Any, **options: Any) -> Document | Skipped:
    return conversation_shape(Source(format=form, **options)).document(record, "chats.jsonl:1", Cursor(0, 1, 9))


def talk(form: Format, record: Any, **options: Any) -> Conversation:
    found = parse(form, record, **options)
    assert isinstance(found, Document), found
    assert found.conversation is not None
    return found.conversation


def reason(form: Format, record: Any, **options: Any) -> str:
    found = parse(form, record, **options)
    assert isinstance(found, Skipped)
    return found.reason


def test_alpaca() -> None:
    with_input = talk("alpaca", {"instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert with_input.messages == (
        {"role": "user", "content": "Add.\n1 and 2", "instruction": "Add.", "input": "1 and 2"},
        {"role": "assistant", "content": "3"},
    )
    assert talk("alpaca", {"instruction": "Hi", "output": "Ho"}).messages[0]["content"] == "Hi"


def test_messages_keep_the_fields_that_templates_read() -> None:
    call = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"b": 1, "a": 2}}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    record = {
        "id": 7,
        "messages": [
            {"role": "user", "content": parts, "loss_weight": 0.0},
            {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm", "name": None},
            {"role": "tool", "content": "9", "tool_call_id": "1"},
            {"role": "assistant", "content": "done", "train": False},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
    }
    found = talk("messages", record)
    assert found.messages == (
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "9", "tool_call_id": "1"},
        {"role": "assistant", "content": "done"},
    )
    assert found.learned == (False, None, None, False)
    assert found.tools == ({"type": "function", "function": {"name": "f"}},)
    assert found.record_id == "7"
    called: Any = found.messages[1]["tool_calls"][0]
    assert list(called["function"]["arguments"]) == ["b", "a"], "in the order of the record"


def test_sharegpt_with_tools_as_in_glaive() -> None:
    record = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "2 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4"},
            {"from": "user", "value": "Thanks"},
            {"from": "bing", "value": "You are welcome"},
        ],
        "tools": '[{"name": "add", "parameters": {}}]',
    }
    found = talk("sharegpt", record)
    assert [m["role"] for m in found.messages] == [
        "system", "user", "assistant", "tool", "assistant", "user", "assistant",
    ]  # fmt: skip
    called = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    assert found.messages[2] == {"role": "assistant", "content": "", "tool_calls": [called]}
    assert found.tools == ({"type": "function", "function": {"name": "add", "parameters": {}}},)
    assert not found.flaws


@pytest.mark.parametrize("name", ["human", "user"])
@pytest.mark.parametrize("answerer", ["gpt", "chatgpt", "bard", "bing", "assistant"])
def test_names_of_speakers(name: str, answerer: str) -> None:
    found = talk("sharegpt", {"conversations": [{"from": name, "value": "a"}, {"from": answerer, "value": "b"}]})
    assert found.messages == (USER, ANSWER)


def test_the_field_may_have_another_name() -> None:
    assert talk("messages", {"chat": [USER, ANSWER]}, text_key="chat").messages == (USER, ANSWER)
    assert talk(
        "sharegpt", {"items": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, text_key="items"
    )


@pytest.mark.parametrize(
    ("form", "record", "says"),
    [
        ("messages", "text", "not an object with fields"),
        ("messages", {"conversations": [{"from": "human"}]}, "no list under 'messages'.*: set data.format to sharegpt$"),
        ("messages", {"messages": [{"from": "human"}]}, "set data.format to sharegpt and data.text_key to messages$"),
        ("messages", {"chat": [USER, ANSWER]}, "looks like messages: set data.text_key to chat$"),
        ("messages", {"instruction": "a", "output": "b"}, "no list under 'messages'.*: set data.format to alpaca$"),
        ("sharegpt", {"messages": [USER]}, "no list under 'conversations'.*: set data.format to messages$"),
        ("sharegpt", {"conversations": [USER]}, "speaker None.* data.format to messages and data.text_key to conversations$"),
        ("alpaca", {"instruction": "a"}, "no text under 'instruction' and 'output'"),
        ("alpaca", {"instruction": "a", "input": 5, "output": "b"}, "no text under"),
        ("messages", {"messages": []}, "no messages"),
        ("messages", {"messages": ["a"]}, "a message is not an object"),
        ("messages", {"messages": [{"content": "a"}]}, "a message has no role"),
        ("messages", {"messages": [{"role": "user", "content": 5}]}, "neither text nor a list of parts"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "part of type 'image_url'"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "type text has no text"),
        ("messages", {"messages": [USER, ANSWER], "tools": "["}, "tools are not JSON"),
        ("messages", {"messages": [USER, ANSWER], "tools": {"a": 1}}, "tools are not a list"),
        ("messages", {"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "half a surrogate pair"),
        ("sharegpt", {"conversations": [{"from": "Bob", "value": "a"}]}, "unknown speaker 'Bob'"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f()"}]}, "function_call is not JSON"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "[]"}]}, "function_call is not JSON"),
    ],
)  # fmt: skip
def test_no_conversation(form: Format, record: Any, says: str) -> None:
    assert re.search(says, reason(form, record))


def messages(roles: str, content: str = "x") -> list[dict[str, Any]]:
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[letter], "content": content} for letter in roles]


@pytest.mark.parametrize(
    ("roles", "flaws"),
    [
        ("ua", []), ("sua", []), ("uata", []), ("uattaua", []), ("ssua", []),
        ("aua", [rules.BEGINS_WITH_ANSWER]), ("saua", [rules.BEGINS_WITH_ANSWER]),
        ("uua", [rules.DOES_NOT_ALTERNATE]), ("uaa", [rules.DOES_NOT_ALTERNATE]), ("usa", [rules.DOES_NOT_ALTERNATE]),
        ("uatua", [rules.DOES_NOT_ALTERNATE]), ("uta", [rules.DOES_NOT_ALTERNATE]),
        ("uau", [rules.IS_CUT]), ("uat", [rules.IS_CUT]), ("s", [rules.IS_CUT]),
        ("aau", [rules.BEGINS_WITH_ANSWER, rules.DOES_NOT_ALTERNATE, rules.IS_CUT]),
    ],
)  # fmt: skip
def test_rules(roles: str, flaws: list[str]) -> None:
    record = {"messages": messages(roles)}
    kept = talk("messages", record, broken_conversations="keep")
    assert list(kept.flaws) == flaws
    if flaws:
        assert reason("messages", record) == flaws[0]


def test_empty_messages() -> None:
    assert reason("messages", {"messages": [USER, {"role": "assistant", "content": " \n"}]}) == rules.HAS_EMPTY_MESSAGE
    assert reason("alpaca", {"instruction": "a", "output": ""}) == rules.HAS_EMPTY_MESSAGE
    assert not talk("messages", {"messages": [{"role": "system", "content": ""}, USER, ANSWER]}).flaws
    calling = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert not talk("messages", {"messages": [USER, calling]}).flaws


@pytest.mark.parametrize(("value", "means"), [(True, True), (1, True), (1.0, True), (0, False), (False, False)])
@pytest.mark.parametrize("flag", ["train", "loss_weight", "loss_mask"])
def test_flags(flag: str, value: Any, means: bool) -> None:
    assert talk("messages", {"messages": [USER, {**ANSWER, flag: value}]}).learned == (None, means)
    spoken = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", flag: value}]
    assert talk("sharegpt", {"conversations": spoken}).learned == (None, means)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"loss_weight": 0.5}, "chats.jsonl:1: a message has loss_weight 0.5; only 0 and 1"),
        ({"train": "yes"}, "a message has train 'yes'; only 0 and 1"),
        ({"loss_mask": [1, 0]}, r"a message has loss_mask \[1, 0\]; only 0 and 1"),
        ({"train": True, "loss_mask": 0}, "a message has train and loss_mask, which disagree"),
    ],
)
def test_a_flag_that_cannot_be_followed_ends_preparation(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        parse("messages", {"messages": [USER, {**ANSWER, **flags}]})


def test_conversations_are_told_apart_by_what_is_said_and_learned() -> None:
    def text(record: Any) -> str:
        found = parse("messages", record)
        assert isinstance(found, Document)
        return found.text

    plain = text({"messages": [USER, ANSWER]})
    assert json.loads(plain) == {"messages": [USER, ANSWER]}
    assert plain == text({"id": 5, "messages": [dict(reversed(USER.items())), ANSWER], "more": 1})
    others = [
        {"messages": [USER, {**ANSWER, "train": 0}]},
        {"messages": [USER, ANSWER], "tools": [{"name": "f"}]},
        {"messages": [USER, {**ANSWER, "content": "c"}]},
    ]
    assert len({plain, *map(text, others)}) == 4


@pytest.mark.parametrize("keep", [False, True])
def test_an_id_is_repeated_wherever_reading_begins(tmp_path: Path, keep: bool) -> None:
    ids: list[Any] = ["a", "b", "a", None, "", None, 1, "1", 1]
    records = [{"id": i, "messages": [{**USER, "content": str(n)}, ANSWER]} for n, i in enumerate(ids)]
    path = write_lines(tmp_path / "chats.jsonl", records)
    source = Source(
        corpus="jsonl", paths=(str(path),), format="messages", broken_conversations="keep" if keep else "drop"
    )
    corpus = open_corpus(source)
    whole = list(corpus.read())
    assert list(corpus.read()) == whole, "each reading counts from the start"
    again = [n for n, item in enumerate(whole) if isinstance(item, Skipped) or (item.conversation or USER).flaws]  # type: ignore[union-attr]
    assert again == [2, 8]
    assert all(isinstance(whole[n], Document) is keep for n in again)
    for n in range(len(whole)):
        assert list(corpus.read(whole[n].after)) == whole[n + 1 :]
