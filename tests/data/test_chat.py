"""Chat templates against transformers: real templates, and one with every feature they use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from shoal.data.tokens.chat_template import ChatTemplate
from shoal.data.tokens.tokenize import load_tokenizer, train_bpe
from shoal.errors import DataError

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 1 + 1? "}],
    [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": "Hello\n\nthere 漢字 🐟"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi!"},
        {"role": "user", "content": "  And {{ now }} {% if %}?"},
    ],
]
# Mistral's format, plus features of other templates: loop controls, JSON, errors, marks of the assistant's turns.
TEMPLATE = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('only users and assistants speak, not ' + message.role) }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
            {%- continue %}
        {%- endif %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- else %}
        {% generation %}
        {{- ' ' + message['content'] | trim }}{{ eos_token }}
        {% endgeneration %}
    {%- endif %}
{%- endfor %}
    {% if add_generation_prompt %}{{ {'é<': messages | length} | tojson }} {{ strftime_now('%Y') | length }}{% endif %}

{% if tools is none and thinking is not defined %}end{% endif %}
"""


def small_folder(tmp_path: Path, template: Any, *, in_a_file: bool = False) -> Path:
    """Write a Hugging Face folder with this template."""
    tokenizer = train_bpe(iter(["Hello there, what is it?"] * 9), 280)
    tokenizer._tokenizer.add_special_tokens(["<s>", "</s>", "[INST]", "[/INST]"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    config["bos_token"] = {"__type": "AddedToken", "content": "<s>", "special": True}
    if in_a_file:
        (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        template = "not this one"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return tmp_path


def same(folder: Path, chat: list[dict[str, str]], **variables: Any) -> None:
    """Check that text and ids equal those of transformers, with and without the generation prompt."""
    theirs = AutoTokenizer.from_pretrained(folder)
    template, tokenizer = ChatTemplate.of(folder), load_tokenizer(str(folder))
    assert template is not None
    for prompt in (True, False):
        text = template.render(chat, prompt, **variables)
        options = {"add_generation_prompt": prompt, **variables}
        assert text == theirs.apply_chat_template(chat, tokenize=False, **options)
        assert tokenizer.encode_chat(text) == theirs.apply_chat_template(chat, return_dict=False, **options)


@pytest.mark.parametrize("name", ["llama3", pytest.param("qwen3", marks=pytest.mark.ci)])
def test_real_templates(name: str, real_tokenizers: Path) -> None:
    same(real_tokenizers / name, CHATS[2])
    template = ChatTemplate.of(real_tokenizers / name)
    theirs = AutoTokenizer.from_pretrained(real_tokenizers / name)
    assert template is not None
    for chat in CHATS:
        assert template.render(chat) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if name == "qwen3":
        quiet = theirs.apply_chat_template(CHATS[0], tokenize=False, add_generation_prompt=True, enable_thinking=False)
        assert template.render(CHATS[0], enable_thinking=False) == quiet != template.render(CHATS[0])


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_template_that_uses_everything(tmp_path: Path, chat: list[dict[str, str]], in_a_file: bool) -> None:
    folder = small_folder(tmp_path, TEMPLATE, in_a_file=in_a_file)
    same(folder, chat)
    same(folder, chat, thinking=True)


def test_of_several_the_default(tmp_path: Path) -> None:
    folder = small_folder(tmp_path, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}])
    same(folder, CHATS[0])
    with pytest.raises(DataError, match="tool_use, but none named default"):
        ChatTemplate.of(small_folder(tmp_path, [{"name": "tool_use", "template": "no"}]))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            [{"name": ["a"], "template": "no"}, {"name": "rag", "template": "no"}],
            "templates rag, but none named default",
        ),
        ([{"template": "no"}], "templates without names, but none named default"),
        ({"default": 5}, "a chat template that is not text"),
        ([{"name": "default"}], "a chat template that is not text"),
        (5, "a chat template that is not text"),
    ],
)
def test_what_is_no_template(tmp_path: Path, template: Any, says: str) -> None:
    with pytest.raises(DataError, match=f"tokenizer_config.json has .*{says}"):
        ChatTemplate.of(small_folder(tmp_path, template))


def test_none_is_none(tmp_path: Path) -> None:
    assert ChatTemplate.of(tmp_path) is None
    shutil.rmtree(tmp_path)
    assert ChatTemplate.of(tmp_path) is None


def test_what_a_template_may_not_do(tmp_path: Path) -> None:
    """Reject harmful templates: they come with downloaded models and are not trusted."""
    for attack in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}{{ cycler.__init__.__globals__.os }}"):
        template = ChatTemplate.of(small_folder(tmp_path, attack))
        assert template is not None
        with pytest.raises(DataError, match="rejects these messages"):
            template.render(CHATS[0])


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages | dictsort }}", "AttributeError: "),
        ("{{ '{1}'.format(messages[0].role) }}", "IndexError: "),
        ("{{ strftime_now(1) }}", "TypeError: "),
        ("{{ 'a'.encode('nothing') }}", "LookupError: unknown encoding"),
    ],
)
def test_a_program_that_breaks_is_one_message(tmp_path: Path, template: str, says: str) -> None:
    wrong = ChatTemplate.of(small_folder(tmp_path, template))
    assert wrong is not None
    with pytest.raises(DataError, match=f"tokenizer_config.json rejects these messages or has a bug: {says}"):
        wrong.render(CHATS[0])


def test_what_goes_wrong_is_said(tmp_path: Path) -> None:
    template = ChatTemplate.of(small_folder(tmp_path, TEMPLATE))
    assert template is not None
    with pytest.raises(DataError, match="only users and assistants speak, not tool"):
        template.render([{"role": "tool", "content": "x"}])
    with pytest.raises(DataError, match="at least one message"):
        template.render([])
    with pytest.raises(DataError, match="not a chat template"):
        ChatTemplate.of(small_folder(tmp_path, "{% for x %}"))
    with pytest.raises(DataError, match="not a chat template"):
        ChatTemplate.of(small_folder(tmp_path, "{{ " + "(" * 5000))
