"""
A hub on loopback, for tests that a real one does not allow. It serves what huggingface_hub requests:

    GET /api/models/NAME/revision/REV?blobs=True    the files with their sizes and hashes
    GET /NAME/resolve/COMMIT/FILE                   the bytes, also from `Range: bytes=N-` on

For a dataset, the first path has `datasets` for `models`, and the second begins with `/datasets`. The library `datasets`
also requests the following:

    HEAD /datasets/NAME/resolve/REV/FILE            the size, hash and commit of a file, without a redirect
    GET /api/datasets/NAME/tree/REV/FOLDER          the files and folders below a folder

Weights are served through a redirect to another host, as on the real hub.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".bin", ".parquet", ".gz", ".zst")  # files in Git LFS, served from another host


@dataclass
class Repository:
    """A model or a dataset on the hub, and its faults."""

    files: dict[str, bytes]
    kind: str = "models"
    card: dict[str, Any] = field(default_factory=dict)  # the metadata of README.md
    commit: str = "c0ffee" + "0" * 34
    branches: tuple[str, ...] = ("main",)
    token: str = ""  # required of requests for the file list; otherwise 401
    gated: bool = False  # the files are listed, but each request for one gets 403
    stated_bytes: dict[str, int] = field(default_factory=dict)  # by file: false sizes that the hub states
    altered: dict[str, bytes] = field(default_factory=dict)  # by file: false content of the same size
    cut_after: int | None = None  # number of bytes of a body after which the connection is cut
    ranges: bool = True
    encodings: dict[str, str] = field(default_factory=dict)  # by file: false content encodings
    on_body: Callable[[str], None] = lambda name: None  # called with the file's name after half of its body is sent

    @property
    def prefix(self) -> str:
        """The beginning of the path of its files."""
        return "" if self.kind == "models" else f"/{self.kind}"


class Hub(ThreadingHTTPServer):
    """The state of the server: repositories by name, and recorded requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.status = 200  # if not 200, the status of every response
        self.page = b""  # sent for every request, unless empty
        self.asked: list[str] = []  # "FILE from N" for each body sent, in order
        self.tokens: dict[str, str] = {}  # by host: the Authorization header of the last request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def elsewhere(self) -> str:
        """The same server under a second name, which clients treat as another host."""
        return self.url.replace("127.0.0.1", "localhost")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore the errors of killed clients."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub until the block ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        if self.server.page or self.server.status != 200:
            return self._answer(self.server.status, self.server.page)
        self.server.tokens[self.headers["Host"]] = self.headers.get("Authorization", "")
        path = unquote(urlsplit(self.path).path)
        for name, repository in self.server.repositories.items():
            if path.startswith(f"/api/{repository.kind}/{name}/revision/"):
                return self._list(name, repository, path.rpartition("/revision/")[2])
            if path.startswith(f"/api/{repository.kind}/{name}/tree/"):
                return self._list_folder(repository, path.partition("/tree/")[2])
            if path == f"/api/{repository.kind}/{name}":
                return self._list(name, repository, "main")
            for revision in (*repository.branches, repository.commit):
                start = f"{repository.prefix}/{name}/resolve/{revision}/"
                if path.startswith(start):
                    return self._resolve(name, repository, path.removeprefix(start))
            if path.startswith(f"/elsewhere/{name}/"):
                return self._send(repository, path.removeprefix(f"/elsewhere/{name}/"))
        return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def do_HEAD(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for name, repository in self.server.repositories.items():
            for revision in (*repository.branches, repository.commit):
                start = f"{repository.prefix}/{name}/resolve/{revision}/"
                file = path.removeprefix(start)
                if path.startswith(start) and file in repository.files:
                    return self._describe(repository, file)
                if path.startswith(start):
                    return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.commit})
        return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _describe(self, repository: Repository, file: str) -> None:
        stated = _sibling(file, repository.files[file], repository)
        tag = stated.get("lfs", {}).get("sha256", stated["blobId"])
        self.send_response(200)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Content-Length", str(stated["size"]))
        self.end_headers()

    def _list_folder(self, repository: Repository, place: str) -> None:
        """Answer with the entries below REV/FOLDER, at any depth if `recursive` is asked for."""
        folder = place.partition("/")[2]
        below = [e for e in _tree(repository) if e["path"].startswith(f"{folder}/" if folder else "")]
        if "recursive=true" not in self.path.lower():
            below = [e for e in below if e["path"].rpartition("/")[0] == folder]
        code = {} if below else {"X-Error-Code": "EntryNotFound"}
        self._answer(200 if below else 404, json.dumps(below).encode(), {"Content-Type": "application/json"} | code)

    def _list(self, name: str, repository: Repository, revision: str) -> None:
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in (*repository.branches, repository.commit):
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        siblings = [_sibling(file, content, repository) for file, content in repository.files.items()]
        body = {"_id": "0", "id": name, "sha": repository.commit, "siblings": siblings, "cardData": repository.card}
        return self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, repository: Repository, file: str) -> None:
        if repository.gated:
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if file.endswith(LFS):
            return self._answer(302, b"", {"Location": f"{self.server.elsewhere}/elsewhere/{name}/{file}"})
        return self._send(repository, file)

    def _send(self, repository: Repository, file: str) -> None:
        content = repository.altered.get(file, repository.files[file])
        start, is_part = 0, False
        asked = self.headers.get("Range", "")
        if asked and repository.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, is_part = int(first), True
            content = content[: int(last) + 1] if last else content
        self.server.asked.append(f"{file} from {start}")
        self.send_response(206 if is_part else 200)
        self.send_header("X-Repo-Commit", repository.commit)
        if file in repository.encodings:
            self.send_header("Content-Encoding", repository.encodings[file])
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if repository.cut_after is not None and len(body) > repository.cut_after:
            body = body[: repository.cut_after]
            self.close_connection = True
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        repository.on_body(file)
        self.wfile.write(body[len(body) // 2 :])

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _tree(repository: Repository) -> list[dict[str, Any]]:
    """Return the API's entries of all files and folders."""
    folders = {"/".join(file.split("/")[:n]) for file in repository.files for n in range(1, file.count("/") + 1)}
    entries: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": f} for f in folders]
    for file, content in repository.files.items():
        stated = _sibling(file, content, repository)
        entry = {"type": "file", "oid": stated["blobId"], "size": stated["size"], "path": file}
        lfs = stated.get("lfs")
        entries.append(
            entry | ({"lfs": {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 134}} if lfs else {})
        )
    return entries


def _sibling(file: str, content: bytes, repository: Repository) -> dict[str, Any]:
    """Return the API's entry of a file: git's hash, and for weights the LFS hash."""
    size = repository.stated_bytes.get(file, len(content))
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    stated: dict[str, Any] = {"rfilename": file, "size": size, "blobId": blob}
    if file.endswith(LFS):
        stated["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
    return stated
