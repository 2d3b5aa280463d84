"""
A recipe file and flags, read into settings that know where they were written. No torch.

Keys are checked here, values in `resolve/resolve.py`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from shoal.config.auto import AUTO, LAYOUT
from shoal.config.data_options import BlendSource
from shoal.config.keys import SOURCES, option_at
from shoal.config.option import option_fields, option_name
from shoal.config.options import SECTIONS, options
from shoal.errors import Problem
from shoal.system.output import on_one_line


@dataclass(frozen=True)
class Setting:
    """A value set by the user: its dotted key, the value as YAML reads it, and where it was written."""

    key: str
    value: Any
    where: str

    def texts(self) -> list[str]:
        """Return a list of texts, or texts separated by commas, before the type is checked."""
        texts = self.value if isinstance(self.value, list) else str(self.value or "").split(",")
        return [str(text).strip() for text in texts if str(text).strip()]


class _Loader(yaml.SafeLoader):
    """
    YAML with the numbers of YAML 1.2, instead of PyYAML's 1.1.

    `1e-3` is a number and `010` is ten; `1:30` and dates are text. As in 1.1, yes and no are true and false.
    """

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012
        first: [(tag, words) for tag, words in resolvers if tag.endswith((":bool", ":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if not _INTEGER.match(text):
            raise ValueError
        return int(text, 16) if text.startswith("0x") else int(text)


# 08 is text, as in the YAML 1.1 that configs are saved in, so that a run named "08" keeps its name.
_INTEGER = re.compile(r"^([-+]?(0|0[0-7_]*[0-7]|[1-9]([0-9_]*[0-9])?)|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^([-+]?([0-9][0-9_]*\.[0-9]*|[0-9][0-9_]*(?=[eE])|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


class _Dumper(yaml.SafeDumper):
    """YAML that quotes text which either version would read as another type: a run may be named 1e3."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def to_text(value: Any) -> str:
    """Return a plain value as a recipe's YAML, on one line."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


# --- finding ---------------------------------------------------------------------------------------------

PACKAGED: Final = next(
    (p for p in (Path(__file__).parents[1] / "recipes", Path(__file__).parents[3] / "recipes") if p.is_dir()),
    Path(__file__).parent / "recipes",
)
"""The folder of shoal's own recipes: in its package, or in the repository that it runs from."""
START: Final = PACKAGED / "start.yaml"  # used by a run without a recipe, and written by `shoal init`


def packaged_recipes() -> list[str]:
    """Return the names of shoal's own recipes, as `shoal train NAME` accepts them: quickstart, learn/01-one-device."""
    return sorted(p.relative_to(PACKAGED).with_suffix("").as_posix() for p in PACKAGED.glob("**/*.yaml"))


def find_recipe(given: Path) -> Path:
    """
    Return the file of a recipe, by its path or name; `given` itself if there is none.

    Tried in order: that path, that path with .yaml or .yml appended, shoal's own recipe of that name.
    """
    if os.path.exists(given) and not given.is_dir():
        return given
    beside = (given.with_name(given.name + suffix) for suffix in (".yaml", ".yml") if given.name)
    local = next((path for path in beside if os.path.isfile(path)), None)
    if local is not None or given.as_posix() not in packaged_recipes():
        return local or given
    path = PACKAGED / f"{given}.yaml"
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _no_recipe(path: Path) -> str:
    """Return the message for a recipe that does not exist."""
    beside = [str(p) for p in path.parent.glob("*.y*ml")] if len(os.fsencode(path.name)) < 256 else []
    names = {name: name for name in (*packaged_recipes(), *beside)} | {Path(p).stem: p for p in beside}
    near = difflib.get_close_matches(str(path), names, 1)
    hint = f"; did you mean {names[near[0]]}?" if near else f"; shoal has {', '.join(packaged_recipes())}"
    return "there is no such file" + hint


# --- reading ---------------------------------------------------------------------------------------------


def read_recipe(path: Path, problems: list[Problem]) -> list[Setting]:
    """Return the settings of a YAML file, in its order; add problems of its form to `problems`."""
    try:
        if path.exists() and not path.is_file():  # a pipe gives its text once, but each process reads it
            what = "is a folder" if path.is_dir() else "is not a regular file"
            problems.append(Problem(on_one_line(path), f"{what}; a recipe is a YAML file"))
            return []
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append(Problem(on_one_line(path), _no_recipe(path)))
        return []
    except UnicodeDecodeError:
        why = "is not UTF-8 (PowerShell's > writes UTF-16: save it as UTF-8)"
        problems.append(Problem(on_one_line(path), why))
        return []
    except (OSError, ValueError) as error:
        problems.append(Problem(on_one_line(path), f"cannot be read: {getattr(error, 'strerror', None) or error}"))
        return []
    path = Path(on_one_line(path))  # only for messages from here on
    try:
        root = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(_not_yaml(path, text, error))
        return []
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        problems.append(Problem(f"{path}:1", f"expected sections ({', '.join(SECTIONS)}), each with its options"))
        return []
    sections: dict[str, str] = {}
    settings: list[Setting] = []
    for key, node in root.value:
        name, where = _name_of(key), f"{path}:{key.start_mark.line + 1}"
        if name in sections:
            problems.append(Problem(where, f"{name} is here and at {sections[name]}; merge the two sections"))
        sections.setdefault(name, where)
        settings += _read_section(path, key, node, problems)
    return settings


