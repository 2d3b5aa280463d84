"""
Fetches a model or a dataset from a hub to a folder, which is complete as soon as it exists; one process fetches at a time.
No torch.

models/OWNER/NAME/            the model; renamed into place once it is complete
models/OWNER/.NAME.partial/   an unfinished fetch, which the next one resumes
models/OWNER/.NAME.lock       held by the fetching process, across all nodes that see the folder
models/OWNER/.NAME.old/       the previous content, until it is removed

Datasets lie in datasets/OWNER/NAME/ in the same way.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.hub.data_repository import data_repository
from shoal.hub.find import check_name
from shoal.hub.model_repository import ModelRepository
from shoal.hub.record import DATASETS, MODELS, FileRecord, Record, load_record
from shoal.hub.repository import Repository
from shoal.system.disk import NoLocksError, replace_folder, sync, take_lock, write_whole

if TYPE_CHECKING:
    from shoal.hub.listing import RemoteFile
    from shoal.hub.transfer import Progress


def no_progress(phase: str, done_bytes: int, total_bytes: int) -> None:
    """Report nothing."""


def no_news(text: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Request:
    """A requested model or dataset."""

    repository: Repository
    folder: Path
    revision: str | None = None  # None: the revision already downloaded, or else main
    force: bool = False
    verify: bool = False

    @property
    def name(self) -> str:
        return self.repository.name

    def record_in(self, folder: Path) -> Path:
        """Return the path of the record of a fetch to `folder`."""
        return folder / self.repository.record


def fetch_model(
    name: str,
    *,
    to: Path | None = None,
    revision: str | None = None,
    force: bool = False,
    verify: bool = False,
    tell: Callable[[str], None] = no_news,
    progress: Progress = no_progress,
) -> Path:
    """
    Return the folder of a model, fetched if it is missing. Of several processes, one fetches and the others wait.

    After a kill at any moment, the next call resumes. `force` fetches again; the old folder remains until the new folder
    is complete. `verify` hashes existing files instead of comparing sizes. Raises `ModelError` if the model cannot be fetched,
    or if the folder holds something else.
    """
    check_name(name)
    folder = MODELS / name if to is None else to
    return _fetch_to(Request(ModelRepository(name), folder, revision, force, verify), tell, progress)


def fetch_data(
    name: str,
    *,
    to: Path | None = None,
    revision: str | None = None,
    force: bool = False,
    verify: bool = False,
    tell: Callable[[str], None] = no_news,
    progress: Progress = no_progress,
) -> Path:
    """
    Return the folder of a dataset, fetched if it is missing: a name of the catalog, or hf:OWNER/NAME.

    The options are those of `fetch_model`. Files that another name of the same repository fetched stay. Raises `DataError` if the
    dataset cannot be fetched, or if the folder holds something else.
    """
    repository = data_repository(name)
    folder = DATASETS / repository.name if to is None else to
    return _fetch_to(Request(repository, folder, revision, force, verify), tell, progress)


def _fetch_to(request: Request, tell: Callable[[str], None], progress: Progress) -> Path:
    """Return the requested folder, fetched if it is missing. Raises the repository's `error`."""
    folder, failed = request.folder, request.repository.error
    is_odd = folder.is_symlink() or folder.name in ("", "..")  # rename the folder itself, not a link to it
    request = replace(request, folder=folder.resolve() if is_odd else folder)
    try:
        if not request.force and _is_there(request, tell):  # works in a read-only folder too
            return folder
        _fetch_alone(request, tell, progress)
    except BrokenPipeError:  # the reader of standard output is gone
        raise
    except NoLocksError as error:
        raise failed(
            f"cannot lock {error.filename}: {error.strerror}; set --to to a folder on a disk that supports locks"
        ) from None
    except OSError as error:
        raise failed(
            f"cannot read or write {error.filename or folder}: {error.strerror or error}; {_cure(error)}"
        ) from error
    return folder


