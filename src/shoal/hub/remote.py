"""A model hub: its listing and its files. Every failure of the hub or the network is a `ModelError`. No torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, ModelInfo, constants, get_session, hf_hub_url, hf_raise_for_status
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
from shoal.errors import ModelError
from shoal.hub.find import by_hand, close_names, no_name
from shoal.system.secrets import without_password

# The base error of huggingface_hub's HTTP library: httpx before version 2, httpx2 since.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without receiving a byte
FRUITLESS_TRIES = 3  # consecutive connections without data
PAUSE_SECONDS = 1.0  # after such a connection


@dataclass(frozen=True)
class RemoteFile:
    """A file in the hub's listing, with one of the two hashes."""

    name: str
    bytes: int
    sha256: str | None  # of a file in Git LFS
    git_sha1: str | None  # of the blob, for a file in git itself

    @property
    def hash(self) -> str:
        """The hash of the content: the SHA-256 if the hub states it, else git's."""
        return self.sha256 or self.git_sha1 or ""


@dataclass(frozen=True)
class Remote:
    """A model at a commit of its repository."""

    name: str
    commit: str
    files: Mapping[str, RemoteFile]


def look_up(name: str, revision: str, folder: Path) -> Remote:
    """
    Return the hub's listing of `name`. folder: the destination, for messages.

    Raises `ModelError` if the hub cannot be reached, denies access, or does not have the model.
    """
    try:
        with _explained(name, revision, folder):
            info = HfApi(library_name="shoal", library_version=__version__).model_info(
                name, revision=revision, files_metadata=True, timeout=CONNECT_SECONDS
            )
            return _remote(name, info)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # a proxy's page, or a malformed token
        raise ModelError(
            f"{_endpoint()} does not answer for {name} as a hub does ({type(error).__name__}); check HF_ENDPOINT, "
            f"HF_TOKEN and the proxy; {by_hand(name, folder)}"
        ) from None


def download(remote: Remote, file: RemoteFile, part: Path, folder: Path, advance: Callable[[int], None]) -> None:
    """
    Download `file` to `part`, resuming at the end of `part`, also after a lost connection.

    `advance` is called with the number of bytes received, negative for bytes to fetch again. Raises `ModelError` if the hub
    does not send the whole file, `OSError` if `part` cannot be written.
    """
    fruitless = 0
    while (start := _size(part)) < file.bytes:
        with _explained(remote.name, remote.commit, folder):
            try:
                _stream(remote, file, part, start, advance)
            except HTTP_ERROR as error:
                if not _may_pass(error) or fruitless + 1 >= FRUITLESS_TRIES:
                    raise
        if _size(part) > start:
            fruitless = 0
            continue
        fruitless += 1
        if fruitless >= FRUITLESS_TRIES:
            raise ModelError(f"the hub sends no data of {remote.name}'s {file.name}; try again later")
        time.sleep(PAUSE_SECONDS)


def _stream(remote: Remote, file: RemoteFile, part: Path, start: int, advance: Callable[[int], None]) -> None:
    headers = build_hf_headers(library_name="shoal", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # uncompressed: to resume, the bytes received are counted
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hf_hub_url(remote.name, file.name, revision=remote.commit)
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
                raise ModelError(
                    f"the hub sends more of {remote.name}'s {file.name} than its stated {file.bytes:,} bytes"
                )
            out.write(chunk)
            advance(len(chunk))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _remote(name: str, info: ModelInfo) -> Remote:
    if not info.sha or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise ModelError(f"{_endpoint()} states no commit of {name}; check that HF_ENDPOINT is a hub")
    files = {}
    for file in info.siblings or []:
        path = PurePosixPath(file.rfilename)
        if path.is_absolute() or ".." in path.parts or "\\" in file.rfilename or not path.name:
            raise ModelError(f"rejected: {name} has a file named {file.rfilename!r}, which is outside its folder")
        files[file.rfilename] = _remote_file(name, file)
    return Remote(name, info.sha, files)


def _remote_file(name: str, file: RepoSibling) -> RemoteFile:
    size, sha256 = (file.lfs.size, file.lfs.sha256) if file.lfs else (file.size, None)
    if type(size) is not int or size < 0 or not (sha256 or file.blob_id):
        raise ModelError(
            f"{_endpoint()} states no size and hash of {name}'s {file.rfilename}, so it cannot be verified; "
            "check HF_ENDPOINT"
        )
    return RemoteFile(file.rfilename, size, sha256, None if sha256 else file.blob_id)


def _endpoint() -> str:
    """Return HF_ENDPOINT without a user name and password."""
    return without_password(constants.ENDPOINT)


# --- errors -------------------------------------------------------------------------------------


@contextmanager
def _explained(name: str, revision: str, folder: Path) -> Iterator[None]:
    """Translate errors of huggingface_hub to `ModelError`, without quoting their text, which may contain a request's header."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ModelError(f"HF_HUB_OFFLINE is set, so {name} cannot be fetched; {by_hand(name, folder)}") from None
    except HFValidationError:
        raise ModelError(no_name(name)) from None
    except HfHubHTTPError as error:
        raise ModelError(_answer(error, name, revision)) from None
    except HTTP_ERROR as error:
        raise ModelError(
            f"cannot reach {_endpoint()} for {name} ({type(error).__name__}); later, the same command resumes the "
            f"fetch; {by_hand(name, folder)}"
        ) from None


def _answer(error: HfHubHTTPError, name: str, revision: str) -> str:
    """Return the meaning of the hub's error, and what to do."""
    page = f"{_endpoint()}/{name}"
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{name} is only for users who accepted its terms ({status}): accept them at {page}, and set HF_TOKEN to your token"
    if isinstance(error, RepositoryNotFoundError):
        close = close_names(name)
        meant = f"is it {' or '.join(close)}, which is on this machine? " if close else ""
        return (
            f"the hub has no model {name}, or it is private ({status}): {meant}the name is OWNER/NAME; "
            "for a private model set HF_TOKEN to a token that may read it"
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
