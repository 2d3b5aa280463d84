"""
Chat templates: format messages as the text that a model was trained to answer. No torch.

A template is a Jinja program that comes with a downloaded model. It runs in Jinja's sandbox, with the functions listed in
https://huggingface.co/docs/transformers/chat_templating, and its output equals that of `transformers`.
"""

from __future__ import annotations

import json
import os
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
    """A template, the special tokens it may write, and the file it comes from."""

    source: str
    special: Mapping[str, str]
    name: str

    @classmethod
    def of(cls, folder: Path) -> ChatTemplate | None:
        """
        Read the template of a Hugging Face folder, or the one named "default" if there are several; None if there is none.

        Raises DataError if a file cannot be read, the template is not valid Jinja, or there are several and none is "default".
        """
        config = read_object(folder / "tokenizer_config.json")
        source, name = _source(folder, config)
        if source is None:
            return None
        return cls(source, special_tokens(folder), str(name)).checked()

    @classmethod
    def read(cls, path: Path) -> ChatTemplate:
        """Read a template file, without special tokens. Raises DataError if it cannot be read or is not valid Jinja."""
        return cls(_read(path), {}, str(path)).checked()

    def checked(self) -> ChatTemplate:
        """Return this template. Raises DataError if it is not valid Jinja."""
        _ = self._compiled
        return self

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **variables: object,
    ) -> str:
        """
        Return the conversation as text that contains special tokens, for `Tokenizer.encode_chat`.

        messages: each with `role` and `content`. add_generation_prompt: end with the start of the model's answer.
        tools: descriptions of functions. variables: extra template variables, such as `enable_thinking`. Raises DataError if there are no messages, or
        the template rejects them or fails.
        """
        if not messages:
            raise DataError("a chat needs at least one message")
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._compiled.render(
                messages=given,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self.special, **variables},
            )
        except TemplateError as error:
            raise DataError(f"{self.name} rejects these messages: {error}") from error
        except Exception as error:  # the template is foreign code
            why = f"{type(error).__name__}: {error}"
            raise DataError(f"{self.name} rejects these messages or has a bug: {why}; correct it") from error

    @cached_property
    def _compiled(self) -> Template:
        try:
            return _environment().from_string(self.source)
        except (TemplateError, SyntaxError, RecursionError) as error:  # the last two if nested too deeply
            raise DataError(f"{self.name} is not a chat template: {error}; correct or remove it") from error


def _source(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, Path]:
    """Return the template's text and its file; a separate template file takes precedence over the config."""
    file = folder / TEMPLATE_FILE
    if os.path.exists(file):
        return _read(file), file
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
            raise DataError(f"{path} has chat templates {names}, but none named default; rename one")
        found = found["default"]
    elif found is None:
        return None, path
    if not isinstance(found, str):
        raise DataError(f"{path} has a chat template that is not text; correct or remove it")
    return found, path


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {file}: {error}; correct or remove it") from error


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks the assistant's turns: rendered as its content."""

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
    """Convert to JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