def _cure(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space or set --to to a folder on a larger disk; the same command then resumes the fetch"
    return "set --to to a writable folder"


def _fetch_alone(request: Request, tell: Callable[[str], None], progress: Progress) -> None:
    """Fetch under the lock, unless another process finished the fetch while this one waited."""
    folder = request.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    before = _stamp(request)
    with _lock(_aside(folder, "lock"), request.name, tell):
        partial = _aside(folder, "partial")
        if request.record_in(partial).exists():  # a complete fetch, killed before the rename
            _refuse_foreign(request)
            replace_folder(partial, folder)
        is_new = _stamp(request) != before
        if (is_new or not request.force) and _is_there(request, tell):
            return
        _refuse_foreign(request)
        _fetch(request, partial, tell, progress)


def _aside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _stamp(request: Request) -> tuple[int, int] | None:
    """Return a value that changes whenever a new folder is put in place."""
    try:
        status = request.record_in(request.folder).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def _lock(path: Path, name: str, tell: Callable[[str], None]) -> Iterator[None]:
    news = [f"waiting for another process, which fetches {name}"]

    def say_once() -> None:
        if news:
            tell(news.pop())

    with path.open("ab") as file:
        try:
            take_lock(file, say_once)
        except NoLocksError as error:
            error.filename = str(path)
            raise
        yield


# --- an existing folder ---------------------------------------------------------------------------------


def _is_there(request: Request, tell: Callable[[str], None]) -> bool:
    """Return whether the folder is what is requested, and complete. Raises the repository's `error` if it holds another one."""
    folder, repository = request.folder, request.repository
    record = load_record(folder)
    if record is None:
        return _was_put_by_hand(request, tell)
    other = _difference(request, record)
    if other and not request.force:
        again = f"{repository.command(folder)} --force replaces it, --to DIR fetches elsewhere"
        raise repository.error(f"{folder} holds {other}; {again}")
    if other:
        return False
    problem = record.missing(folder, hashes=request.verify)
    if problem:
        tell(f"{problem}; fetching that again")
        return False
    if not set(repository.patterns) <= set(record.patterns):
        return False  # files of this repository, but not all of the requested ones
    tell(f"{folder} is complete: {record.name} at {record.commit[:12]}")
    return True


def _difference(request: Request, record: Record) -> str:
    """Return how a fetched folder differs from the request; "" if it does not."""
    if record.name != request.name:
        return f"{record.name}, not {request.name}"
    if request.revision not in (None, record.revision, record.commit):
        return f"its revision {record.revision}, not {request.revision}"
    return ""


def _was_put_by_hand(request: Request, tell: Callable[[str], None]) -> bool:
    """
    Return whether the folder holds what is requested, although shoal did not fetch it.

    Raises the repository's `error` if that is broken, if the folder holds other files, or if `revision` or `verify` is
    requested, which need a record of the fetch.
    """
    folder, repository = request.folder, request.repository
    if request.record_in(folder).exists() or not _holds_something(folder):
        return False
    repository.check_by_hand(folder)
    asked = f"--revision {request.revision}" if request.revision else "--verify" if request.verify else ""
    if asked:
        raise repository.error(
            f"{folder} was not fetched by shoal, so {asked} has no record to compare with; --to DIR fetches it elsewhere"
        )
    tell(f"{folder} exists; shoal did not fetch it, so only its form is checked")
    return True


def _holds_something(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _refuse_foreign(request: Request) -> None:
    """
    Raise the repository's `error` if the folder holds files but no readable record of a fetch, or a visible file not in it.

    Such files are never removed.
    """
    folder, failed = request.folder, request.repository.error
    if not _holds_something(folder):
        return
    if not request.record_in(folder).exists():
        raise failed(
            f"{folder} was not fetched by shoal, so --force does not replace it; move it away, or set --to to another folder"
        )
    record = load_record(folder)
    if record is None:
        raise failed(
            f"{request.record_in(folder)} is damaged, so shoal cannot tell which files it fetched; move {folder} away, or set --to to "
            "another folder"
        )
    for name in sorted(_files_below(folder)):
        if name not in {request.repository.record, *record.files} and not any(
            part.startswith(".") for part in name.split("/")
        ):
            raise failed(f"{folder / name} was not fetched by shoal and would be lost; move it away first")


def _files_below(folder: Path) -> Iterator[str]:
    """Yield the path below `folder` of each file in it, and of each link."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


# --- the fetch -------------------------------------------------------------------------------------------


def _fetch(request: Request, partial: Path, tell: Callable[[str], None], progress: Progress) -> None:
    from shoal.hub.remote import look_up
    from shoal.hub.transfer import Transfer
    from shoal.system.disk import gigabytes

    folder = request.folder
    repository, revision, commit = _beside_earlier(request)
    remote = look_up(repository, commit or revision, folder)
    partial.mkdir(exist_ok=True)
    transfer = Transfer(repository, remote, folder, partial, progress)

    def bring(file: RemoteFile) -> Path:
        transfer.start([file])
        transfer.bring(file)
        return partial / file.name

    wanted = sorted(set(repository.choose(remote, bring)), key=lambda f: f.name)
    transfer.start(wanted)
    size = gigabytes(transfer.total_bytes)
    count = f"{len(wanted)} files, {size} to {folder}{repository.remark(remote)}"
    tell(f"fetching {remote.name} at {remote.commit[:12]}: {count}")
    files = {file.name: FileRecord(file.bytes, transfer.bring(file)) for file in wanted}
    _keep_only(partial, files)
    repository.check_fetched(remote, partial)
    _sync_folders(partial)
    record = Record(request.name, revision, remote.commit, files, repository.patterns)
    write_whole(request.record_in(partial), [record.to_json()])
    replace_folder(partial, folder)
    tell(f"{folder} is complete: {remote.name} at {remote.commit[:12]}")


def _beside_earlier(request: Request) -> tuple[Repository, str, str | None]:
    """
    Return what to fetch, its revision, and its commit if that is given.

    Files of an earlier fetch of other patterns stay; without `force`, the commit is theirs, so that all files are of one commit.
    """
    record = load_record(request.folder)
    if record is None or record.name != request.name or not record.patterns:
        return request.repository, request.revision or "main", None
    both = request.repository.with_patterns(record.patterns)
    if request.force:
        return both, request.revision or record.revision, None
    return both, record.revision, record.commit


def _keep_only(folder: Path, names: Container[str]) -> None:
    """Remove files that are not among `names`, left by the fetch of an earlier commit, and folders without files."""
    for name in list(_files_below(folder)):
        if name not in names:
            (folder / name).unlink()
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            path.rmdir()


def _sync_folders(folder: Path) -> None:
    """Flush the names of all files below `folder` to disk."""
    for path in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)