def _not_yaml(path: Path, text: str, error: Exception) -> Problem:
    """Return PyYAML's error as a problem, at its line if it names one."""
    if isinstance(error, RecursionError):
        return Problem(str(path), "not YAML: nested too deeply; a recipe has sections with options")
    if isinstance(error, yaml.MarkedYAMLError):
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        return Problem(f"{path}:{line}", f"not YAML: {error.problem}")
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem(f"{path}:{line}", f"not YAML: it contains the character {error.character:#04x}; remove it")
    return Problem(str(path), f"not YAML: {error}; correct the escape sequence")  # such as "\U00FFFFFF"


def _name_of(key: yaml.Node) -> str:
    """Return the name of a section or option; for a list or a mapping, which YAML allows there, return a placeholder."""
    if isinstance(key, yaml.ScalarNode):
        return str(key.value)
    return "(list)" if isinstance(key, yaml.SequenceNode) else "(mapping)"


def _read_section(path: Path, key: yaml.Node, node: yaml.Node, problems: list[Problem]) -> list[Setting]:
    name, where = _name_of(key), f"{path}:{key.start_mark.line + 1}"
    if name not in SECTIONS:
        problems.append(Problem(where, _unknown(name) if isinstance(node, yaml.ScalarNode) else _no_section(name)))
        return []
    if isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~"):
        return []
    if name == LAYOUT and isinstance(node, yaml.ScalarNode) and node.value == AUTO:
        return [Setting(LAYOUT, AUTO, where)]
    if not isinstance(node, yaml.MappingNode):
        problems.append(Problem(where, f"{name} is a section: put its options below it, indented{_meant(name, node)}"))
        return []
    return list(_read_options(path, name, node, problems).values())


def _read_options(path: Path, name: str, node: yaml.MappingNode, problems: list[Problem]) -> dict[str, Setting]:
    """Return the settings of a section, or of a source of a blend (name: data.sources.NAME), by dotted key."""
    settings: dict[str, Setting] = {}
    for option, value in node.value:
        dotted, line = f"{name}.{_name_of(option)}", f"{path}:{option.start_mark.line + 1}"
        if dotted in settings:
            problems.append(Problem(line, f"{dotted} is here and at {settings[dotted].where}; remove one"))
        nested = dotted == SOURCES[:-1] or f"{name}." == SOURCES
        if nested and isinstance(value, yaml.MappingNode):
            settings |= _read_options(path, dotted, value, problems)
            continue
        try:
            settings[dotted] = Setting(dotted, _construct(value), line)
        except _NoValueError as error:
            problems.append(Problem(line, f"{dotted} cannot be read: {error}"))
    return settings


def _meant(section: str, node: yaml.Node) -> str:
    """Return a suggestion for a section that was given a single value, such as model: tiny."""
    if section == LAYOUT:
        return f"; or write {LAYOUT}: {AUTO}, and shoal train chooses the layout"
    main = {"model": "preset", "data": "corpus", "optim": "name", "track": "to"}.get(section)
    if main is None or not isinstance(node, yaml.ScalarNode):
        return ""
    return f"; did you mean {section}: {{{main}: {node.value}}}?"


_OTHERS_SECTIONS: Final = {
    "optimizer": "optim", "scheduler": "optim", "lr_scheduler": "optim", "training": "train", "trainer": "train",
    "dataset": "data", "datasets": "data", "tokenizer": "data", "parallelism": "parallel", "distributed": "parallel",
    "checkpointing": "checkpoint", "logging": "metrics", "network": "model",
}  # fmt: skip


def _no_section(name: str) -> str:
    """Return the message for options below an unknown section."""
    near = _OTHERS_SECTIONS.get(name.lower()) or next(iter(difflib.get_close_matches(name.lower(), SECTIONS, 1)), None)
    hint = f"did you mean {near}?" if near else f"valid here: {', '.join(SECTIONS)}"
    return f"there is no section {name}; {hint}"


class _NoValueError(Exception):
    """Well-formed YAML without a valid value."""


