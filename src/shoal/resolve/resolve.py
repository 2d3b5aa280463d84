"""
From what a person wrote to a `Config`: preset < recipe file < flags, every problem found before one is raised.

A value keeps the place it came from all the way, so that an error can name the line or the flag and
`shoal config` can say where each value is from. torch is never imported here.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config.options import PAST, SECTIONS, Config, option_name, options
from shoal.config.presets import PRESETS, resolve_shape
from shoal.errors import ConfigError, ModelError, Problem
from shoal.hub.shape import Shape, may_differ, read_model
from shoal.resolve.checks import DEFAULT, DERIVED, contradictions, remarks
from shoal.resolve.precedence import replacements
from shoal.resolve.recipe import START, Setting, known, not_text, read_override, read_recipe, to_text
from shoal.system.secrets import secret_in


@dataclass(frozen=True)
class Resolved:
    """
    A valid config, for each dotted key where its value came from, and what a person should be told.

    replaced: what a recipe said, by its key, where something else that was typed left no room for it.
    """

    config: Config
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()
    replaced: Mapping[str, Setting] = dataclasses.field(default_factory=dict)


def resolve(recipe: Path | None, overrides: Iterable[tuple[str, str, str]] = ()) -> Resolved:
    """
    The config of `recipe` with `overrides`, each (dotted key, YAML text, where it was written), which go before it.

    Raises `ConfigError` with every problem: those of the file's form, of keys and of types together; and where there
    are none of them, all that cannot hold together.
    """
    problems: list[Problem] = []
    said = _by_key(read_recipe(recipe, problems) if recipe else [], problems)
    typed = _by_key([read_override(*o) for o in overrides], problems)
    found = replacements(said, typed)
    replaced = {s.key: s for r in found for s in r.lost}
    notes = [str(r) for r in found if recipe != START]  # where there was no recipe, it had nothing to say
    settings = {k: s for k, s in said.items() if k not in replaced} | typed
    settings = _with_shape(_with_corpus(settings), problems, notes)
    values = {key: _typed(setting, problems) for key, setting in settings.items()}
    if problems:
        raise ConfigError(sorted(problems, key=_place))
    config = _build(values)
    sources = {key: settings[key].where if key in settings else DEFAULT for key in options()}
    if problems := list(contradictions(config, sources)):
        raise ConfigError(problems)
    return _derive(config, sources, (*notes, *remarks(config)), replaced)


def peek(recipe: Path | None, overrides: Iterable[tuple[str, str, str]], keys: Iterable[str]) -> dict[str, Any]:
    """What `recipe` and `overrides` say of a few options, or the default, before anything is judged. Raises nothing."""
    ignored: list[Problem] = []
    given = (read_recipe(recipe, ignored) if recipe else []) + [read_override(*o) for o in overrides]
    said = {key: _typed(s, ignored) for key, s in _by_key(given, ignored).items()}
    return {key: said.get(key) or options()[key].default for key in keys}


def _by_key(given: Iterable[Setting], problems: list[Problem]) -> dict[str, Setting]:
    """Those of options that there are; a `Problem` for each other one, and each that holds what no option may."""
    return {s.key: s for s in known(_speakable(given, problems), problems)}


def _speakable(given: Iterable[Setting], problems: list[Problem]) -> Iterator[Setting]:
    """Those without a secret, and without what is no text; a `Problem` that does not quote it for each other one."""
    for setting in given:
        if what := secret_in(str(setting.value)) or not_text(str(setting.value)):
            problems.append(Problem(setting.where, f"{setting.key}: {what}"))
        else:
            yield setting


def _place(problem: Problem) -> tuple[bool, int]:
    """A file's problems by line, then those of flags as they were given."""
    line = problem.where.rpartition(":")[2]
    return (not line.isdigit(), int(line) if line.isdigit() else 0)


# --- values ----------------------------------------------------------------------------------------------


def _with_corpus(settings: dict[str, Setting]) -> dict[str, Setting]:
    """Paths without a kind of corpus are lines of JSON where all of them are called so, and else text."""
    paths = settings.get("data.paths")
    if paths is None or not paths.value or "data.corpus" in settings:
        return settings
    names = paths.value if isinstance(paths.value, list) else str(paths.value).split(",")
    lines = all(str(name).strip().endswith((".jsonl", ".jsonl.gz")) for name in names)
    return settings | {
        "data.corpus": Setting("data.corpus", "jsonl" if lines else "text", f"data.paths at {paths.where}")
    }


