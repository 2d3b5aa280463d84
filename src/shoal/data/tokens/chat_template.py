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

from shoal.data.tokens.tokenizer_ends import read_object, special_tokens
from shoal.errors import DataError

TEMPLATE_FILE = "chat_template.jinja"


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
        source, name = _source(folder, config)
        if source is None:
            return None
        template = cls(source, special_tokens(folder), str(name))
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
        except TemplateError as error:
            raise DataError(f"{self.name} refuses these messages: {error}") from error
        except Exception as error:  # of a program that is not ours
            why = f"{type(error).__name__}: {error}"
            raise DataError(f"{self.name} refuses these messages, or is wrong: {why}; correct it") from error

    @cached_property
    def _compiled(self) -> Template:
        try:
            return _environment().from_string(self.source)
        except (TemplateError, SyntaxError, RecursionError) as error:  # the last two where it is nested too deep
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
        found = {
            entry["name"]: entry.get("template")
            for entry in found
            if isinstance(entry, dict) and isinstance(entry.get("name"), str)
        }
    if isinstance(found, dict):
        if "default" not in found:
            names = ", ".join(found) or "without names"
            raise DataError(f"{path} has chat templates {names}, and none called default; name one so")
        found = found["default"]
    elif found is None:
        return None, path
    if not isinstance(found, str):
        raise DataError(f"{path} has a chat template that is not text; correct or remove it")
    return found, path


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
