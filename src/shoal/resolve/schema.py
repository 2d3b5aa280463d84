"""The JSON schema of a recipe, for editors and other programs. No torch."""

from __future__ import annotations

from typing import Any

from shoal.config.auto import ABOUT_LAYOUT, AUTO, LAYOUT
from shoal.config.data_options import BlendSource
from shoal.config.keys import SOURCES, option_at
from shoal.config.option import option_fields, option_name
from shoal.config.options import SECTIONS, options
from shoal.resolve.resolve import adapter


def schema() -> dict[str, Any]:
    """Return the schema."""
    sections = {name: _object({}) for name in SECTIONS}
    for key in options():
        section, _, name = key.partition(".")
        sections[section]["properties"][name] = _described(key)
    source = _object(
        {option_name(f): _described(f"{SOURCES}NAME.{option_name(f)}") for f in option_fields(BlendSource)}
    )
    sections["data"]["properties"]["sources"] = {"type": "object", "additionalProperties": source}
    layout = {"anyOf": [sections[LAYOUT], {"const": AUTO, "description": ABOUT_LAYOUT}]}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "shoal recipe"}
    return head | _object(sections | {LAYOUT: layout})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _described(key: str) -> dict[str, Any]:
    """Return the JSON schema of an option."""
    f = option_at(key)
    assert f is not None, key
    unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
    default = list(f.default) if isinstance(f.default, tuple) else f.default
    described: dict[str, Any] = adapter(key).json_schema()
    if f.metadata["auto"]:
        described = {"anyOf": [described, {"const": AUTO}]}
    return described | {"description": f.metadata["help"] + unit, "default": default}
