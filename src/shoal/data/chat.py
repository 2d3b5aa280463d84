"""
Chat templates: messages as the text that a model was taught to answer. No torch.

A template is a Jinja program that came with somebody's model: it runs in Jinja's sandbox, with the functions that
https://huggingface.co/docs/transformers/chat_templating promises to it, and gives what `transformers` gives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.data.tokenizer_ends import content_of, read_object
from shoal.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"
SPECIAL = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True)
class ChatTemplate:
    """A template, the names of the special tokens that it may write, and where it is from."""

    source: str
    special: Mapping[str, str]
    name: str

    @classmethod
    def of(cls, folder: Path) -> ChatTemplate | None:
        """
        The template of a Hugging Face folder, None where it has none. Of several, the one called default.

        Raises DataError where a file cannot be read, or the template is no Jinja.
        """
        config = read_object(folder / "tokenizer_config.json")
        tokens = read_object(folder / "special_tokens_map.json") | config
        source, name = _source(folder, config)
        if source is None:
            return None
        special = {key: text for key in SPECIAL if (text := content_of(tokens.get(key))) is not None}
        template = cls(source, special, str(name))
        _ = template._compiled
        return template

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """
        The conversation as text, special tokens spelt out: for `Tokenizer.encode_chat`.

        `messages`: each with its `role` and `content`. `add_generation_prompt`: end where the model is to speak.
        `variables` are the template's own, such as `enable_thinking`. Raises DataError where it refuses.
        """
        if not messages:
            raise DataError("a chat needs at least one message")
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._compiled.render(
                messages=given,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self.special, **variables},
            )
        except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise DataError(f"{self.name} refuses these messages: {error}") from error

    @cached_property
    def _compiled(self) -> Template:
        try:
            return _environment().from_string(self.source)
        except TemplateError as error:
            raise DataError(f"{self.name} is not a chat template: {error}; correct or remove it") from error


def _source(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, Path]:
    """The template's text and the file that has it; a file of its own goes before the config's."""
    file = folder / TEMPLATE_FILE
    try:
        return file.read_text("utf-8"), file
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}; correct or remove it") from error
    path, found = folder / "tokenizer_config.json", config.get("chat_template")
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if isinstance(found, dict):
        if not isinstance(found.get("default"), str):
            raise DataError(f"{path} has chat templates {', '.join(map(str, found))}, and none called default")
        found = found["default"]
    return (found if isinstance(found, str) else None), path


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant says; as text it is what stands inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
