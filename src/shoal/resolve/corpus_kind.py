"""Derive the kind of a corpus from its paths, where only these are set. Looks at the names of files in folders. No torch."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shoal.config.data_formats import DATASETS_FILES, Format, format_of, is_pattern, kind_of_paths, split_suffix
from shoal.config.keys import SOURCES
from shoal.errors import Problem
from shoal.resolve.recipe import Setting
from shoal.system.output import on_one_line

# Texts about a dataset, which every download from a hub has beside its data.
_ABOUT: Final = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|authors|changelog|changes|contributing|code_of_conduct|security|datasheet|"
    r"dataset_?card|requirements)([._-].*)?",
    re.IGNORECASE,
)
_NAMED_AT_MOST: Final = 5


def with_corpus(settings: dict[str, Setting], problems: list[Problem], notes: list[str]) -> dict[str, Setting]:
    """
    Return `settings`, with each source's corpus derived from its paths if only these are set; in a blend, not that of `data`.

    Adds a note on texts that are not read.
    """
    derived = {}
    is_blend = any(key.startswith(SOURCES) for key in settings)
    for key, paths in settings.items():
        source, _, option = key.rpartition(".")
        if is_blend and source == "data":
            continue
        if option == "paths" and f"{source}.corpus" not in settings and (names := paths.texts()):
            held_out = settings.get(f"{source}.val_paths", Setting("", [], "")).texts()
            kind, note = _kind(key, names, held_out, records=f"{source}.text_key" in settings)
            if not kind:
                problems.append(Problem(paths.where, note))
                continue
            notes += [note] if note else []
            derived[f"{source}.corpus"] = Setting(f"{source}.corpus", kind, f"{key} at {paths.where}")
    return settings | derived


def _kind(key: str, paths: list[str], val_paths: list[str], *, records: bool) -> tuple[str, str]:
    """
    Return the kind of a corpus, and a note on it; "" and the reason if the files in its folders leave several.

    records: whether the user named a field of records.
    """
    by_name = kind_of_paths(paths, val_paths)
    if by_name != "text":
        return by_name, ""
    found = _look(paths + val_paths)
    if not found.data or found.texts:
        ambiguous = (
            bool(found.data.keys() - {"json"}) and not records
        )  # json is beside code too: settings, not documents
        return ("", found.question(key)) if ambiguous else ("files" if records else "text", "")
    if len(found.data) > 1 and found.about:
        return ("files", "") if records else ("", found.question(key))
    kind = "files" if len(found.data) > 1 else next(iter(found.data))
    # a kind of its own, not `files`, so that texts about the data are not read as documents
    said = f"{key} has data files ({_counts(found.data)}), so {key.removesuffix('paths')}corpus is {kind}; not read: "
    return kind, f"{said}{_some(found.about)}" if found.about else ""


@dataclass
class _Found:
    """What the folders and patterns of a corpus have: data files by format, texts by suffix, and names of texts about the data."""

    data: Counter[Format] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    about: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count a file by its name."""
        form = format_of(name)
        if form == "text" and _ABOUT.fullmatch(Path(name).stem):
            self.about.append(name)
        elif form == "text":
            self.texts[split_suffix(name)[0]] += 1
        elif form is not None and name not in DATASETS_FILES:
            self.data[form] += 1

    def question(self, key: str) -> str:
        """Return the message that asks for the kind."""
        texts = _counts(self.texts) if self.texts else _some(self.about)
        kinds = ", ".join(self.data)
        return (
            f"{key} has data files ({_counts(self.data)}) and texts ({texts}); set {key.removesuffix('paths')}corpus to {kinds} "
            "for those files alone, text for the texts alone, or files for all"
        )


def _look(paths: list[str]) -> _Found:
    found = _Found()
    for path in paths:
        for name in _names(os.path.expanduser(path)):
            found.add(name)
    return found


def _names(path: str) -> Iterator[str]:
    """Yield the names of a folder's files, or of those that a pattern matches; a named file's own. Links to folders are not followed."""
    matches = is_pattern(path) and not os.path.lexists(path)
    for place in glob.iglob(path, recursive=True) if matches else [path]:
        if not os.path.isdir(place):
            yield os.path.basename(place)
        elif "**" not in path:  # the files in a folder match `**` themselves
            for _, folders, files in os.walk(place):
                folders[:] = [name for name in folders if not name.startswith(".")]
                yield from (name for name in files if not name.startswith("."))


def _counts(found: Counter[Format] | Counter[str]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in found.most_common())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_AT_MOST:,} more" if len(names) > _NAMED_AT_MOST else ""
    return ", ".join(map(on_one_line, sorted(names)[:_NAMED_AT_MOST])) + more
