"""Conversations as tokens and learned spans, against transformers and against the rule in its plainest form."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from shoal.data import instruct
from shoal.data.corpus import conversations as rules
from shoal.data.instruct import ConversationEncoder, open_template
from shoal.data.prepare import prepare
from shoal.data.stored.encoded import Encoded
from shoal.data.tokens.tokenize import load_tokenizer
from shoal.errors import DataError
from tests.data.chats import (
    ALWAYS_OPEN,
    CHATML,
    STRICT,
    THINKING,
    alpaca_records,
    chat_data,
    chat_folder,
    conversations,
    documents,
    learned_texts,
)  # fmt: skip

USER, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    "that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def spans_of(mask: Any) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff([0, *mask, 0])).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_ids_and_spans_are_those_of_transformers(tmp_path: Path) -> None:
    """With a template that marks its answers, transformers finds them by the marks, shoal by the prefixes."""
    folder = chat_folder(tmp_path / "tokenizer", CHATML)
    chats = conversations(120, turns=4)
    prepared = prepare(chat_data(tmp_path, [{"messages": chat} for chat in chats], tokenizer=str(folder)))
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    expected = {}
    for chat in chats:
        found = theirs.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        expected[tuple(found["input_ids"])] = spans_of(found["assistant_masks"])
    assert documents(prepared) == expected
    assert len(expected) == 120
    assert not prepared.notes
    counts = prepared.counts
    assert len(counts["train"].shards) > 1
    assert sum(c.learned_tokens for c in counts.values()) == sum(b - a for s in expected.values() for a, b in s)
    answers = [m["content"] for chat in chats for m in chat if m["role"] == "assistant"]
    assert sum(c.learned_bytes for c in counts.values()) == sum(len(f"{a}\n".encode()) for a in answers)


def test_tools_are_for_the_template(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "tokenizer", CHATML)
    call = {"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": [2]}}}
    chats = [
        [{**USER, "content": f"{n}?"}, {**ANSWER, "tool_calls": [call]}, {"role": "tool", "content": "5"}, ANSWER]
        for n in range(8)
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "adds <numbers>"}}]
    records = [{"messages": chat, "tools": tools} for chat in chats]
    prepared = prepare(chat_data(tmp_path, records, tokenizer=str(folder)))
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    expected = {}
    for chat in chats:
        found = theirs.apply_chat_template(chat, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        expected[tuple(found["input_ids"])] = spans_of(found["assistant_masks"])
    assert documents(prepared) == expected


@pytest.mark.parametrize("template", [CHATML, STRICT, ALWAYS_OPEN, THINKING])
@pytest.mark.parametrize("kind", ["folder", "bytes"])
def test_spans_by_the_rule_itself(tmp_path: Path, template: str, kind: str) -> None:
    """Encoding only the last part of each beginning gives what encoding all of it gives."""
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    tokenizer = "bytes" if kind == "bytes" else str(chat_folder(tmp_path / "tokenizer"))
    data = chat_data(tmp_path, [], tokenizer=tokenizer, template=str(tmp_path / "chat.jinja"))
    made = load_tokenizer(tokenizer)
    encoder = ConversationEncoder(made, open_template(data), answers_only=True)
    for chat in conversations(30, turns=3, seed=3):
        chat = [message for message in chat if message["role"] != "system"]
        [found] = encoder.encode([("x", conversation(chat))])
        assert isinstance(found, Encoded)
        whole = made.encode_chat(encoder._text(chat))
        expected = []
        for index in range(1, len(chat), 2):
            prompt = made.encode_chat(encoder._text(chat[:index], start_answer=True))
            upto = made.encode_chat(encoder._text(chat[: index + 1]))
            if whole[: len(upto)] == upto and upto[: len(prompt)] == prompt:
                expected.append([len(prompt), len(upto)])
        ended = whole[-1] == made.eot_id or (kind == "folder" and template != STRICT)
        if not ended:  # without chat tokens, the end of text ends the last answer
            whole.append(made.eot_id)
            expected[-1][1] += 1
        assert found.ids.tolist() == whole
        assert found.answers is not None
        assert found.answers.tolist() == expected
        assert len(expected) == (1 if template == THINKING else len(chat) // 2)
        assert list(found.flaws) == [instruct.CHANGED_LATER] * (len(chat) // 2 - len(expected))


def conversation(messages: list[dict[str, Any]]) -> Any:
    from shoal.data.corpus.documents import Conversation

    return Conversation(tuple(messages), tuple(None for _ in messages))


@pytest.mark.parametrize("kind", ["folder", "bytes", "bpe"])
def test_the_alpaca_prompt_to_the_byte(tmp_path: Path, kind: str) -> None:
    """As in the original: prompt, answer without a line end before it, end token; the answer and the end are learned."""
    records = alpaca_records(60)
    folder = str(chat_folder(tmp_path / "tokenizer"))
    data = chat_data(
        tmp_path, records, format="alpaca", tokenizer=folder if kind == "folder" else kind, tokenizer_vocab_size=400
    )
    prepared = prepare(data)
    made = prepared.tokenizer
    expected = {}
    for record in records:
        prompt = (ALPACA_WITH_INPUT if record["input"] else ALPACA_WITHOUT).format(**record)
        before, after = made.encode(prompt), made.encode(record["output"])
        expected[(*before, *after, made.eot_id)] = [(len(before), len(before) + len(after) + 1)]
    assert documents(prepared) == expected
    assert not prepared.notes
    if kind == "folder":  # the tokenizer has a token across the border, so that joint encoding would lose it
        assert made.encode("Response:The") != made.encode("Response:") + made.encode("The")


def test_alpaca_in_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    folder = chat_folder(tmp_path / "tokenizer", CHATML)
    records = [{"instruction": f"Add {n}.", "input": "1", "output": "2"} for n in range(9)]
    prepared = prepare(chat_data(tmp_path, records, format="alpaca", tokenizer=str(folder)))
    texts = {prepared.tokenizer.decode(list(ids)) for ids in documents(prepared)}
    assert "<|im_start|>user\nAdd 3.\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n" in texts


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "chatml",
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n[b.<|im_end|>\n]"
            "<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\n[b.<|im_end|>\n<|endoftext|>]",
        ),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|><|start_header_id|>user<|end_header_id|>\n\na?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[b.<|eot_id|>]<|start_header_id|>user<|end_header_id|>\n\na?"
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n[b.<|eot_id|><|endoftext|>]",
        ),
        (
            "alpaca",
            "s\n\nBelow is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\na?\n\n### Response:[b.<|endoftext|>]\n\n### Instruction:\na?\n\n### Response:[b.<|endoftext|>]",
        ),
    ],
)
def test_named_templates(tmp_path: Path, template: str, text: str) -> None:
    text = text.replace("s\n\nBelow is an instruction that describes a task. Write a response that appropriately completes the "
                        "request.\n\n", "s\n\n")  # fmt: skip
    chat = [{"role": "system", "content": "s"}, USER, ANSWER, USER, ANSWER]
    data = chat_data(tmp_path, [], template=template)
    encoder = ConversationEncoder(load_tokenizer("bytes"), open_template(data), answers_only=True)
    [found] = encoder.encode([("x", conversation(chat))])
    assert isinstance(found, Encoded)
    assert found.answers is not None
    made, cuts = load_tokenizer("bytes"), [0, *found.answers.flatten().tolist(), len(found.ids)]
    pieces = [made.decode(found.ids[a:b].tolist()) for a, b in pairwise(cuts)]
    marked = "".join(f"[{piece}]" if number % 2 else piece for number, piece in enumerate(pieces))
    assert marked == text


def test_no_second_token_at_the_beginning(tmp_path: Path) -> None:
    """A template writes it or not, as transformers does; shoal's own templates do."""
    folder = chat_folder(tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    ids = load_tokenizer(str(folder)).id_of("<s>")
    config["post_processor"] = {
        "type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [ids], "tokens": ["<s>"]}},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(config))
    made = load_tokenizer(str(folder))
    assert made.bos_id == ids
    (tmp_path / "bos.jinja").write_text(STRICT)
    for template in ("chatml", "alpaca", "llama3", str(tmp_path / "bos.jinja")):
        data = chat_data(tmp_path, [], template=template)
        [found] = ConversationEncoder(made, open_template(data), answers_only=True).encode(
            [("x", conversation([USER, ANSWER]))]
        )
        assert isinstance(found, Encoded)
        assert found.ids.tolist().count(ids) == 1
        assert found.ids[0] == ids


def test_broken_conversations_are_counted_by_kind(tmp_path: Path) -> None:
    """Dropped or kept, they are listed with three examples each, and again whenever the tokens are opened."""
    good = [{"id": n, "messages": chat} for n, chat in enumerate(conversations(20, turns=1))]
    cut = [{"messages": [{**USER, "content": f"c{n}"}, ANSWER, USER]} for n in range(5)]
    begins = [{"messages": [ANSWER, {**USER, "content": "b"}, ANSWER]}]
    repeated = [{"id": 3, "messages": [{**USER, "content": "r"}, ANSWER]}]
    records = [*good, *cut, *begins, *repeated]
    path = str(tmp_path / "chats.jsonl")
    data = chat_data(tmp_path, records, template="chatml")
    dropped = prepare(data)
    assert list(dropped.notes) == [
        f"5 dropped, {rules.IS_CUT}: {path}:21, {path}:22, {path}:23, ...",
        f"1 dropped, {rules.BEGINS_WITH_ANSWER}: {path}:26",
        f"1 dropped, {rules.REPEATS_ID}: {path}:27",
    ]
    assert prepare(data).notes == dropped.notes
    assert sum(c.documents for c in dropped.counts.values()) == 20
    kept = prepare(chat_data(tmp_path, records, template="chatml", broken_conversations="keep"))
    assert list(kept.notes) == [
        f"5 kept, {rules.IS_CUT}: {path}:21, {path}:22, {path}:23, ...",
        f"1 kept, {rules.BEGINS_WITH_ANSWER}: {path}:26",
        f"1 kept, {instruct.NO_PROMPT}: {path}:26",
        f"1 kept, {rules.REPEATS_ID}: {path}:27",
    ]
    assert sum(c.documents for c in kept.counts.values()) == 27
    cut_one = next(s for ids, s in documents(kept).items() if kept.tokenizer.decode(list(ids)).count("c3<|"))
    assert len(cut_one) == 1, "the answer before the cut is learned"


def test_what_cannot_be_learned_is_dropped_and_counted(tmp_path: Path) -> None:
    good = [{"messages": [{**USER, "content": str(n)}, ANSWER]} for n in range(20)]
    silent = {"messages": [USER, {**ANSWER, "train": False}]}
    odd = {"messages": [USER, {**USER, "content": "again"}, ANSWER]}
    (tmp_path / "strict.jinja").write_text(STRICT)
    data = chat_data(
        tmp_path, [*good, silent, odd], template=str(tmp_path / "strict.jinja"), broken_conversations="keep"
    )
    prepared = prepare(data)
    path = tmp_path / "chats.jsonl"
    assert list(prepared.notes[:2]) == [
        f"1 dropped, {instruct.NOTHING_LEARNED}: {path}:21",
        f"1 dropped, {instruct.TEMPLATE_REJECTS}: {path}:22 ({tmp_path}/strict.jinja rejects these messages: roles must alternate)",
    ]
    assert sum(c.documents for c in prepared.counts.values()) == 20


def test_a_merge_across_the_border_is_refused(tmp_path: Path) -> None:
    """The prompt alone has other tokens than at the beginning of prompt and answer."""
    (tmp_path / "plain.jinja").write_text(
        "{% for m in messages %}{{ '### Response:' if m.role == 'assistant' else 'Q' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}### Response:{% endif %}"
    )
    folder = chat_folder(tmp_path / "tokenizer")
    answers = ["The end", "3", "4", "5", "The", "6"] * 4
    records = [{"messages": [{**USER, "content": str(n)}, {**ANSWER, "content": a}]} for n, a in enumerate(answers)]
    prepared = prepare(chat_data(tmp_path, records, tokenizer=str(folder), template=str(tmp_path / "plain.jinja")))
    assert [note.split(":")[0] for note in prepared.notes] == [f"8 dropped, {instruct.NOT_A_PREFIX}"]
    assert "(the prompt ends inside a token)" in prepared.notes[0]
    assert learned_texts(prepared) == sorted(f"{a}</s>" for a in answers if not a.startswith("The"))


@pytest.mark.parametrize(
    ("template", "record", "says"),
    [
        (STRICT, {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}, "the role system .*only users"),
        (STRICT, {"messages": [USER, {"role": "tool", "content": "s"}, ANSWER]}, "the role tool"),
        ("{{ messages[0].content }}", {"messages": [USER, ANSWER]}, r"the role assistant \(it omits them\)"),
        (STRICT, {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {}}]}]}, r"calls of functions"),
        (STRICT, {"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, r"descriptions of functions"),
    ],
)
def test_what_a_template_does_not_cover(tmp_path: Path, template: str, record: dict[str, Any], says: str) -> None:
    (tmp_path / "chat.jinja").write_text(template)
    good = [{"messages": [{**USER, "content": str(n)}, ANSWER]} for n in range(4)]
    data = chat_data(tmp_path, [*good, record], template=str(tmp_path / "chat.jinja"), broken_conversations="keep")
    with pytest.raises(DataError, match=rf"chat.jinja does not cover {says}.*chats.jsonl:\d; set data.template"):
        prepare(data)


