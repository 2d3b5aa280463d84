"""
A recipe file and flags -> settings, each with the place it was written at. No torch.

What a value must be is judged in `resolve.py`; here it is what YAML says, at a key that there is.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shoal.config import SECTIONS, option_name, options
from shoal.errors import Problem


@dataclass(frozen=True)
class Setting:
    """A value somebody gave: the dotted key, the value as YAML reads it, and where it was written."""

    key: str
    value: Any
    where: str


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as YAML 1.2 has it and PyYAML (1.1) does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


# --- reading ---------------------------------------------------------------------------------------------


def read_recipe(path: Path, problems: list[Problem]) -> list[Setting]:
    """The settings of a YAML file, in its order; what is wrong with its form goes to `problems`."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        problems.append(Problem(str(path), "there is no such file" + (f"; did you mean {near[0]}?" if near else "")))
        return []
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(str(path), f"cannot be read: {error}"))
        return []
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problems.append(Problem(f"{path}:{line}", f"not YAML: {error.problem}"))
        return []
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        problems.append(Problem(f"{path}:1", f"expected sections ({', '.join(SECTIONS)}), each with its options"))
        return []
    return [s for key, node in root.value for s in _read_section(path, key, node, problems)]


def _read_section(path: Path, key: yaml.Node, node: yaml.Node, problems: list[Problem]) -> list[Setting]:
    name, where = str(key.value), f"{path}:{key.start_mark.line + 1}"
    if name not in SECTIONS:
        problems.append(Problem(where, _unknown(name)))
        return []
    if isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~"):
        return []
    if not isinstance(node, yaml.MappingNode):
        problems.append(Problem(where, f"{name} is a section: its options go below it, indented"))
        return []
    settings: dict[str, Setting] = {}
    for option, value in node.value:
        dotted, line = f"{name}.{option.value}", f"{path}:{option.start_mark.line + 1}"
        if dotted in settings:
            problems.append(Problem(line, f"{dotted} stands here and at {settings[dotted].where}; keep one"))
        settings[dotted] = Setting(dotted, _construct(value), line)
    return list(settings.values())


def _construct(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError):
        return str(node.value)
    finally:
        loader.dispose()


def read_override(key: str, text: str, where: str) -> Setting:
    """Of a flag: its text as YAML reads it, or as it stands where it is none."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        node = None
    value = _construct(node) if node is not None else text
    return Setting(key, value, where)


# --- keys ------------------------------------------------------------------------------------------------


def known(settings: Iterable[Setting], problems: list[Problem]) -> Iterator[Setting]:
    """Those whose key is an option; a `Problem` for each other one, with what may have been meant."""
    there = options()
    for setting in settings:
        if setting.key in there:
            yield setting
        else:
            problems.append(Problem(setting.where, _unknown(setting.key)))


def _unknown(key: str) -> str:
    near = nearest(key)
    hint = f"; did you mean {near}?" if near else f"; valid here: {_valid_beside(key)}"
    return f"there is no option {key}{hint}"


def nearest(key: str) -> str | None:
    """The option that `key` most likely means: by another project's name for it, then by spelling."""
    section, _, leaf = key.rpartition(".")
    leaf = leaf.replace("-", "_").lower()
    aliases = [k for k, f in options().items() if leaf in (option_name(f), *f.metadata["alias"])]
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
        return ", ".join(option_name(f) for f in dataclasses.fields(SECTIONS[section]))
    return "the sections " + ", ".join(SECTIONS)
