"""Types and bounds of values in a folder's JSON files, which may hold anything. No torch."""

from __future__ import annotations

import functools
import math
import operator
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from shoal.config.option import TYPE_WORDS, with_bounds
from shoal.config.options import Model
from shoal.errors import ModelError

Json = Mapping[str, Any]

_LARGEST_TOKEN: Final = 2**31 - 1


@dataclass(frozen=True)
class Kind:
    """The valid values of a key. `float`: any finite number; `list`: a list of texts. Null is always valid and means unset."""

    type: type
    bounds: Mapping[str, float] = field(default_factory=dict)  # as `config.option.opt` names them

    def takes(self, value: Any) -> bool:
        if self.type is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
        elif self.type is list:
            fits = isinstance(value, list) and all(isinstance(part, str) for part in value)
        else:
            fits = isinstance(value, self.type) and (self.type is bool or not isinstance(value, bool))
        return fits and all(getattr(operator, name)(value, bound) for name, bound in self.bounds.items())

    def __str__(self) -> str:
        return with_bounds(TYPE_WORDS[self.type], self.bounds)


def wrong_values(said: Json, kinds: Mapping[str, Kind], inside: str = "") -> Iterator[str]:
    """Yield a line for each key with an invalid value. inside: prefix of keys in messages, for a nested object `said`."""
    for key, kind in kinds.items():
        value = said.get(key)
        if value is not None and not kind.takes(value):
            yield f"{inside}{key} is {value!r}; it must be {kind}"


@functools.cache
def kind_of_option(name: str) -> Kind:
    """Return the valid values of an option of `Model`, by its name there."""
    found = next(f for f in fields(Model) if f.name == name)
    hint = typing.get_type_hints(Model)[name]
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return Kind(next(part for part in parts if part is not types.NoneType), found.metadata["bounds"])


def token_ids(said: Any, where: str) -> list[int]:
    """
    Return the ids in an `eos_token_id`: one, several or none.

    Raises `ModelError`, whose message begins with `where`, if the value is not a token id, a list of them, or null.
    """
    ids = said if isinstance(said, list) else [] if said is None else [said]
    for index in ids:
        if not Kind(int, {"ge": 0, "le": _LARGEST_TOKEN}).takes(index):
            raise ModelError(f"{where} has eos_token_id {said!r}; it must be a token id, or a list of them")
    return list(ids)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False
