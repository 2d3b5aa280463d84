"""
A corpus read by Hugging Face's library `datasets`: by its name on the hub, or from a folder. No torch.

The library reads rows; shoal keeps its own position, the number of the next row. The library's own state of a stream is not
used: restored twice, it began again at the first row (datasets#8308).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.config.data_options import Source
from shoal.data.corpus.documents import START, CorpusFile, Cursor, Document, Skipped
from shoal.data.corpus.downloads import Progress, no_progress
from shoal.data.corpus.records import Shape, check_columns
from shoal.errors import DataError, ModelError
from shoal.hub.find import could_be_on_a_hub, find_path, near_path
from shoal.hub.record import DATASETS
from shoal.system.output import on_one_line

ROWS: Final = 256  # read at once, to bound memory
CAUSE_CHARACTERS: Final = 300  # maximum length of the library's own text in a message
SAVED: Final = ("state.json", "dataset_dict.json")  # of `save_to_disk`: one split, and a folder a split


@dataclass(frozen=True)
class _Rows:
    """An opened dataset: rows by number, or a stream; what identifies its content; its text in bytes, 0 if unknown."""

    table: Any
    fingerprint: str
    bytes: int
    is_stream: bool


class HubDatasetCorpus:
    """
    The rows of one split of a dataset, as one file of a corpus.

    tell: reports that a name is looked up on the hub; None: it is not looked up. Raises DataError if there is no such dataset, configuration, split or column, if
    only code could read it, or if the library is not installed.
    """

    held_out_files = 0

    def __init__(self, source: Source, shape: Shape, tell: Progress | None = no_progress) -> None:
        [given] = source.paths
        self._shape = shape
        self._name = ":".join(filter(None, [given, source.subset, source.split]))
        self._rows = _open(source, _place(given, tell), self._name)
        check_columns(self._rows.table.column_names or [shape.key], shape, self._name)

    def listing(self) -> list[CorpusFile]:
        """Return the split as one file; its fingerprint, as a number, replaces the time of change."""
        changed = int.from_bytes(hashlib.blake2b(self._rows.fingerprint.encode(), digest_size=7).digest())
        return [CorpusFile(self._name, self._rows.bytes, changed)]

    def digest(self, index: int) -> str:
        """Return a hash of the rows; of a stream, whose rows would have to be downloaded again, its fingerprint."""
        if self._rows.is_stream:
            return self._rows.fingerprint
        content = hashlib.blake2b(digest_size=16)
        for _, row in self._records(0):
            content.update(json.dumps(row, default=str, ensure_ascii=False).encode(errors="surrogatepass"))
        return content.hexdigest()

    def read(self, start: Cursor = START) -> Iterator[Document | Skipped]:
        """Yield a document or a skipped record for each row from `start` on. Raises DataError if a row cannot be read."""
        for number, row in self._records(start.document):
            yield self._shape.document(row, f"{self._name} row {number}", self._after(number))

    def skipped_files(self) -> Mapping[str, int]:
        return {}

    def _after(self, number: int) -> Cursor:
        """Return the cursor after a row. Its offset is the row's share of the bytes, since rows have no place in bytes."""
        rows = 0 if self._rows.is_stream else len(self._rows.table)
        return Cursor(0, number + 1, self._rows.bytes * (number + 1) // rows if rows else number + 1)

    def _records(self, start: int) -> Iterator[tuple[int, Any]]:
        """Yield (number, row) from row `start` on."""
        rows = self._rows.table
        if self._shape.columns is not None and rows.column_names is not None:
            rows = rows.select_columns(list(self._shape.columns))
        number = start
        try:
            for row in rows.skip(start) if self._rows.is_stream else _in_batches(rows, start):
                yield number, row
                number += 1
        except (OSError, ValueError, RuntimeError) as error:  # of a lost connection, or of a damaged file
            raise DataError(
                f"cannot read row {number:,} of {on_one_line(self._name)} ({type(error).__name__}); if the connection was lost, the "
                "same command continues after the last shard"
            ) from error


def _in_batches(table: Any, start: int) -> Iterator[dict[str, Any]]:
    for begin in range(start, len(table), ROWS):
        columns = table[begin : begin + ROWS]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _place(given: str, tell: Progress | None) -> Path | None:
    """Return the folder that `given` names: itself, or what `shoal fetch data` made; None if it is a name on the hub."""
    try:
        path = find_path(given) or find_path(str(DATASETS / given))
    except ModelError as error:
        raise DataError(f"{error}; correct data.paths") from error
    if path is not None and not path.is_dir():
        raise DataError(f"{on_one_line(given)} is a file, not a dataset's folder; set data.corpus to files")
    if path is None and not could_be_on_a_hub(given):
        raise DataError(
            f"there is no folder {on_one_line(given)}{near_path(given)}, and a dataset on the hub is named OWNER/NAME; correct data.paths"
        )
    if path is None and tell is None:
        raise DataError(f"{given} is on the hub, which is not asked again")
    if path is None and tell is not None:
        tell(f"there is no folder {given}{near_path(given)}, so the hub is asked for it", 0, 0)
    return path


def _open(source: Source, folder: Path | None, name: str) -> _Rows:
    datasets = _library()
    if folder is not None and any((folder / saved).is_file() for saved in SAVED):
        return _open_saved(datasets, source, folder, name)
    where = source.paths[0] if folder is None else str(folder)
    try:
        builder = datasets.load_dataset_builder(where, source.subset)
        table = datasets.load_dataset(where, source.subset, split=source.split, streaming=source.streaming)
    except Exception as error:
        raise _no_dataset(datasets, source, where, error) from error
    made_from = "/".join(Path(builder.cache_dir).parts[-4:])  # name, configuration, version, hash of the content
    size = 0 if source.streaming else int(table.data.nbytes)
    return _Rows(table, f"{made_from}:{source.split}", size, source.streaming)


def _open_saved(datasets: Any, source: Source, folder: Path, name: str) -> _Rows:
    """Open what `save_to_disk` wrote: one split, or several by name."""
    if source.subset is not None:
        raise DataError(f"{on_one_line(folder)} was saved by save_to_disk, so data.subset has no effect; remove it")
    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(
            f"{on_one_line(folder)} is damaged ({type(error).__name__}); save it again, or correct data.paths"
        ) from error
    splits = table
    if not isinstance(table, datasets.DatasetDict):  # one split, which `train`, the default, means too
        splits = {"train": table, str(table.split or "train"): table}
    table = _part(datasets, source, folder, splits)
    files = [Path(file["filename"]) for file in table.cache_files]
    made_from = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _Rows(table, f"{made_from}:{source.split}", int(table.data.nbytes), False)


def _part(datasets: Any, source: Source, folder: Path, splits: Mapping[str, Any]) -> Any:
    """Return a split, or parts of splits such as `train[:10%]`, of a folder that `save_to_disk` wrote."""
    try:
        asked = datasets.ReadInstruction.from_spec(source.split)
        parts = asked.to_absolute({name: len(table) for name, table in splits.items()})
    except (ValueError, AssertionError) as error:
        raise DataError(_unknown(_split_option(source), source.split, folder, list(splits))) from error
    tables = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def _library() -> Any:
    """Return the library. The folder `datasets/` beside a run is importable too, so a class of the library is asked for."""
    try:
        import datasets
        from datasets import DatasetDict  # noqa: F401
    except ImportError:
        raise DataError("data.corpus datasets needs Hugging Face's library: pip install 'shoal[data]'") from None
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # which warns of a card without metadata
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    return datasets


def _no_dataset(datasets: Any, source: Source, where: str, error: Exception) -> DataError:
    """Return the reason why a dataset cannot be opened, and what to do. The library's text may have a URL."""
    name = on_one_line(where)
    if "script" in str(error):
        return DataError(
            f"{name} is read by a Python script, which the library `datasets` no longer runs; look for a copy in Parquet, or try "
            "`shoal fetch data hf:OWNER/NAME --revision refs/convert/parquet`"
        )
    unreachable = "LocalEntryNotFoundError" in str(
        error
    )  # the library's name for a file that is neither on a hub nor cached
    if isinstance(error, FileNotFoundError) and not unreachable:
        return DataError(
            f"there is no dataset {name}, it is private, or it has no data files; correct data.paths, or set HF_TOKEN"
        )
    if isinstance(error, OSError):
        return DataError(
            f"there is no folder {name}{near_path(where)}, and the hub cannot be reached ({type(error).__name__}); on a machine with a network, run "
            f"`shoal fetch data hf:{name}`, and copy its folder to {DATASETS / where}"
        )
    if isinstance(error, ValueError):
        return _bad_choice(datasets, source, where) or DataError(
            f"the library `datasets` cannot read {name}: {on_one_line(error)}"
        )
    cause = error.__cause__ or error
    what = on_one_line(cause)[:CAUSE_CHARACTERS] if Path(where).is_dir() else type(cause).__name__
    return DataError(f"the library `datasets` cannot read {name}: {what}; correct data.paths")


def _bad_choice(datasets: Any, source: Source, where: str) -> DataError | None:
    """Return the error for an unknown configuration or split, naming those there are; None if both exist."""
    try:
        subsets = datasets.get_dataset_config_names(where)
        if source.subset is None and len(subsets) > 1:
            return DataError(
                f"{on_one_line(where)} has several subsets; set data.subset to one of {', '.join(subsets)}"
            )
        if source.subset is not None and source.subset not in subsets:
            return DataError(_unknown("subset", source.subset, where, subsets))
        splits = datasets.get_dataset_split_names(where, source.subset)
        return (
            None if source.split in splits else DataError(_unknown(_split_option(source), source.split, where, splits))
        )
    except (OSError, ValueError, RuntimeError):
        return None


def _split_option(source: Source) -> str:
    """Return the option of the split that is read: the held-out split is opened as a source whose `split` it is."""
    return "val_split" if source.split == source.val_split else "split"


def _unknown(option: str, given: str, where: object, there: list[str]) -> str:
    what = option.removeprefix("val_")
    return f"{on_one_line(where)} has no {what} {given!r}; set data.{option} to one of {', '.join(map(on_one_line, there))}"
