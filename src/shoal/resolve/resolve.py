"""
The config of a run, resolved from a preset, a recipe and flags, each overriding those before it. Never imports torch.

All problems are collected before one error is raised. Each value keeps its source, so that an error names the line or
the flag, and `shoal config` shows the source of every value.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoal.config.auto import AUTO, LAYOUT
from shoal.config.data_options import BlendSource
from shoal.config.keys import SOURCES, option_at, options_of, path_of, plain_value, source_option
from shoal.config.option import TYPE_WORDS, option_fields, option_name, with_bounds
from shoal.config.options import SECTIONS, Config, Model, options
from shoal.config.presets import PRESETS, resolve_shape
from shoal.errors import ConfigError, ModelError, Problem
from shoal.hub.shape import Shape, may_differ, read_model
from shoal.resolve.checks import DEFAULT, DERIVED, contradictions, remarks
from shoal.resolve.corpus_kind import with_corpus
from shoal.resolve.precedence import repeated_flags, replacements, without_replaced_layout
from shoal.resolve.recipe import START, Setting, known, not_text, read_override, read_recipe, to_text
from shoal.resolve.undecided import take_undecided, with_placeholders
from shoal.system.secrets import secret_in

EXPERIMENT_FLAGS = ("--experiment-name", "--experiment_name")


@dataclass(frozen=True)
class Resolved:
    """
    A valid config, the source of each value by dotted key, and notes for the user.

    replaced: settings of a recipe, by key, that a flag for another option made meaningless. undecided: where `parallel` or
    `train.micro_batch` was set to auto, by key; the config has placeholders for their sizes.
    """

    config: Config
    sources: Mapping[str, str]
    notes: tuple[str, ...] = ()
    replaced: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    undecided: Mapping[str, str] = dataclasses.field(default_factory=dict)


def resolve(
    recipe: Path | None,
    overrides: Iterable[tuple[str, str, str]] = (),
    kept: Mapping[str, Path] = MappingProxyType({}),
    *,
    needs_length: bool = True,
    needs_files: bool = True,
) -> Resolved:
    """
    Return the config of `recipe`, overridden by `overrides`: (dotted key, YAML text, where it was written) each.

    kept: a resumed run's copies of folders that are gone, by the names in its config (`RunFolder.kept`). needs_length: whether
    the length of the run must be set. needs_files: whether the data's files must exist. Raises `ConfigError` if the config is invalid. It lists every problem of syntax, keys and types or, if there are none, every incompatible
    combination.
    """
    problems: list[Problem] = []
    said = _by_key(read_recipe(recipe, problems) if recipe else [], problems)
    flagged = list[str]()
    flags = without_replaced_layout([read_override(*o) for o in overrides], flagged)
    typed = _by_key(flags, problems)
    repeated = [] if problems else list(repeated_flags(flags, typed, problems))  # which quotes them: none has a secret
    found = replacements(said, typed)
    replaced = {s.key: s for r in found for s in r.lost}
    # without a recipe, the replaced values are START's: the user never set them
    notes = [*flagged, *repeated, *(str(r) for r in found if recipe != START)]
    settings = _with_comet({k: s for k, s in said.items() if k not in replaced} | typed, notes)
    settings = _with_shape(_with_document_mask(with_corpus(settings, problems, notes)), problems, notes, kept)
    settings, undecided = take_undecided(settings)
    values = {key: _typed(setting, problems) for key, setting in settings.items()}
    if problems:
        raise ConfigError(sorted(problems, key=_place))
    config = with_placeholders(with_kept(_build(values), kept), undecided)
    sources = {key: settings[key].where if key in settings else DEFAULT for key in options_of(config)}
    found_wrong = contradictions(
        config, sources, needs_length=needs_length, needs_files=needs_files, undecided=undecided
    )
    if problems := list(found_wrong):
        raise ConfigError(problems)
    return _derive(Resolved(config, sources, (*notes, *remarks(config)), replaced, undecided), sources)


def peek(recipe: Path | None, overrides: Iterable[tuple[str, str, str]], keys: Collection[str]) -> dict[str, Any]:
    """Return the values of the options `keys`; for an unset or invalid value, the default. Never raises."""
    ignored: list[Problem] = []
    given = (read_recipe(recipe, ignored) if recipe else []) + [read_override(*o) for o in overrides]
    said = {key: _typed(s, ignored) for key, s in _by_key(given, ignored).items() if key in keys}
    return {key: said.get(key) or options()[key].default for key in keys}


def _by_key(given: Iterable[Setting], problems: list[Problem]) -> dict[str, Setting]:
    """Return the valid settings by key; add a `Problem` for each unknown key or forbidden text."""
    return {s.key: s for s in known(_speakable(given, problems), problems)}


def _speakable(given: Iterable[Setting], problems: list[Problem]) -> Iterator[Setting]:
    """Yield settings without a secret or invalid text; add a `Problem`, which does not quote it, for each other setting."""
    for setting in given:
        if what := secret_in(str(setting.value)) or not_text(str(setting.value)):
            problems.append(Problem(setting.where, f"{setting.key}: {what}"))
        else:
            yield setting


def _place(problem: Problem) -> tuple[bool, int]:
    """Return a sort key: a file's problems by line, then those of flags in their order."""
    line = problem.where.rpartition(":")[2]
    return (not line.isdigit(), int(line) if line.isdigit() else 0)


