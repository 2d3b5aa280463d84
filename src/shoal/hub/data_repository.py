"""The files of a dataset that `shoal fetch data` downloads: records and text, its card, its license. No code. No torch."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from shoal.errors import DataError, ShoalError
from shoal.hub.catalog import CATALOG, close_datasets
from shoal.hub.find import could_be_on_a_hub
from shoal.hub.listing import Remote, RemoteFile
from shoal.hub.record import DATA_RECORD, DATASETS

FROM_HUB: Final = "hf:"
BESIDE: Final = ("README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
_FORMATS = ("parquet", "arrow", "jsonl", "json", "csv", "tsv", "txt")
_PACKED = ("", ".gz", ".zst", ".xz")
# Every file that may hold records or text, for a dataset that is not in the catalog.
ALL_DATA: Final = tuple(f"*.{name}{packed}" for name in _FORMATS for packed in _PACKED)
# Descriptions of a dataset, not records.
_NOT_DATA: Final = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")
NAMED_AT_MOST = 8


@dataclass(frozen=True)
class DataRepository:
    """A dataset on a hub, as `shoal fetch data` names it."""

    asked: str  # "tinystories", or "hf:OWNER/NAME"
    name: str
    patterns: tuple[str, ...]
    license: str = ""  # for a repository whose card states none
    kind: Literal["model", "dataset"] = "dataset"
    record: str = DATA_RECORD
    error: type[ShoalError] = DataError

    def command(self, folder: Path) -> str:
        there = "" if folder == DATASETS / self.name else f" --to {folder}"
        return f"shoal fetch data {self.asked}{there}"

    def by_hand(self, folder: Path) -> str:
        files = "the data files" if self.patterns == ALL_DATA else _and(self.patterns)
        return (
            f"without a network, put {files} of the dataset {self.name}, with its README.md, into {folder}, in the same "
            "subfolders"
        )

    def no_name(self) -> str:
        return f"{self.name!r} is not a dataset's name; use OWNER/NAME, as shown on the dataset's page on the hub"

    def close_names(self) -> list[str]:
        there = {path.as_posix(): f"{FROM_HUB}{path}" for path in _there()}
        near = difflib.get_close_matches(self.name, there)
        return [*close_datasets(self.name), *(there[name] for name in near)]

    def with_patterns(self, patterns: tuple[str, ...]) -> DataRepository:
        return replace(self, patterns=tuple(dict.fromkeys((*patterns, *self.patterns))))

    def choose(self, remote: Remote, bring: Callable[[RemoteFile], Path]) -> list[RemoteFile]:
        lacking = [p for p in self.patterns if not _matches(remote.files, p)]
        data = {name for p in self.patterns for name in _matches(remote.files, p)}
        if not data:
            raise DataError(_no_data(self.name, remote.files))
        if lacking and not set(ALL_DATA) <= set(self.patterns):
            raise DataError(
                f"{self.name} has no {lacking[0]} any more; {FROM_HUB}{self.name} fetches all of its data files"
            )
        return [remote.files[name] for name in sorted({*data, *(n for n in BESIDE if n in remote.files)})]

    def remark(self, remote: Remote) -> str:
        return f"; license: {remote.license or self.license or 'not stated'}"

    def check_fetched(self, remote: Remote, folder: Path) -> None:
        """Nothing to check: the hub states the hash of every file."""

    def check_by_hand(self, folder: Path) -> None:
        names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        lacking = [p for p in self.patterns if not _matches(names, p)]
        if self.patterns == ALL_DATA and len(lacking) < len(ALL_DATA):
            return
        if lacking:
            missing = "data files" if self.patterns == ALL_DATA else _and(lacking)
            raise DataError(
                f"{folder} has no {missing} of {self.name}, and shoal did not fetch it; put that there, or set --to to "
                "another folder"
            )


def data_repository(asked: str) -> DataRepository:
    """Return the repository that a name of `shoal fetch data` means. Raises DataError, with close names, if there is none."""
    if asked in CATALOG:
        dataset = CATALOG[asked]
        return DataRepository(asked, dataset.repository, dataset.patterns, dataset.license)
    name = asked.removeprefix(FROM_HUB)
    if asked.startswith(FROM_HUB) and could_be_on_a_hub(name) and "/" in name:
        return DataRepository(asked, name, ALL_DATA)
    if asked.startswith(FROM_HUB):
        raise DataError(
            f"{asked!r} is not a dataset's name; use {FROM_HUB}OWNER/NAME, as on the dataset's page on the hub"
        )
    near = close_datasets(asked)
    if could_be_on_a_hub(asked) and "/" in asked:
        near.insert(0, f"{FROM_HUB}{asked}")
    meant = f"; did you mean {' or '.join(near)}?" if near else "."
    raise DataError(
        f"there is no dataset {asked!r}{meant} Known: {', '.join(CATALOG)}, and {FROM_HUB}OWNER/NAME for any on the hub"
    )


def _there() -> list[Path]:
    """Return the names of the datasets under `datasets/`."""
    return sorted(p.relative_to(DATASETS) for p in DATASETS.glob("*/*") if p.is_dir() and not p.name.startswith("."))


def _matches(names: Iterable[str], pattern: str) -> list[str]:
    """Return the data files that match a pattern; no hidden ones, and no descriptions of a dataset."""
    return [
        name
        for name in names
        if fnmatch.fnmatchcase(name, pattern)
        and name.rpartition("/")[2] not in _NOT_DATA
        and not any(part.startswith(".") for part in name.split("/"))
    ]


def _no_data(name: str, files: Iterable[str]) -> str:
    scripts = [f for f in files if f == f"{name.rpartition('/')[2]}.py"]
    if scripts:
        return (
            f"{name} has only a loading script ({scripts[0]}), which shoal does not run; look for a copy in Parquet, or try "
            "the hub's own: --revision refs/convert/parquet"
        )
    return f"{name} has no data files ({', '.join(_FORMATS)}, plain or .gz, .zst, .xz); look for a copy that has them"


def _and(names: Sequence[str]) -> str:
    shown = [*names[:NAMED_AT_MOST], *(["..."] if len(names) > NAMED_AT_MOST else [])]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