def test_reasoning_that_a_template_omits_is_counted(tmp_path: Path) -> None:
    records = [{"messages": [{**USER, "content": str(n)}, {**ANSWER, "reasoning_content": "hm"}]} for n in range(9)]
    notes = prepare(chat_data(tmp_path, records, template="chatml")).notes
    assert [note.split(":")[0] for note in notes] == [f"9 kept, {instruct.NO_REASONING}"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokenizer": "bytes"}, "bytes has no chat template, which data.format messages needs; set data.template to chatml"),
        ({"template": "{tmp}/no.jinja"}, "cannot read .*no.jinja"),
        ({"template": "{tmp}/bad.jinja"}, "bad.jinja is not a chat template"),
        ({"template": "{tmp}/silent.jinja"}, "silent.jinja does not cover the role user"),
        ({"template": "{tmp}/thinks.jinja"}, r"template writes '.*assistant:<think>', for .*; correct data.template, which must begin"),
        ({"template": "{tmp}/odd.jinja"}, "odd.jinja writes more after the last answer"),
    ],
)  # fmt: skip
def test_no_usable_template(tmp_path: Path, options: dict[str, str], says: str) -> None:
    (tmp_path / "bad.jinja").write_text("{% for %}")
    (tmp_path / "silent.jinja").write_text("hello")
    (tmp_path / "thinks.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    (tmp_path / "odd.jinja").write_text("{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}!assistant")
    records = [{"messages": [{**USER, "content": str(n)}, ANSWER]} for n in range(9)]
    filled = {key: value.format(tmp=tmp_path) for key, value in options.items()}
    with pytest.raises(DataError, match=says):
        prepare(chat_data(tmp_path, records, **filled))


def test_nothing_but_refused_conversations_is_an_error(tmp_path: Path) -> None:
    records = [{"messages": [{**USER, "content": str(n)}, {**ANSWER, "train": 0}]} for n in range(9)]
    with pytest.raises(DataError, match=r"no conversation can be learned: 9 .*nothing to learn: no answer"):
        prepare(chat_data(tmp_path, records, template="chatml"))


def test_flags_choose_messages(tmp_path: Path) -> None:
    """Also a question, up to the end of its turn."""
    chat = [{**USER, "train": 1}, {**ANSWER, "train": 0}, {**USER, "content": "c?"}, {**ANSWER, "content": "d."}]
    records = [{"messages": chat}, *({"messages": [{**USER, "content": str(n)}, ANSWER]} for n in range(9))]
    texts = learned_texts(prepare(chat_data(tmp_path, records, template="chatml")))
    assert texts == [
        "<|im_start|>user\na?<|im_end|>\n", *["b.<|im_end|>\n<|endoftext|>"] * 9, "d.<|im_end|>\n<|endoftext|>",
    ]  # fmt: skip
