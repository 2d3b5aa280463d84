"""Reads files over https and from object stores, from any byte on. Messages name a file without its credentials. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import urlsplit

from shoal.errors import DataError
from shoal.system.network import scheme_of
from shoal.system.secrets import without_secrets

WEB: Final = ("http", "https")
# Object stores, by fsspec's names, and the package that reads each.
STORES: Final = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "hf": "huggingface_hub",
}  # fmt: skip
CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without receiving a byte
CHUNK_BYTES = 8 << 20  # of one request to an object store
_HTML = "text/html"
_PACKED = (".gz", ".zst", ".xz", ".bz2")


class LostConnectionError(Exception):
    """A connection that failed or was cut, so that a second try may succeed. Its text is the kind of failure alone."""


@dataclass(frozen=True)
class Version:
    """The state of a remote file: its size, if stated, and what changes with its content, if stated."""

    bytes: int | None
    etag: str = ""
    modified: str = ""

    def is_known(self) -> bool:
        """Return whether a change of the content would be seen."""
        return bool(self.etag or self.modified)


@dataclass(frozen=True)
class Body:
    """The bytes of a remote file from `start` on; 0 if they had to begin again."""

    version: Version
    start: int
    chunks: Iterator[bytes]


def open_remote(url: str, start: int = 0, version: Version | None = None) -> AbstractContextManager[Body]:
    """
    Open a remote file at byte `start`, if it still has this version; otherwise at its beginning.

    Raises `LostConnectionError`, also while the chunks are read, or DataError if the file does not exist or access is denied.
    """
    return _open_web(url, start, version) if scheme_of(url) in WEB else _open_stored(url, start, version)


def list_remote(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """
    Return the URLs of the files of a pattern or a folder, sorted; for a file, its own.

    As with local paths, a folder and a pattern without a suffix (data/**) mean files with one of the suffixes, and hidden
    files are skipped. Raises DataError if there are none, and `LostConnectionError`.
    """
    if scheme_of(url) in WEB:
        if "*" in url:
            raise DataError(
                f"{without_secrets(url)} is a pattern, which https has none of; list each file in data.paths"
            )
        return [url]
    store, path = _store(url)
    with _store_errors(url):
        store.invalidate_cache()
        if "*" not in path and store.isfile(path):
            return [url]
        found = store.glob(path, detail=True) if "*" in path else store.find(path, detail=True)
    last = PurePosixPath(path).suffix
    wanted = suffixes if "*" in last or not last or "*" not in path else ("",)
    names = [n for n, i in found.items() if i["type"] == "file" and n.lower().endswith(wanted) and not _hidden(n, path)]
    if not names:
        raise DataError(f"there is no {without_secrets(url)}, or it has no {_or(wanted)} files; correct data.paths")
    return [f"{scheme_of(url)}://{name}" for name in sorted(names)]


def _hidden(name: str, path: str) -> bool:
    return any(part.startswith(".") for part in name.removeprefix(path.partition("*")[0]).split("/"))


def _or(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffix for suffix in suffixes if suffix.count(".") == 1) or "such"


# --- https ---------------------------------------------------------------------------------------------


@contextmanager
def _open_web(url: str, start: int, version: Version | None) -> Iterator[Body]:
    from huggingface_hub import get_session

    headers = {"Accept-Encoding": "identity"}  # uncompressed: to resume, the bytes received are counted
    tag = _range_tag(version)
    if start and tag:
        headers |= {"Range": f"bytes={start}-", "If-Range": tag}
    timeout = (CONNECT_SECONDS, READ_SECONDS, READ_SECONDS, READ_SECONDS)
    with ExitStack() as stack:
        with _web_errors(url):  # not around the yield: the reader has errors of its own
            response = stack.enter_context(get_session().stream("GET", url, headers=headers, timeout=timeout))
        _check_answer(url, response)
        begin = start if response.status_code == 206 else 0
        yield Body(_stated(response), begin, _web_chunks(url, response))


def _range_tag(version: Version | None) -> str:
    """Return what makes a server continue only the same content; "" if it cannot: weak tags may stand for other bytes."""
    if version is None:
        return ""
    return version.modified if not version.etag or version.etag.startswith("W/") else version.etag


def _web_chunks(url: str, response: Any) -> Iterator[bytes]:
    with _web_errors(url):
        yield from response.iter_raw()


def _stated(response: Any) -> Version:
    """Return the version that a response's headers state."""
    whole = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
    length = whole[1] if whole else response.headers.get("Content-Length", "")
    size = int(length) if length.isdigit() else None
    return Version(size, response.headers.get("ETag", ""), response.headers.get("Last-Modified", ""))


@contextmanager
def _web_errors(url: str) -> Iterator[None]:
    """Translate errors of the HTTP library, whose text may contain a URL with credentials."""
    from shoal.hub.remote import HTTP_ERROR

    try:
        yield
    except HTTP_ERROR as error:
        raise LostConnectionError(type(error).__name__) from None
    except Exception as error:
        if type(error).__name__ != "InvalidURL":  # of httpx or httpx2, which share no base class for it
            raise
        raise DataError(f"{without_secrets(url)} is not a valid URL; correct data.paths") from None


def _check_answer(url: str, response: Any) -> None:
    """Raise DataError for an answer that is not the file, `LostConnectionError` for an error of the server's own."""
    name, status = without_secrets(url), response.status_code
    if status >= 500 or status == 429:
        raise LostConnectionError(f"status {status}")
    if status in (401, 403):
        raise DataError(f"access to {name} is denied ({status}); download it yourself and set data.paths to the file")
    if status not in (200, 206):
        raise DataError(f"{name} does not exist on its server ({status}); correct data.paths")
    path = urlsplit(url).path.lower()
    if response.headers.get("Content-Type", "").startswith(_HTML) and not path.endswith((".html", ".htm")):
        raise DataError(
            f"{name} is a web page, perhaps one that leads to the file; set data.paths to the file's own URL"
        )
    packed = response.headers.get("Content-Encoding", "identity")
    if packed != "identity" and not path.endswith(_PACKED):
        raise DataError(
            f"the server sends {name} compressed ({packed}); download it yourself and set data.paths to the file"
        )


# --- object stores -------------------------------------------------------------------------------------


def _open_stored(url: str, start: int, version: Version | None) -> AbstractContextManager[Body]:
    store, path = _store(url)
    with _store_errors(url):
        store.invalidate_cache()
        now = _version_of(store.info(path))
    begin = start if version is not None and now == version and now.is_known() else 0
    return nullcontext(Body(now, begin, _stored_chunks(url, store, path, begin, now)))


def _stored_chunks(url: str, store: Any, path: str, start: int, version: Version) -> Iterator[bytes]:
    for begin in range(start, version.bytes or 0, CHUNK_BYTES):
        with _store_errors(url):
            chunk: bytes = store.cat_file(path, start=begin, end=min(begin + CHUNK_BYTES, version.bytes or 0))
        yield chunk
    with _store_errors(url):
        store.invalidate_cache()
        if _version_of(store.info(path)) != version:
            raise LostConnectionError("it changed while it was read")


def _version_of(info: dict[str, Any]) -> Version:
    def first(*keys: str) -> str:
        return next((str(info[key]) for key in keys if info.get(key)), "")

    return Version(
        int(info["size"]), first("ETag", "etag", "blob_id"), first("LastModified", "last_modified", "updated")
    )


def _store(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it. Raises DataError without the package for it."""
    scheme = scheme_of(url)
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in ("https", *STORES))
        raise DataError(f"{without_secrets(url)}: {scheme}:// is unknown; use {known}, or a local path")
    try:
        from fsspec.core import url_to_fs

        with _store_errors(url):
            store, path = url_to_fs(url)
    except ImportError:
        package = STORES[scheme]
        extra = "'shoal[data]'" if package == "s3fs" else package
        raise DataError(f"{without_secrets(url)} needs {package}: pip install {extra}") from None
    return store, path


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """Translate errors of an object store's client, whose text may contain a request with its signature."""
    name = without_secrets(url)
    try:
        yield
    except (DataError, LostConnectionError, ImportError):
        raise
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; correct data.paths") from None
    except PermissionError:
        raise DataError(f"access to {name} is denied; {_credentials(url)}") from None
    except Exception as error:  # each store has its own errors
        if "Credential" in type(error).__name__:
            raise DataError(f"no credentials for {name}; {_credentials(url)}") from None
        raise LostConnectionError(type(error).__name__) from None


def _credentials(url: str) -> str:
    if scheme_of(url) in ("s3", "s3a"):
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to a key that may read it (AWS_ENDPOINT_URL for a store that is "
            "not Amazon's, FSSPEC_S3_ANON=true for a public bucket)"
        )
    if scheme_of(url) == "hf":
        return "set HF_TOKEN to a token that may read it"
    return "set the store's own environment variables"