# --- values ----------------------------------------------------------------------------------------------


def _with_comet(settings: dict[str, Setting], notes: list[str]) -> dict[str, Setting]:
    """Return `settings` with Comet switched on, if the run was named by --experiment-name, as users of Comet expect."""
    name, to = settings.get("launch.name"), settings.get("track.to")
    if name is None or name.where not in EXPERIMENT_FLAGS or (to and "comet" in to.texts()):
        return settings
    notes.append(f"{name.where} names the run and switches Comet on, as --track comet does; --name only names it")
    others = to.texts() if to else []
    return settings | {"track.to": Setting("track.to", [*others, "comet"], name.where)}


def _with_document_mask(settings: dict[str, Setting]) -> dict[str, Setting]:
    """Derive data.document_mask from a source's format, unless set: the conversations of a row do not read each other."""
    for key, form in settings.items():
        own = key == "data.format" or (key.startswith(SOURCES) and key.endswith(".format"))
        if own and form.value != "text" and "data.document_mask" not in settings:
            return settings | {"data.document_mask": Setting("data.document_mask", True, f"{key} at {form.where}")}
    return settings


def _with_shape(
    settings: dict[str, Setting], problems: list[Problem], notes: list[str], kept: Mapping[str, Path]
) -> dict[str, Setting]:
    """Return `settings`, completed with the shape of `model.preset` or `model.from`."""
    preset, origin = (
        s if s and s.value is not None else None for s in map(settings.get, ("model.preset", "model.from"))
    )
    if preset and origin:
        problems.append(
            Problem(origin.where, f"model.from and model.preset (at {preset.where}) both define the shape; remove one")
        )
        return settings
    if preset:
        return _with_preset(settings, preset, problems)
    return _with_folder(settings, origin, problems, notes, kept) if origin else settings


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
    settings: dict[str, Setting],
    origin: Setting,
    problems: list[Problem],
    notes: list[str],
    kept: Mapping[str, Path],
) -> dict[str, Setting]:
    """Return `settings`, completed with a folder's tokenizer and the shape of its weights, which `settings` may not contradict."""
    family = settings.get("model.family")
    try:
        shape, tokenizer = read_model(str(origin.value), str(family.value) if family else None, kept)
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
                f"{origin.value} has neither tokenizer.json nor tokenizer.model; set data.tokenizer to this model's "
                "tokenizer, or to bpe to train a new one, whose tokens its embedding was not trained on",
            )
        )
    return {k: Setting(k, v, f"model.from {origin.value}") for k, v in said.items()} | settings


