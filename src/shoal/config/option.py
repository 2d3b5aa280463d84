"""The declaration of one option: its default, its meaning, its bounds, and how messages describe them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

PAST = "past"  # a resumed run cannot change it: the steps already taken depend on it
TYPE_WORDS: Final[dict[Any, str]] = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "an object", list: "a list of texts",
    tuple[str, ...]: "a list of texts", Mapping[str, Mapping[str, float]]: "weights by source for each place, such as {20 steps: {web: 1, code: 2}, 1e9 tokens: {code: 1}}",
}  # fmt: skip
_BOUND_WORDS: Final = {"ge": "of at least", "gt": "above", "le": "at most", "lt": "below"}


def opt(
    default: Any,
    help: str,
    *,
    unit: str = "",
    alias: tuple[str, ...] = (),
    akin: tuple[str, ...] = (),
    spellings: Mapping[str, Any] = MappingProxyType({}),
    past: bool = False,
    auto: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """
    Declare an option: its default, help text and unit. ge, le: inclusive bounds. gt, lt: exclusive bounds.

    past: whether a resumed run must keep its value.
    auto: whether it may be `auto`, which `shoal train` replaces by a value before the first step (config/auto.py).
    alias: other projects' names for it, which the command line accepts.
    akin: names of related options with another unit or meaning. The error for such a name suggests this option.
    spellings: other spellings of its values, each with its value.
    """
    bounds = {k: v for k, v in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if v is not None}
    return dataclasses.field(
        default=default,
        metadata={
            "help": help, "unit": unit, "alias": alias, "akin": akin, "spellings": spellings, PAST: past,
            "auto": auto, "bounds": bounds,
        },
    )  # fmt: skip


def option_name(field: dataclasses.Field[Any]) -> str:
    """Return a field's name as users write it: the field `from_` is `from`, a keyword of Python."""
    return field.name.removesuffix("_")


def option_fields(section: type[Any]) -> list[dataclasses.Field[Any]]:
    """Return the fields of a section that are options."""
    return [f for f in dataclasses.fields(section) if f.metadata]


def with_bounds(words: str, bounds: Mapping[str, float]) -> str:
    """Return `words` followed by bounds, which have the names of `opt`'s arguments: "an integer of at least 1"."""
    return " ".join([words, " and ".join(f"{_BOUND_WORDS[name]} {bound}" for name, bound in bounds.items())]).strip()