def _with_shape(settings: dict[str, Setting], problems: list[Problem], notes: list[str]) -> dict[str, Setting]:
    """Put what `model.preset` or `model.from` says below what was given."""
    preset, origin = (
        s if s and s.value is not None else None for s in map(settings.get, ("model.preset", "model.from"))
    )
    if preset and origin:
        problems.append(
            Problem(origin.where, f"model.from says the shape, and so does model.preset at {preset.where}; keep one")
        )
        return settings
    if preset:
        return _with_preset(settings, preset, problems)
    return _with_folder(settings, origin, problems, notes) if origin else settings


def _with_preset(settings: dict[str, Setting], setting: Setting, problems: list[Problem]) -> dict[str, Setting]:
    if not isinstance(setting.value, str) or setting.value not in PRESETS:
        near = difflib.get_close_matches(str(setting.value), PRESETS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        problems.append(
            Problem(setting.where, f"there is no preset {setting.value}; {hint}valid: {', '.join(PRESETS)}")
        )
        return settings
    preset = {f"model.{k}": v for k, v in PRESETS[setting.value].items()}
    return {k: Setting(k, v, f"preset {setting.value}") for k, v in preset.items()} | settings


def _with_folder(
    settings: dict[str, Setting], origin: Setting, problems: list[Problem], notes: list[str]
) -> dict[str, Setting]:
    """The shape of a folder's weights, which nothing that was given may change; its tokenizer, unless one was given."""
    family = settings.get("model.family")
    try:
        shape, tokenizer = read_model(str(origin.value), str(family.value) if family else None)
    except ModelError as error:
        problems.append(Problem(origin.where, str(error)))
        return settings
    notes += shape.notes
    problems += [*_against_folder(settings, origin, shape), *_beyond_window(settings, origin, shape)]
    said = {f"model.{k}": v for k, v in shape.values.items()}
    if tokenizer is not None:
        said["data.tokenizer"] = tokenizer
    elif "data.tokenizer" not in settings:
        problems.append(
            Problem(
                origin.where,
                f"{origin.value} has neither tokenizer.json nor tokenizer.model; set data.tokenizer to the tokenizer of this "
                "model, or to bpe to train a new one, whose tokens its embedding has never seen",
            )
        )
    return {k: Setting(k, v, f"model.from {origin.value}") for k, v in said.items()} | settings


def _against_folder(settings: Mapping[str, Setting], origin: Setting, shape: Shape) -> Iterator[Problem]:
    for key, value in shape.values.items():
        given = settings.get(f"model.{key}")
        if given is not None and given.value != value and not may_differ(shape.values, key, given.value):
            yield Problem(
                given.where,
                f"model.{key} {_show(given.value)} is not what {origin.value} has ({_show(value)}); leave it out",
            )


def _beyond_window(settings: Mapping[str, Setting], origin: Setting, shape: Shape) -> Iterator[Problem]:
    given = settings.get("model.max_seq_len")
    longest = given.value if given is not None and isinstance(given.value, int) else shape.values["max_seq_len"]
    if shape.window is not None and longest > shape.window:
        yield Problem(
            origin.where,
            f"{origin.value} looks back over a sliding window of {shape.window} tokens, which is not built here; set "
            f"model.max_seq_len to {shape.window} or less, where the window changes nothing",
        )


@functools.cache
def _types() -> dict[str, Any]:
    hints = {name: typing.get_type_hints(section) for name, section in SECTIONS.items()}
    return {key: hints[key.partition(".")[0]][f.name] for key, f in options().items()}


def _typed(setting: Setting, problems: list[Problem]) -> Any:
    """The value as its option's type; pydantic judges in strict mode, so that `true` is no integer."""
    from pydantic import ValidationError

    value, kind = setting.value, _types()[setting.key]
    if isinstance(value, str):
        value = options()[setting.key].metadata["spellings"].get(value.lower(), value)
    if kind == tuple[str, ...]:
        value = tuple(value) if isinstance(value, list) else tuple(v.strip() for v in str(value).split(","))
    elif (
        isinstance(value, float)
        and value.is_integer()
        and int in (kind, *typing.get_args(kind))
        and float not in typing.get_args(kind)
    ):
        value = int(value)  # 1e3 steps
    elif kind in (str, str | None) and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # a run called 7
    try:
        return _adapter(setting.key).validate_python(value, strict=True)
    except ValidationError:
        problems.append(Problem(setting.where, f"{setting.key} must be {expectation(setting.key)}, not {_show(value)}"))
        return None


def _adapter(key: str) -> Any:
    return _adapter_of(_types()[key], **options()[key].metadata["bounds"])


@functools.cache
def _adapter_of(kind: Any, **bounds: float) -> Any:
    """Options of one kind share what judges them: making it takes 2 ms."""
    from pydantic import Field, TypeAdapter

    return TypeAdapter(typing.Annotated[kind, Field(allow_inf_nan=False, **bounds)] if bounds else kind)


def expectation(key: str) -> str:
    """What `key` takes, in words: "an integer of at least 1 (steps), or null"."""
    kind, meta = _types()[key], options()[key].metadata
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    parts = [a for a in typing.get_args(kind) if a is not types.NoneType] if union else [kind]
    words = {
        int: "an integer",
        float: "a number",
        bool: "true or false",
        str: "text",
        tuple[str, ...]: "a list of texts",
    }
    text = " or ".join(
        " | ".join(map(str, typing.get_args(p))) if typing.get_origin(p) is typing.Literal else words[p] for p in parts
    )
    phrases = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    bounds = " and ".join(f"{phrases[k]} {v}" for k, v in meta["bounds"].items())
    unit = f" ({meta['unit']})" if meta["unit"] else ""
    return f"{text}{' ' + bounds if bounds else ''}{unit}{', or null' if union else ''}"


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _build(values: Mapping[str, Any]) -> Config:
    fields = {key: f.name for key, f in options().items()}
    sections = {
        name: section(**{fields[k]: v for k, v in values.items() if k.startswith(f"{name}.")})
        for name, section in SECTIONS.items()
    }
    return Config(**sections)


def _derive(
    config: Config, sources: dict[str, str], notes: tuple[str, ...], replaced: Mapping[str, Setting]
) -> Resolved:
    """Fill what follows from the rest, and say so."""
    derived = dataclasses.replace(config, model=resolve_shape(config.model))
    for f in dataclasses.fields(derived.model):
        if getattr(derived.model, f.name) != getattr(config.model, f.name):
            sources[f"model.{option_name(f)}"] = DERIVED
    return Resolved(derived, sources, notes, replaced)


# --- writing, reading back, comparing --------------------------------------------------------------------


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain values by section, as YAML and JSON take them."""
    plain: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, f in options().items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), f.name)
        plain[section][name] = list(value) if isinstance(value, tuple) else value
    return plain


def to_yaml(config: Config, sources: Mapping[str, str] | None = None) -> str:
    """The config as a recipe; with `sources`, each line ends in where its value came from."""
    lines = []
    for section, values in to_dict(config).items():
        lines.append(f"{section}:")
        for key, value in values.items():
            text = to_text(value)
            source = sources.get(f"{section}.{key}", DEFAULT) if sources else None
            lines.append(
                f"  {key}: {text}" + (f"{' ' * max(1, 44 - len(key) - len(text))}# {source}" if source else "")
            )
    return "\n".join(lines) + "\n"


def read_back(path: Path) -> Config:
    """A config that `to_yaml` wrote. What may have moved since, such as the corpus, is not looked at."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""  # reading it says why
    return _read_back(path, content)


@functools.lru_cache(maxsize=1)
def _read_back(path: Path, content: bytes) -> Config:
    """`content` is what `path` has: a process asks some times for the config of its run, which takes 60 ms to parse."""
    problems: list[Problem] = []
    settings = list(known(read_recipe(path, problems), problems))
    values = {s.key: _typed(s, problems) for s in settings}
    if problems:
        raise ConfigError(problems)
    return _build(values)


def schema() -> dict[str, Any]:
    """A JSON schema of the recipe, for editors and other programs."""
    sections = {name: {"type": "object", "additionalProperties": False, "properties": {}} for name in SECTIONS}
    for key, f in options().items():
        section, _, name = key.partition(".")
        unit = f" [{f.metadata['unit']}]" if f.metadata["unit"] else ""
        default = list(f.default) if isinstance(f.default, tuple) else f.default
        entry = _adapter(key).json_schema() | {"description": f.metadata["help"] + unit, "default": default}
        sections[section]["properties"][name] = entry  # type: ignore[index]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "shoal recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": sections,
    }


@dataclass(frozen=True)
class Difference:
    """An option that a resumed run would change; `past` where the steps already taken forbid it."""

    key: str
    before: Any
    after: Any
    past: bool


def differences(before: Config, after: Config) -> list[Difference]:
    """What changes from one config to the other, in the order of `config/options.py`."""
    old, new = to_dict(before), to_dict(after)
    return [
        Difference(key, old[s][k], new[s][k], f.metadata[PAST])
        for key, f in options().items()
        for s, _, k in [key.partition(".")]
        if old[s][k] != new[s][k]
    ]