def _against_folder(settings: Mapping[str, Setting], origin: Setting, shape: Shape) -> Iterator[Problem]:
    for key, value in shape.values.items():
        given = settings.get(f"model.{key}")
        if given is not None and given.value != value and not may_differ(shape.values, key, given.value):
            yield Problem(
                given.where,
                f"model.{key} {_show(given.value)} differs from {origin.value}, which has {_show(value)}; remove it",
            )


def _beyond_window(settings: Mapping[str, Setting], origin: Setting, shape: Shape) -> Iterator[Problem]:
    given = settings.get("model.max_seq_len")
    longest = given.value if given is not None and isinstance(given.value, int) else shape.values["max_seq_len"]
    if shape.window is not None and longest > shape.window:
        yield Problem(
            origin.where,
            f"{origin.value} uses a sliding window of {shape.window} tokens, which shoal does not implement; set "
            f"model.max_seq_len to {shape.window} or less, so that the window has no effect",
        )


@functools.cache
def _types() -> dict[str, Any]:
    """Return the type of every option by its dotted key; a blend's sources have the key data.sources.OPTION."""
    hints = {name: typing.get_type_hints(section) for name, section in SECTIONS.items()}
    sources = typing.get_type_hints(BlendSource)
    types = {key: hints[key.partition(".")[0]][f.name] for key, f in options().items()}
    return types | {f"{SOURCES}{option_name(f)}": sources[f.name] for f in option_fields(BlendSource)}


def _option(key: str) -> tuple[Any, Mapping[str, Any]]:
    """Return the type and the metadata of an option that exists."""
    found = option_at(key)
    assert found is not None, key
    return _types()[f"{SOURCES}{option_name(found)}" if key.startswith(SOURCES) else key], found.metadata


def _typed(setting: Setting, problems: list[Problem]) -> Any:
    """Return the value in its option's type, checked by pydantic in strict mode, so that `true` is not an integer."""
    from pydantic import ValidationError

    value, (kind, meta) = setting.value, _option(setting.key)
    if isinstance(value, str):
        value = meta["spellings"].get(value.lower(), value)
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
        value = str(value)  # a run named 7
    try:
        return adapter(setting.key).validate_python(value, strict=True)
    except ValidationError:
        problems.append(Problem(setting.where, f"{setting.key} must be {expectation(setting.key)}, not {_show(value)}"))
        return None


def adapter(key: str) -> Any:
    """Return pydantic's validator of an option's values."""
    kind, meta = _option(key)
    return _adapter_of(kind, **meta["bounds"])


@functools.cache
def _adapter_of(kind: Any, **bounds: float) -> Any:
    """Return pydantic's validator for a type with bounds. Options share it, because making one takes 2 ms."""
    from pydantic import Field, TypeAdapter

    return TypeAdapter(typing.Annotated[kind, Field(allow_inf_nan=False, **bounds)] if bounds else kind)


def expectation(key: str) -> str:
    """Return the valid values of `key` in words: "an integer of at least 1 (steps), or null"."""
    kind, meta = _option(key)
    union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    parts = [a for a in typing.get_args(kind) if a is not types.NoneType] if union else [kind]
    text = " | ".join(
        " | ".join(map(str, typing.get_args(p))) if typing.get_origin(p) is typing.Literal else TYPE_WORDS[p]
        for p in parts
    )
    unit = f" ({meta['unit']})" if meta["unit"] else ""
    others = ", or null" if types.NoneType in typing.get_args(kind) else f", or {AUTO}" if meta["auto"] else ""
    return f"{with_bounds(text, meta['bounds'])}{unit}{others}"


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _build(values: Mapping[str, Any]) -> Config:
    fields = {key: f.name for key, f in options().items()}
    sections = {
        name: section(**{fields[k]: v for k, v in values.items() if k in fields and k.startswith(f"{name}.")})
        for name, section in SECTIONS.items()
    }
    return _with_sources(Config(**sections), values)


