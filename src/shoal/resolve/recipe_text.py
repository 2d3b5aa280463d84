"""Sets options of one section in a recipe's text, and changes no other line and no comment. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from shoal.errors import ShoalError


def with_options(text: str, section: str, values: Mapping[str, object], dropped: frozenset[str] = frozenset()) -> str:
    """
    Return the recipe `text` with `values` in `section`, and without the options `dropped`.

    Raises `ShoalError` if the section is written in a way that cannot be changed line by line.
    """
    before: dict[str, Any] = yaml.safe_load(text) or {}
    options = before.get(section)
    options = options if isinstance(options, dict) else {}  # nothing, or the word auto
    wanted = {k: v for k, v in options.items() if k not in dropped} | dict(values)
    lines = text.splitlines(keepends=True)
    first = next((n for n, line in enumerate(lines) if re.match(rf"{section}\s*:", line)), None)
    if first is None:
        end = "" if not text or text.endswith("\n") else "\n"
        changed = f"{text}{end}\n{section}:\n{_lines(wanted)}" if wanted else text
    else:
        last = next((n for n in range(first + 1, len(lines)) if re.match(r"\S", lines[n])), len(lines))
        changed = "".join(
            [*lines[:first], *_section(lines[first:last], section, wanted, values, dropped), *lines[last:]]
        )
    try:
        after = yaml.safe_load(changed) or {}
    except yaml.YAMLError:
        after = {}
    if {**after, section: after.get(section) or {}} != {**before, section: wanted}:
        raise ShoalError(
            f"the recipe's section {section} is written in a way that shoal cannot change; set {_flow(values)} in it"
        )
    return changed


def _section(
    lines: list[str], section: str, wanted: Mapping[str, object], values: Mapping[str, object], dropped: frozenset[str]
) -> list[str]:
    """Return a section's lines, changed: its own line and those indented after it."""
    head = re.match(rf"{section}\s*:\s*(.*?)\s*(#.*)?$", lines[0])
    if head is None or head[1]:  # a mapping in braces, perhaps of several lines
        comment = f"  {head[2]}" if head and head[2] else ""
        return [f"{section}: {_flow(wanted)}{comment}\n"]
    kept = [
        line
        for line in lines[1:]
        if (found := re.match(r"\s+([\w]+)\s*:", line)) is None or found[1] not in {*values, *dropped}
    ]
    at = next((n for n in range(len(kept), 0, -1) if kept[n - 1].strip()), 0)
    indent = next((found[1] for line in kept if (found := re.match(r"(\s+)\w", line))), "  ")
    return [lines[0], *kept[:at], *_lines(values, indent).splitlines(keepends=True), *kept[at:]]


def _lines(values: Mapping[str, object], indent: str = "  ") -> str:
    return "".join(f"{indent}{name}: {_plain(value)}\n" for name, value in values.items())


def _flow(values: Mapping[str, object]) -> str:
    return "{" + ", ".join(f"{name}: {_plain(value)}" for name, value in values.items()) + "}"


def _plain(value: object) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n").removesuffix("\n...")
