"""Every config option as a command-line flag."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any

Override = tuple[str, str, str]  # dotted key, YAML text, origin for messages
SHORTCUTS = {"name": "launch.name", "processes": "launch.processes", "track": "track.to"}


class _Take(argparse.Action):
    """An action that appends (key, text, flag) to `overrides`, in command-line order."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        namespace.overrides = [*namespace.overrides, (self.dest, values, flag)]


def add_options(parser: argparse.ArgumentParser, own: Collection[str] = ()) -> None:
    """
    Add each config option as a dotted flag, and under its short name and the names that other projects use.

    own: short names that are flags of the verb itself.
    """
    from shoal.config.auto import ABOUT_LAYOUT, AUTO, LAYOUT
    from shoal.config.options import SECTIONS, options
    from shoal.resolve.resolve import expectation

    parser.set_defaults(overrides=[])
    groups = {name: parser.add_argument_group(name, (cls.__doc__ or "").strip()) for name, cls in SECTIONS.items()}

    def add(flags: list[str], key: str, help: str, *, is_bool: bool, to: Any) -> None:
        to.add_argument(
            *flags, dest=key, action=_Take, metavar="VALUE", default=argparse.SUPPRESS, help=help,
            nargs="?" if is_bool else None, const="true" if is_bool else None,
        )  # fmt: skip

    for short, key in SHORTCUTS.items():
        if short in own:
            continue
        add([f"--{short}"], key, f"short for --{key}", is_bool=False, to=parser)
    about = f"{ABOUT_LAYOUT} [{AUTO}]"
    add([f"--{LAYOUT}"], LAYOUT, about, is_bool=False, to=groups[LAYOUT])
    for key, f in options().items():
        default = (
            "null"
            if f.default is None
            else str(f.default).lower()
            if isinstance(f.default, bool)
            else f.default
            if f.default != ()
            else "none"
        )
        text = f"{f.metadata['help']} [{expectation(key)}; default: {default if default != '' else 'empty'}]"
        is_bool = isinstance(f.default, bool)
        add([f"--{key}"], key, text.replace("%", "%%"), is_bool=is_bool, to=groups[key.partition(".")[0]])
    for name, keys in _names().items():
        if name in own:
            continue
        flags = sorted({f"--{name}", f"--{name.replace('_', '-')}"})
        is_bool = all(isinstance(options()[key].default, bool) for key in keys)
        # keep an ambiguous name as typed: resolving reports it with all other problems
        add(flags, keys[0] if len(keys) == 1 else name, argparse.SUPPRESS, is_bool=is_bool, to=parser)


def _names() -> dict[str, list[str]]:
    """Return, for each option name (without its section) and each alias, the keys of the options that have it."""
    from shoal.config.option import option_name
    from shoal.config.options import options

    found: dict[str, list[str]] = {}
    for key, f in options().items():
        for name in (option_name(f), *f.metadata["alias"]):
            found.setdefault(name, []).append(key)
    return {name: keys for name, keys in found.items() if name not in SHORTCUTS}


def read_overrides(args: argparse.Namespace, rest: Sequence[str]) -> tuple[list[Override], list[str]]:
    """
    Return two lists: (key, text, flag) of each config option on the command line, known or unknown; and stray arguments.

    rest: the arguments that argparse did not parse. Stray ones do not begin with `--`, or resemble a flag of the verb.
    """
    if not hasattr(args, "overrides"):
        return [], list(rest)
    found: list[Override] = list(args.overrides)
    stray: list[str] = []
    items = list(rest)
    while items:
        item = items.pop(0)
        flag, has_value, value = item.partition("=")
        if not item.startswith("--") or args.verb_parser.near_flag(flag):
            stray.append(item)
            continue
        if not has_value:
            value = items.pop(0) if items and not items[0].startswith("--") else "true"
        found.append((flag.removeprefix("--"), value, flag))
    return found, stray