def _with_sources(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with a blend's sources, in the order in which they were set."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        if said := source_option(key):
            found.setdefault(said[0], {})[said[1].name] = value
    return config.replace("data", sources={n: BlendSource(**v) for n, v in found.items()}) if found else config


def with_kept(config: Config, kept: Mapping[str, Path]) -> Config:
    """Return `config` with a run's own copies of its model and tokenizer. kept: the copies' folders, by the names in `config`."""
    model = dataclasses.replace(config.model, kept=kept.get(config.model.from_ or ""))
    data = dataclasses.replace(config.data, kept=kept.get(config.data.tokenizer))
    return dataclasses.replace(config, model=model, data=data)


def _derive(resolved: Resolved, sources: dict[str, str]) -> Resolved:
    """Fill in the values derived from others, with their source in `sources`."""
    config = resolved.config
    derived = dataclasses.replace(config, model=resolve_shape(config.model))
    for f in option_fields(Model):
        if getattr(derived.model, f.name) != getattr(config.model, f.name):
            sources[f"model.{option_name(f)}"] = DERIVED
    return dataclasses.replace(resolved, config=derived, sources=sources)


# --- writing, reading back, comparing --------------------------------------------------------------------


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return plain values by section, for YAML and JSON."""
    plain: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, (_, value) in options_of(config).items():
        *path, name = path_of(key)
        within: dict[str, Any] = plain
        for part in path:
            within = within.setdefault(part, {})
        within[name] = plain_value(value)
    return plain


def to_yaml(
    config: Config,
    sources: Mapping[str, str] | None = None,
    undecided: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the config as a recipe; with `sources`, each line ends with the source of its value. `undecided` sizes are auto."""
    lines: list[str] = []
    above: list[str] = []
    for section in SECTIONS:
        for key, (_, value) in options_of(config).items():
            *path, name = path_of(key)
            if path[0] != section or (path[0] == LAYOUT and LAYOUT in undecided):
                continue
            common = next(
                (n for n, (a, b) in enumerate(zip(path, above, strict=False)) if a != b), min(len(path), len(above))
            )
            lines += [f"{'  ' * depth}{part}:" for depth, part in enumerate(path) if depth >= common]
            above = path
            text = AUTO if key in undecided else to_text(plain_value(value))
            source = (undecided.get(key) or sources.get(key, DEFAULT)) if sources else None
            lines.append(f"{'  ' * len(path)}{_line(name, text, source)}")
        if section == LAYOUT and LAYOUT in undecided:
            lines.append(_line(LAYOUT, AUTO, undecided[LAYOUT] if sources else None))
    return "\n".join(lines) + "\n"


def _line(name: str, text: str, source: str | None) -> str:
    """Return an option's line, with a comment that names the source of its value, if any."""
    return f"{name}: {text}" + (f"{' ' * max(1, 44 - len(name) - len(text))}# {source}" if source else "")


def read_back(path: Path) -> Config:
    """Return a config that `to_yaml` wrote, without checking files that may have moved since, such as the corpus."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""  # `read_recipe` reports why
    return _read_back(path, content)


@functools.lru_cache(maxsize=1)
def _read_back(path: Path, content: bytes) -> Config:
    """Parse `path`, whose bytes are `content`: a process reads its run's config several times, at 60 ms each."""
    problems: list[Problem] = []
    settings = list(known(read_recipe(path, problems), problems))
    problems += [_not_settled(s) for s in settings if s.key == LAYOUT]
    values = {s.key: _typed(s, problems) for s in settings if s.key != LAYOUT}
    if problems:
        raise ConfigError(problems)
    return _build(values)


def _not_settled(setting: Setting) -> Problem:
    return Problem(setting.where, f"{LAYOUT} {AUTO} is for recipes; a run's own config has the sizes that were chosen")
