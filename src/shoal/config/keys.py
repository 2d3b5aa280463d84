"""
Options by their dotted keys: train.steps or, of a blend's source, data.sources.web.paths. And what differs between two configs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from shoal.config.data_options import BlendSource
from shoal.config.option import PAST, option_fields, option_name
from shoal.config.options import Config, options

SOURCES = "data.sources."


def source_option(key: str) -> tuple[str, dataclasses.Field[Any]] | None:
    """Return the source's name and the option of a key such as data.sources.web.paths; None for any other key."""
    name, _, option = key.removeprefix(SOURCES).rpartition(".")
    if not key.startswith(SOURCES) or not name:
        return None
    return next(((name, f) for f in option_fields(BlendSource) if option_name(f) == option), None)


def option_at(key: str) -> dataclasses.Field[Any] | None:
    """Return the option with a dotted key, that of a blend's source included; None if there is none."""
    found = source_option(key)
    return found[1] if found else options().get(key)


def options_of(config: Config) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Return every option of a config with its value by dotted key, those of a blend's sources last."""
    values = {key: (f, getattr(getattr(config, key.partition(".")[0]), f.name)) for key, f in options().items()}
    for name, source in (config.data.sources or {}).items():
        values |= {
            f"{SOURCES}{name}.{option_name(f)}": (f, getattr(source, f.name)) for f in option_fields(BlendSource)
        }
    return values


def path_of(key: str) -> list[str]:
    """Return the names that lead to an option in a recipe: section and option or, for a source, data, sources, NAME, option."""
    if said := source_option(key):
        return ["data", "sources", said[0], option_name(said[1])]
    return key.split(".", 1)


def plain_value(value: Any) -> Any:
    """Return an option's value as YAML and JSON have it."""
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class ChangedOption:
    """An option that a resumed run would change; `past` if the steps already taken forbid that."""

    key: str
    before: Any
    after: Any
    past: bool


def changed_options(before: Config, after: Config) -> list[ChangedOption]:
    """Return the options that differ between two configs, in the order of declaration."""
    old, new = options_of(before), options_of(after)
    found = []
    for key, (f, _) in (old | new).items():
        was, now = (plain_value(config[key][1]) if key in config else None for config in (old, new))
        if was != now or (key in old) != (key in new):
            found.append(ChangedOption(key, was, now, f.metadata[PAST]))
    return found
