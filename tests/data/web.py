"""A web server on loopback that serves files, with the faults that a real one has."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Web:
    """The files of a server by path, its faults, and the requests that it received."""

    files: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    status: int = 200  # if not 200, the status of every response
    cut_after: int | None = None  # number of bytes of a body after which the connection is cut
    ranges: bool = True
    stated_bytes: int | None = None  # a false Content-Length
    headers: dict[str, str] = field(default_factory=dict)  # of every response
    moved: dict[str, str] = field(default_factory=dict)  # by path: where a redirect leads
    asked: list[str] = field(default_factory=list)  # "PATH from N", in order
    on_body: Callable[[str], None] = lambda path: None  # called with the path after half of its body is sent
    url: str = ""


@contextmanager
def running_web() -> Iterator[Web]:
    """Run a server until the block ends."""
    web = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

        def do_GET(self) -> None:
            _answer(self, web)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.handle_error = lambda request, address: None  # type: ignore[method-assign, assignment]  # of clients that leave
        web.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield web
        server.shutdown()
        thread.join()


def _answer(request: BaseHTTPRequestHandler, web: Web) -> None:
    path = request.path.partition("?")[0]
    if web.status != 200 or (path not in web.files and path not in web.moved):
        return _send(request, web.status if web.status != 200 else 404, {}, b"")
    if path in web.moved:
        return _send(request, 302, {"Location": web.moved[path]}, b"")
    content, tag = web.files[path], web.etags.get(path, "")
    asked, condition = request.headers.get("Range", ""), request.headers.get("If-Range", "")
    start = 0
    if asked and web.ranges and (not condition or condition == tag):
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
    web.asked.append(f"{path} from {start}")
    headers = dict(web.headers)
    if tag:
        headers["ETag"] = tag
    if start:
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    if web.stated_bytes is not None:
        headers["Content-Length"] = str(web.stated_bytes)
    body = content[start:]
    headers.setdefault("Content-Length", str(len(body)))
    if web.cut_after is not None and len(body) > web.cut_after:
        body = body[: web.cut_after]
        request.close_connection = True
    return _send(request, 206 if start else 200, headers, body, lambda: web.on_body(path))


def _send(
    request: BaseHTTPRequestHandler,
    status: int,
    headers: dict[str, str],
    body: bytes,
    halfway: Callable[[], None] = lambda: None,
) -> None:
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(body[: len(body) // 2])
    request.wfile.flush()
    halfway()
    request.wfile.write(body[len(body) // 2 :])
