"""Flags override a recipe, even if the two set the same thing by different options. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.config.auto import LAYOUT
from shoal.config.data_formats import FORMATS
from shoal.config.families import FAMILIES
from shoal.config.keys import option_at
from shoal.errors import Problem
from shoal.resolve.recipe import Setting, to_text

HELD_OUT: Final = ("data.val_paths", "data.val_split", "data.val_fraction")
LENGTHS: Final = ("train.steps", "train.tokens", "train.epochs")


@dataclass(frozen=True)
class Replacement:
    """Settings of a recipe that a flag makes meaningless."""

    by: Setting
    lost: tuple[Setting, ...]

    def __str__(self) -> str:
        file = self.lost[0].where.rpartition(":")[0]
        lost = ", ".join(f"{s.key} {to_text(s.value)}" for s in self.lost)
        return f"{self.by.where} {to_text(self.by.value)} replaces these options of {file}: {lost}"


def is_of_layout(key: str) -> bool:
    """Return whether a key is the section `parallel` as a whole, which is then auto, or one of its options."""
    return key.partition(".")[0] == LAYOUT


def without_replaced_layout(flags: Sequence[Setting], notes: list[str]) -> list[Setting]:
    """Drop --parallel auto if an option of the layout follows, and these options if --parallel auto follows."""
    last = next((flag for flag in reversed(flags) if is_of_layout(flag.key)), None)
    lost = [f for f in flags if last and is_of_layout(f.key) and (f.key == LAYOUT) != (last.key == LAYOUT)]
    notes += [f"{flag.where} {flag.value} has no effect: {last.where} {last.value} follows" for flag in lost if last]
    return [flag for flag in flags if flag not in lost]


def repeated_flags(flags: Sequence[Setting], last: Mapping[str, Setting], problems: list[Problem]) -> Iterator[str]:
    """Yield a note for each flag that a later one replaces; add a `Problem` for a list's flag, whose values may all be meant."""
    for flag in flags:
        kept = last.get(flag.key, flag)
        if kept is flag or kept.value == flag.value:
            continue
        if isinstance(getattr(option_at(flag.key), "default", None), tuple):
            cure = f"separate its values by commas: {kept.where} A,B"
            problems.append(Problem(kept.where, f"{flag.key} is given twice on the command line; {cure}"))
        else:
            yield f"{flag.where} {flag.value} has no effect: {kept.where} {kept.value} follows"


def replacements(recipe: Mapping[str, Setting], typed: Mapping[str, Setting]) -> list[Replacement]:
    """Return the recipe's settings that each flag replaces in addition to its own option; each lost setting is listed once."""
    found, lost = [], set[str]()
    for by in typed.values():
        keys = [
            k for k in recipe if k not in lost and k not in typed and _excludes(by.key, by.value, k, recipe[k].value)
        ]
        if keys and by.key in recipe:
            keys = [k for k in recipe if k in keys or k == by.key]  # list the flag's own option as well
        lost.update(keys)
        if keys:
            found.append(Replacement(by, tuple(recipe[k] for k in keys)))
    return found


def _excludes(key: str, value: Any, other: str, other_value: Any) -> bool:
    """Return whether `key` at `value` excludes a recipe's `other` at `other_value`."""
    if value is None:
        return False
    if key in LENGTHS:
        return other in LENGTHS
    if key == LAYOUT or other == LAYOUT:
        return is_of_layout(key) and is_of_layout(other)
    if key == "model.preset":
        return other.startswith("model.")
    if key == "model.from":
        return other.startswith("model.") or other == "data.tokenizer"
    if key == "data.paths":
        return bool(value) and other == "data.corpus" and other_value in ("stdlib", "dummy")
    if key in HELD_OUT:
        return bool(value) and other in HELD_OUT
    return other in _WITHOUT_MEANING.get((key, value) if isinstance(value, str | int) else key, ())


OF_DATASETS: Final = ("data.subset", "data.split", "data.val_split", "data.streaming")
_OF_TOKEN_FILES: Final = ("data.token_format", "data.token_type")
_OTHER_KINDS: Final = (*OF_DATASETS, *_OF_TOKEN_FILES)
_WITHOUT_MEANING: Final[Mapping[Any, Iterable[str]]] = {
    **{("model.family", name): [f"model.{key}" for key in family.unused] for name, family in FAMILIES.items()},
    ("data.corpus", "stdlib"): ["data.paths", "data.val_paths", "data.separator", "data.wikitext", *_OTHER_KINDS],
    ("data.corpus", "dummy"): [
        "data.paths",
        "data.val_paths",
        "data.separator",
        "data.wikitext",
        "data.bad_records",
        *_OTHER_KINDS,
    ],
    ("data.corpus", "tokens"): [
        "data.shard_tokens",
        "data.separator",
        "data.wikitext",
        "data.bad_records",
        *OF_DATASETS,
    ],
    ("data.corpus", "datasets"): ["data.val_paths", "data.separator", *_OF_TOKEN_FILES],
    ("data.corpus", "files"): _OTHER_KINDS,
    ("data.corpus", "text"): _OTHER_KINDS,
    **{("data.corpus", name): ["data.separator", *_OTHER_KINDS] for name in FORMATS if name != "text"},
    ("parallel.dp_shard", 1): ["parallel.reshard_after_forward", "parallel.cpu_offload"],
    ("parallel.cp", 1): ["parallel.cp_method"],
    ("parallel.pp", 1): ["parallel.pp_schedule", "parallel.pp_stages"],
    ("optim.name", "adamw"): ["optim.muon_momentum"],
    ("train.activation_checkpointing", "none"): ["train.activation_budget"],
    ("train.activation_checkpointing", "full"): ["train.activation_budget"],
    ("train.activation_checkpointing", "selective"): ["train.activation_budget"],
    ("launch.nodes", 1): ["launch.min_nodes", "launch.rendezvous"],
}
"""(an option, its value) -> options that have no effect with that value, and would be rejected."""