def _construct(node: yaml.Node) -> Any:
    """Return a node's value. Raises `_NoValueError` if PyYAML cannot convert it."""
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        raise _NoValueError(error.problem) from None
    except RecursionError:
        raise _NoValueError("nested too deeply") from None
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError):  # raised by PyYAML's own converters
        raise _NoValueError(f"its text is not the {node.tag.rpartition(':')[2]} that its tag says") from None
    finally:
        loader.dispose()


def read_override(key: str, text: str, where: str) -> Setting:
    """Return the setting of a flag: its text as YAML reads it; unquoted text and invalid YAML unchanged."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = text if node is None else _construct(node)
    except (yaml.YAMLError, _NoValueError, ValueError, RecursionError):
        return Setting(key, text, where)
    bare = isinstance(value, str) and isinstance(node, yaml.ScalarNode) and node.style is None
    block = isinstance(node, yaml.CollectionNode) and not node.flow_style  # "a: b" is text in a flag, not a mapping
    return Setting(key, text if bare or block else value, where)  # unchanged: YAML would fold lines, and cut at " #"


# --- keys ------------------------------------------------------------------------------------------------


def known(settings: Iterable[Setting], problems: list[Problem]) -> Iterator[Setting]:
    """Yield settings whose key is an option; add a `Problem` with a suggestion for each other setting."""
    for setting in settings:
        if option_at(setting.key) is not None or (setting.key, setting.value) == (LAYOUT, AUTO):
            yield setting
        else:
            problems.append(Problem(setting.where, _unknown(setting.key)))


def candidates(name: str) -> list[str]:
    """Return the options of any section with this name or alias. A flag may use the name if exactly one option has it."""
    leaf = name.replace("-", "_").lower()
    return [k for k, f in options().items() if leaf in (option_name(f), *f.metadata["alias"])]


def not_text(value: str) -> str | None:
    """Return the reason why files or terminals reject a text, or None. Messages must not quote such a text."""
    if "\0" in value:
        return "it contains the character 0x00; remove it"
    if any("\ud800" <= c <= "\udfff" for c in value):
        return f"{os.fsencode(value)[:80]!r} is not UTF-8; give the file or folder another name"
    return None


def _unknown(key: str) -> str:
    if key in SECTIONS:
        auto = f"; or --{key} {AUTO}, and shoal train chooses the layout" if key == LAYOUT else ""
        return f"{key} is a section; its options are --{key}.OPTION VALUE: {_valid_beside(key)}{auto}"
    if f"{key}.".startswith(SOURCES):
        return _no_source_option(key)
    if len(found := candidates(key)) > 1:
        return f"{key} may be {', '.join(found[:-1])} or {found[-1]}; use the full name"
    near = nearest(key)
    hint = f"; did you mean {near}?" if near else f"; valid here: {_valid_beside(key)}"
    return f"there is no option {key}{hint}"


def _no_source_option(key: str) -> str:
    """Return the message for an unknown key below data.sources."""
    name, _, leaf = key.removeprefix(SOURCES).rpartition(".")
    valid = [option_name(f) for f in option_fields(BlendSource)]
    if not name:
        return f"{key} is a source, whose options are below its name: set {key}.paths, or another of {', '.join(valid)}"
    near = difflib.get_close_matches(leaf, valid, 1, cutoff=0.6)
    hint = f"did you mean {SOURCES}{name}.{near[0]}?" if near else f"valid here: {', '.join(valid)}"
    return f"there is no option {key}; {hint}"


def nearest(key: str) -> str | None:
    """Return the option that `key` most likely means: by another project's name for it, then by spelling."""
    section, _, leaf = key.rpartition(".")
    leaf = leaf.replace("-", "_").lower()
    aliases = [k for k, f in options().items() if leaf in (option_name(f), *f.metadata["alias"], *f.metadata["akin"])]
    if aliases:
        return next((k for k in aliases if k.startswith(f"{section}.")), aliases[0])
    beside = {option_name(f): k for k, f in options().items() if k.startswith(f"{section}.")}
    if close := difflib.get_close_matches(leaf, beside, 1, cutoff=0.6):
        return beside[close[0]]
    names = {
        spelling: k
        for k, f in options().items()
        for spelling in (k, f"{section}.{option_name(f)}" if section else option_name(f))
    }
    names |= {name: name for name in SECTIONS} if not section else {}
    close = difflib.get_close_matches(key.replace("-", "_").lower(), names, 1, cutoff=0.75)
    return names[close[0]] if close else None


def _valid_beside(key: str) -> str:
    section = key.partition(".")[0]
    if section in SECTIONS:
        return ", ".join(option_name(f) for f in option_fields(SECTIONS[section]))
    return "the sections " + ", ".join(SECTIONS)
