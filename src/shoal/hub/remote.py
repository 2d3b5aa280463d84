"""A hub: its listing and its files. Every failure of the hub or the network is the repository's `error`. No torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants, get_session, hf_hub_url, hf_raise_for_status
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported, but at run time only

from shoal import __version__
from shoal.hub.listing import Remote, RemoteFile
from shoal.hub.repository import Repository
from shoal.system.output import on_one_line
from shoal.system.secrets import without_password

# The base error of huggingface_hub's HTTP library: httpx before version 2, httpx2 since.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without receiving a byte
FRUITLESS_TRIES = 3  # consecutive connections without data
PAUSE_SECONDS = 1.0  # after such a connection


def look_up(repository: Repository, revision: str, folder: Path) -> Remote:
    """
    Return the hub's listing of a repository. folder: the destination, for messages.

    Raises the repository's `error` if the hub cannot be reached, denies access, or does not have it.
    """
    name = repository.name
    try:
        with _explained(repository, revision, folder):
            hub = HfApi(library_name="shoal", library_version=__version__)
            look = hub.model_info if repository.kind == "model" else hub.dataset_info
            info = look(name, revision=revision, files_metadata=True, timeout=CONNECT_SECONDS)
            return _remote(repository, info)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # a proxy's page, or a malformed token
        raise repository.error(
            f"{_endpoint()} does not answer for {name} as a hub does ({type(error).__name__}); check HF_ENDPOINT, "
            f"HF_TOKEN and the proxy; {repository.by_hand(folder)}"
        ) from None


def download(
    repository: Repository, commit: str, file: RemoteFile, part: Path, folder: Path, advance: Callable[[int], None]
) -> None:
    """
    Download `file` to `part`, resuming at the end of `part`, also after a lost connection.

    `advance` is called with the number of bytes received, negative for bytes to fetch again. Raises the repository's `error`
    if the hub does not send the whole file, `OSError` if `part` cannot be written.
    """
    fruitless = 0
    while (start := _size(part)) < file.bytes:
        with _explained(repository, commit, folder):
            try:
                _stream(repository, commit, file, part, start, advance)
            except HTTP_ERROR as error:
                if not _may_pass(error) or fruitless + 1 >= FRUITLESS_TRIES:
                    raise
        if _size(part) > start:
            fruitless = 0
            continue
        fruitless += 1
        if fruitless >= FRUITLESS_TRIES:
            raise repository.error(f"the hub sends no data of {repository.name}'s {file.name}; try again later")
        time.sleep(PAUSE_SECONDS)


def _stream(
    repository: Repository, commit: str, file: RemoteFile, part: Path, start: int, advance: Callable[[int], None]
) -> None:
    headers = build_hf_headers(library_name="shoal", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # uncompressed: to resume, the bytes received are counted
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hf_hub_url(repository.name, file.name, repo_type=repository.kind, revision=commit)
    timeout = (CONNECT_SECONDS, READ_SECONDS, READ_SECONDS, READ_SECONDS)
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response, part.open("ab") as out:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # the hub ignored the range
            out.truncate(0)
            advance(-start)
            start = 0
        for chunk in response.iter_bytes():
            start += len(chunk)
            if start > file.bytes:
                raise repository.error(
                    f"the hub sends more of {repository.name}'s {file.name} than its stated {file.bytes:,} bytes"
                )
            out.write(chunk)
            advance(len(chunk))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _remote(repository: Repository, info: ModelInfo | DatasetInfo) -> Remote:
    name = repository.name
    if not info.sha or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise repository.error(f"{_endpoint()} states no commit of {name}; check that HF_ENDPOINT is a hub")
    files = {}
    for file in info.siblings or []:
        path = PurePosixPath(file.rfilename)
        if path.is_absolute() or ".." in path.parts or "\\" in file.rfilename or not path.name:
            raise repository.error(f"rejected: {name} has a file named {file.rfilename!r}, which is outside its folder")
        files[file.rfilename] = _remote_file(repository, file)
    return Remote(name, info.sha, files, _license(info))


def _remote_file(repository: Repository, file: RepoSibling) -> RemoteFile:
    size, sha256 = (file.lfs.size, file.lfs.sha256) if file.lfs else (file.size, None)
    if type(size) is not int or size < 0 or not (sha256 or file.blob_id):
        raise repository.error(
            f"{_endpoint()} states no size and hash of {repository.name}'s {file.rfilename}, so it cannot be verified; "
            "check HF_ENDPOINT"
        )
    return RemoteFile(file.rfilename, size, sha256, None if sha256 else file.blob_id)


def _license(info: ModelInfo | DatasetInfo) -> str:
    """Return the license that a repository's card states, such as "cc-by-4.0"; several are joined."""
    said = getattr(info.card_data, "license", None)
    return on_one_line(", ".join(map(str, said)) if isinstance(said, list) else said or "")


def _endpoint() -> str:
    """Return HF_ENDPOINT without a user name and password."""
    return without_password(constants.ENDPOINT)


# --- errors -------------------------------------------------------------------------------------


@contextmanager
def _explained(repository: Repository, revision: str, folder: Path) -> Iterator[None]:
    """Translate errors of huggingface_hub, without quoting their text, which may contain a request's header."""
    name, kind = repository.name, repository.error
    try:
        yield
    except OfflineModeIsEnabled:
        raise kind(f"HF_HUB_OFFLINE is set, so {name} cannot be fetched; {repository.by_hand(folder)}") from None
    except HFValidationError:
        raise kind(repository.no_name()) from None
    except HfHubHTTPError as error:
        raise kind(_answer(error, repository, revision)) from None
    except HTTP_ERROR as error:
        raise kind(
            f"cannot reach {_endpoint()} for {name} ({type(error).__name__}); later, the same command resumes the "
            f"fetch; {repository.by_hand(folder)}"
        ) from None


def _answer(error: HfHubHTTPError, repository: Repository, revision: str) -> str:
    """Return the meaning of the hub's error, and what to do."""
    name, what = repository.name, repository.kind
    page = f"{_endpoint()}/{'' if what == 'model' else 'datasets/'}{name}"
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{name} is only for users who accepted its terms ({status}): accept them at {page}, and set HF_TOKEN to your token"
    if isinstance(error, RepositoryNotFoundError):
        close = repository.close_names()
        known = "which is on this machine" if what == "model" else "which shoal knows"
        meant = f"is it {' or '.join(close)}, {known}? " if close else ""
        return (
            f"the hub has no {what} {name}, or it is private ({status}): {meant}the name is OWNER/NAME; "
            f"for a private {what} set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision} (404); {page}/tree/main lists its branches"
    if status in (401, 403):
        return f"the hub denies access to {name} ({status}): set HF_TOKEN to a token that may read it, and see {page}"
    if status == 404:
        return f"the hub no longer has a file of {name} that it listed (404); try again"
    if status == 429:
        return f"too many requests to the hub ({status}); wait some minutes, or set HF_TOKEN for a higher limit"
    if status < 500:
        return f"the hub rejects the request for {name} ({status}); see {page}"
    return f"the hub has an error of its own for {name} ({status}); try again later"


def _may_pass(error: Exception) -> bool:
    """Return whether a retry may succeed: after a lost connection, or a server error (5xx)."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code >= 500
