"""
Fetches a model from a hub to a folder, which is complete as soon as it exists; one process fetches at a time. No torch.

models/OWNER/NAME/            the model; renamed into place once it is complete
models/OWNER/.NAME.partial/   an unfinished fetch, which the next one resumes
models/OWNER/.NAME.lock       held by the fetching process, across all nodes that see the folder
models/OWNER/.NAME.old/       the previous content, until it is removed
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import ModelError
from shoal.hub.find import check_name
from shoal.hub.folder import CONFIG, INDEX, PICKLES, SINGLE, WHY_NO_PICKLES, ModelFolder, shard_names
from shoal.hub.header import parse_object
from shoal.hub.record import MODELS, RECORD, FileRecord, Record, fetch_command, load_record
from shoal.system.disk import NoLocksError, replace_folder, sync, take_lock, write_whole

if TYPE_CHECKING:
    from shoal.hub.remote import Remote, RemoteFile
    from shoal.hub.transfer import Progress

# Files beside the weights: config, tokenizer, chat template, license. No code.
WANTED = (
    "*.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "*.jinja",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md", "README.md",
)  # fmt: skip


def no_progress(phase: str, done_bytes: int, total_bytes: int) -> None:
    """Report nothing."""


def no_news(text: str) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Request:
    """A requested model."""

    name: str
    folder: Path
    revision: str | None = None  # None: the revision already downloaded, or else main
    force: bool = False
    verify: bool = False


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
    is_odd = folder.is_symlink() or folder.name in ("", "..")  # rename the folder itself, not a link to it
    request = Request(name, folder.resolve() if is_odd else folder, revision, force, verify)
    try:
        if not force and _is_there(request, tell):  # works in a read-only folder too
            return folder
        _fetch_alone(request, tell, progress)
    except BrokenPipeError:  # the reader of standard output is gone
        raise
    except NoLocksError as error:
        raise ModelError(
            f"cannot lock {error.filename}: {error.strerror}; set --to to a folder on a disk that supports locks"
        ) from None
    except OSError as error:
        raise ModelError(
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
    before = _stamp(folder)
    with _lock(_aside(folder, "lock"), request.name, tell):
        partial = _aside(folder, "partial")
        if (partial / RECORD).exists():  # a complete fetch, killed before the rename
            _refuse_foreign(folder)
            replace_folder(partial, folder)
        is_new = _stamp(folder) != before
        if (is_new or not request.force) and _is_there(request, tell):
            return
        _refuse_foreign(folder)
        _fetch(request, partial, tell, progress)


def _aside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Return a value that changes whenever a new folder is put in place."""
    try:
        status = (folder / RECORD).stat()
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
    """Return whether the folder is the requested model, and complete. Raises `ModelError` if it holds another model."""
    folder = request.folder
    record = load_record(folder)
    if record is None:
        return _was_put_by_hand(request, tell)
    other = _difference(request, record)
    if other and not request.force:
        again = f"{fetch_command(request.name, folder)} --force replaces it, --to DIR fetches elsewhere"
        raise ModelError(f"{folder} holds {other}; {again}")
    if other:
        return False
    problem = record.missing(folder, hashes=request.verify)
    if problem:
        tell(f"{problem}; fetching that again")
        return False
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
    Return whether the folder holds a model that shoal did not fetch.

    Raises `ModelError` if that model is broken, if the folder holds other files, or if `revision` or `verify` is requested,
    which need a record of the fetch.
    """
    folder = request.folder
    if (folder / RECORD).exists() or not _holds_something(folder):
        return False
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} holds something else: it has no {CONFIG}; set --to to another folder")
    ModelFolder.open(folder)
    asked = f"--revision {request.revision}" if request.revision else "--verify" if request.verify else ""
    if asked:
        raise ModelError(
            f"{folder} was not fetched by shoal, so {asked} has no record to compare with; --to DIR fetches it elsewhere"
        )
    tell(f"{folder} exists; shoal did not fetch it, so only its form is checked")
    return True


def _holds_something(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _refuse_foreign(folder: Path) -> None:
    """
    Raise `ModelError` if the folder holds files but no readable record of a fetch, or a visible file that is not in it.

    Such files are never removed.
    """
    if not _holds_something(folder):
        return
    if not (folder / RECORD).exists():
        raise ModelError(
            f"{folder} was not fetched by shoal, so --force does not replace it; move it away, or set --to to another folder"
        )
    record = load_record(folder)
    if record is None:
        raise ModelError(
            f"{folder / RECORD} is damaged, so shoal cannot tell which files it fetched; move {folder} away, or set --to to "
            "another folder"
        )
    for path in sorted(folder.iterdir()):
        if path.name not in {RECORD, *record.files} and not path.name.startswith("."):
            raise ModelError(f"{path} was not fetched by shoal and would be lost; move it away first")


# --- the fetch -------------------------------------------------------------------------------------------


def _fetch(request: Request, partial: Path, tell: Callable[[str], None], progress: Progress) -> None:
    from shoal.hub.remote import look_up
    from shoal.hub.transfer import Transfer
    from shoal.system.disk import gigabytes

    folder = request.folder
    revision = request.revision or "main"
    remote = look_up(request.name, revision, folder)
    beside, weights = _choose(remote)
    partial.mkdir(exist_ok=True)
    transfer = Transfer(remote, folder, partial, progress)
    if weights[0].name == INDEX:  # the small file that lists the others
        transfer.start(weights)
        transfer.bring(weights[0])
        weights = [weights[0], *_shards(remote, partial / INDEX)]
    wanted = sorted({*beside, *weights}, key=lambda f: f.name)
    transfer.start(wanted)
    tell(
        f"fetching {remote.name} at {remote.commit[:12]}: {len(wanted)} files, {gigabytes(transfer.total_bytes)} to {folder}"
    )
    files = {file.name: FileRecord(file.bytes, transfer.bring(file)) for file in wanted}
    _keep_only(partial, files)
    _check_form(remote, partial)
    sync(partial)
    write_whole(partial / RECORD, [Record(request.name, revision, remote.commit, files).to_json()])
    replace_folder(partial, folder)
    tell(f"{folder} is complete: {remote.name} at {remote.commit[:12]}")


def _choose(remote: Remote) -> tuple[list[RemoteFile], list[RemoteFile]]:
    """
    Return the files beside the weights, and the weights: one file, or the index.

    Raises `ModelError` if the hub's model lacks config.json or weights in safetensors files.
    """
    top = {name: file for name, file in remote.files.items() if "/" not in name and name != RECORD}
    beside = [
        f for n, f in top.items() if any(fnmatch.fnmatchcase(n, w) for w in WANTED) and not n.endswith(".index.json")
    ]
    found = [name for name in top if name.endswith(".safetensors")]
    if SINGLE in found:
        weights = SINGLE
    elif INDEX in top:
        weights = INDEX
    elif len(found) == 1:
        weights = found[0]
    else:
        raise ModelError(_no_weights(remote.name, found, top))
    if CONFIG not in top:
        raise ModelError(f"{remote.name} has no {CONFIG}, which describes its weights; look for a model that has one")
    return beside, [top[weights]]


def _no_weights(name: str, found: list[str], files: Iterable[str]) -> str:
    if found:
        return f"{name} has {len(found)} *.safetensors and no {INDEX} that lists their tensors"
    pickles = sorted(f for f in files if any(fnmatch.fnmatchcase(f, pattern) for pattern in PICKLES))
    if not pickles:
        return f"{name} has no *.safetensors; look for a model that has them"
    return (
        f"{name} has only pickled weights ({pickles[0]}): {WHY_NO_PICKLES}; look for a copy with *.safetensors, or for "
        "a pull request on its page that adds them, fetched with --revision refs/pr/N"
    )


def _shards(remote: Remote, index: Path) -> list[RemoteFile]:
    """Return the files that an index names. Raises `ModelError` if the hub lacks one."""
    try:
        names = sorted(set(shard_names(parse_object(index.read_bytes()), index).values()))
    except ValueError as error:
        raise ModelError(f"the {INDEX} of {remote.name} {error}") from None
    absent = [name for name in names if name not in remote.files]
    if absent:
        raise ModelError(f"{remote.name} lacks {absent[0]}, which its {INDEX} names; it is incomplete on the hub")
    return [remote.files[name] for name in names]


def _check_form(remote: Remote, partial: Path) -> None:
    try:
        ModelFolder.open(partial)
    except ModelError as error:
        raise ModelError(f"{remote.name} is broken on the hub: {error}") from None


def _keep_only(folder: Path, names: Iterable[str]) -> None:
    """Remove files that are not among `names`, left by the fetch of an earlier commit."""
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
