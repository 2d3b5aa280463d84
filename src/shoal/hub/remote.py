"""A hub: what it has, and its files as bytes. Every way in which it can fail is a `ModelError`. No torch."""

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

# What the HTTP library raises, whichever one huggingface_hub is built on: httpx below 2, httpx2 since.
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without a single byte
FRUITLESS_TRIES = 3  # connections in a row that bring nothing
PAUSE_SECONDS = 1.0  # after such a connection


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub states it, with one hash or the other."""

    name: str
    bytes: int
    sha256: str | None  # of a file in LFS
    git_sha1: str | None  # of git's blob, where the file is in git itself

    @property
    def hash(self) -> str:
        """Names the content."""
        return self.sha256 or self.git_sha1 or ""


@dataclass(frozen=True)
class Remote:
    """A model at a commit of its repository."""

    name: str
    commit: str
    files: Mapping[str, RemoteFile]


def look_up(name: str, revision: str, folder: Path) -> Remote:
    """What the hub has under `name`. `folder` is where it would go, for what is said where the hub is out of reach."""
    try:
        with _explained(name, revision, folder):
            info = HfApi(library_name="shoal", library_version=__version__).model_info(
                name, revision=revision, files_metadata=True, timeout=CONNECT_SECONDS
            )
            return _remote(name, info)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # a proxy's page; a token that fits in no header
        raise ModelError(
            f"{_endpoint()} does not answer for {name} as a hub does ({type(error).__name__}); look at "
            f"HF_ENDPOINT, HF_TOKEN and the proxy; {by_hand(name, folder)}"
        ) from None


def download(remote: Remote, file: RemoteFile, part: Path, folder: Path, advance: Callable[[int], None]) -> None:
    """
    Bring `part` to the size of `file`: it goes on where it ends, also after a cut connection.

    `advance` is called with the bytes that came, or minus those that must come again. Raises `ModelError` and,
    of the disk, `OSError`.
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
            raise ModelError(f"the hub sends nothing of {remote.name}'s {file.name}; try again later")
        time.sleep(PAUSE_SECONDS)


def _stream(remote: Remote, file: RemoteFile, part: Path, start: int, advance: Callable[[int], None]) -> None:
    headers = build_hf_headers(library_name="shoal", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # bytes are counted, and gone on from
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hf_hub_url(remote.name, file.name, revision=remote.commit)
    timeout = (CONNECT_SECONDS, READ_SECONDS, READ_SECONDS, READ_SECONDS)
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response, part.open("ab") as out:
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # it does not know ranges
            out.truncate(0)
            advance(-start)
            start = 0
        for chunk in response.iter_bytes():
            start += len(chunk)
            if start > file.bytes:
                raise ModelError(
                    f"the hub sends more of {remote.name}'s {file.name} than the {file.bytes:,} bytes it states"
                )
            out.write(chunk)
            advance(len(chunk))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _remote(name: str, info: ModelInfo) -> Remote:
    if not info.sha or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise ModelError(f"{_endpoint()} states no commit of {name}; is it a hub? HF_ENDPOINT says which is asked")
    files = {}
    for file in info.siblings or []:
        path = PurePosixPath(file.rfilename)
        if path.is_absolute() or ".." in path.parts or "\\" in file.rfilename or not path.name:
            raise ModelError(
                f"{name} has a file called {file.rfilename!r}, which leads out of its folder; it is not fetched"
            )
        files[file.rfilename] = _remote_file(name, file)
    return Remote(name, info.sha, files)


def _remote_file(name: str, file: RepoSibling) -> RemoteFile:
    size, sha256 = (file.lfs.size, file.lfs.sha256) if file.lfs else (file.size, None)
    if type(size) is not int or size < 0 or not (sha256 or file.blob_id):
        raise ModelError(
            f"{_endpoint()} states no size and no hash of {name}'s {file.rfilename}, so it could not be checked; "
            "HF_ENDPOINT says which hub is asked"
        )
    return RemoteFile(file.rfilename, size, sha256, None if sha256 else file.blob_id)


def _endpoint() -> str:
    """HF_ENDPOINT as it may be shown."""
    return without_password(constants.ENDPOINT)


# --- what went wrong -------------------------------------------------------------------------------------


@contextmanager
def _explained(name: str, revision: str, folder: Path) -> Iterator[None]:
    """Errors of the hub in our words; none quotes the library's, which may have a header of the request in it."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise ModelError(
            f"HF_HUB_OFFLINE is set, so the hub is not asked for {name}; {by_hand(name, folder)}"
        ) from None
    except HFValidationError:
        raise ModelError(no_name(name)) from None
    except HfHubHTTPError as error:
        raise ModelError(_answer(error, name, revision)) from None
    except HTTP_ERROR as error:
        raise ModelError(
            f"cannot reach {_endpoint()} for {name} ({type(error).__name__}); once it can be, the same command "
            f"goes on where it stopped; {by_hand(name, folder)}"
        ) from None


def _answer(error: HfHubHTTPError, name: str, revision: str) -> str:
    """What a refusal of the hub means, and what to do."""
    page = f"{_endpoint()}/{name}"
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f"{name} is given only to those who accepted its terms ({status}): accept them at {page}, and set HF_TOKEN to a token of yours"
    if isinstance(error, RepositoryNotFoundError):
        close = close_names(name)
        meant = f"is it {' or '.join(close)}, which is on this machine? " if close else ""
        return (
            f"the hub has no model {name}, or it is private ({status}): {meant}the name is OWNER/NAME; "
            "for a private one set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision} (404); {page}/tree/main lists its branches"
    if status in (401, 403):
        return f"the hub refuses {name} ({status}): set HF_TOKEN to a token that may read it, and see {page}"
    if status == 404:
        return f"the hub no longer has a file that it listed of {name} (404); try again"
    if status == 429:
        return f"the hub was asked too often ({status}); wait some minutes, or set HF_TOKEN, which allows more"
    if status < 500:
        return f"the hub refuses {name} ({status}); {page} may say why"
    return f"the hub fails to answer for {name} ({status}); try again later"


def _may_pass(error: Exception) -> bool:
    """Whether the same request may be answered a moment later: a cut connection, or a hub in trouble."""
    return not isinstance(error, HfHubHTTPError) or error.response.status_code >= 500
