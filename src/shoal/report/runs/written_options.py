"""The options of a `config.yaml` as it was written: fast to read, without checks. No torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times faster


def written_options(path: Path) -> dict[str, Any]:
    """Return {dotted key: value} of a `config.yaml`; empty if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        found: dict[str, Any] = {}
        for section in re.split(r"^(?=\w)", text, flags=re.MULTILINE):
            found |= _of_section(section)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found


@functools.lru_cache(maxsize=4096)
def _of_section(text: str) -> Mapping[str, Any]:
    """Return the options of a section's text. Most runs of a folder share most sections, so each text is parsed once."""
    root = _LOADER(text).get_single_data()
    if not isinstance(root, dict):
        return {}
    found: dict[str, Any] = {}
    for section, options in root.items():
        for name, value in (options if isinstance(options, dict) else {}).items():
            found |= _flat_option(f"{section}.{name}", value)
    return found


def _flat_option(key: str, value: Any) -> dict[str, Any]:
    """Return one option; the sources of a blend become one option each of theirs: data.sources.web.paths."""
    if key != "data.sources" or not isinstance(value, dict):
        return {key: value}
    sources = {name: each if isinstance(each, dict) else {} for name, each in value.items()}
    return {f"{key}.{name}.{option}": v for name, each in sources.items() for option, v in each.items()}
