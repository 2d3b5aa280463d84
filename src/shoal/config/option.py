"""The declaration of one option: its default, its meaning, its bounds, and how messages describe them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

PAST = "past"  # a resumed run may not change it: it says what the steps already taken meant
TYPE_WORDS: Final[dict[Any, str]] = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "an object", list: "a list of texts",
    tuple[str, ...]: "a list of texts",
}  # fmt: skip
_BOUND_WORDS: Final = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}


def opt(
    default: Any,
    help: str,
    *,
    unit: str = "",
    alias: tuple[str, ...] = (),
    akin: tuple[str, ...] = (),
    spellings: Mapping[str, str] = MappingProxyType({}),
    past: bool = False,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """
    An option: `help` and `unit` for people, `past` if a resume must keep it, and inclusive or exclusive bounds.

    alias: names of the same thing in other projects, which the command line takes too.
    akin: names of something close to it, in another unit or of another meaning; they are suggested and not taken.
    spellings: other words for its values.
    """
    bounds = {k: v for k, v in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if v is not None}
    return dataclasses.field(
        default=default,
        metadata={
            "help": help, "unit": unit, "alias": alias, "akin": akin, "spellings": spellings, PAST: past, "bounds": bounds,
        },
    )  # fmt: skip


def option_name(field: dataclasses.Field[Any]) -> str:
    """A field's name as people write it: `from` is a word of Python's, so that the field is `from_`."""
    return field.name.removesuffix("_")


def option_fields(section: type[Any]) -> list[dataclasses.Field[Any]]:
    """Return the fields of a section that are options."""
    return [f for f in dataclasses.fields(section) if f.metadata]


def with_bounds(words: str, bounds: Mapping[str, float]) -> str:
    """Return `words` with bounds as `opt` names them: "an integer of at least 1"."""
    return " ".join([words, " and ".join(f"{_BOUND_WORDS[name]} {bound}" for name, bound in bounds.items())]).strip()
