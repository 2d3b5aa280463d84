"""
The dashboard's server: the page and its data, for the person who started it. No torch.

    /                  the page
    /api/runs          all runs, with the options that differ
    /api/run/NAME      one run
    /api/curve         a window of a curve: ?run=NAME&name=loss&first=0&last=1000&columns=800
    /api/curves        many windows, as numbers and not as text: see `curve_bytes.py`
    /api/ranks         the ranks of a run: ?run=NAME

Only reads, on 127.0.0.1; `guard.py` has the checks of each request.
"""

from __future__ import annotations

import functools
import json
import math
import re
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import uvicorn
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from shoal.errors import ShoalError
from shoal.report.curves.curves import Window
from shoal.report.page.content import differing, run_view
from shoal.report.page.curve_bytes import MOST_COLUMNS, Wanted, answer, packed
from shoal.report.page.guard import Guard
from shoal.report.page.html import dashboard_html
from shoal.report.page.rank_view import ranks_view
from shoal.report.page.served_runs import ServedRun, ServedRuns

PORT: Final = 6464  # tried first, so that the address is the same after a restart
PORTS: Final = 20  # to try after it


class Dashboard:
    """The routes, over the runs of one folder."""

    def __init__(self, runs: ServedRuns) -> None:
        self.runs = runs

    def app(self, token: str, port: int) -> Starlette:
        """Return the application. token: what a request must have; port: of the server, for the cookie's name."""
        routes = [
            Route("/", self.page),
            Route("/api/runs", self.list_runs),
            Route("/api/run/{name:path}", self.run),
            Route("/api/curve", self.curve),
            Route("/api/curves", self.curves),
            Route("/api/ranks", self.ranks),
        ]
        return Starlette(routes=routes, middleware=[Middleware(Guard, token=token, port=port)])

    def page(self, request: Request) -> Response:
        """Answer with the page."""
        page, policy = _page()
        return Response(page, media_type="text/html", headers={"Content-Security-Policy": policy})

    def list_runs(self, request: Request) -> Response:
        """Answer with the list of runs."""
        runs = self.runs.look()
        found = {name: run.summary(name) for name, run in runs.items()}
        shown = [each.view | {"read": runs[name].share} for name, each in found.items()]
        return _json({"runs": shown, "differences": differing({name: each.options for name, each in found.items()})})

    def run(self, request: Request) -> Response:
        """Answer with what the page shows of one run."""
        run = self._run(request.path_params["name"])
        return _json(_answer(run_view, run.folder, run.curves))

    def curve(self, request: Request) -> Response:
        """Answer with a window of a curve."""
        query = request.query_params
        curves = self._run(query.get("run", "")).curves
        first, last = _whole(query, "first", 0), _whole(query, "last", 2**53)
        columns = min(max(_whole(query, "columns", 800), 1), MOST_COLUMNS)
        return _json(_window_json(_answer(curves.window, query.get("name", "loss"), first, last, columns)))

    def curves(self, request: Request) -> Response:
        """Answer with the windows that `of` asks for, a list of JSON."""
        try:
            wanted = [Wanted(**each) for each in json.loads(request.query_params.get("of", "[]"))]
        except (ValueError, TypeError, RecursionError) as error:
            raise HTTPException(400, "of must be a list of windows") from error
        runs = {each.run: self.runs.get(each.run) for each in wanted}
        windows = [answer(each, run.read_curves() if (run := runs[each.run]) else None) for each in wanted]
        return Response(packed(windows), media_type="application/octet-stream")

    def ranks(self, request: Request) -> Response:
        """Answer with the ranks of a run; null if none was measured."""
        run = self._run(request.query_params.get("run", ""))
        return _json(_answer(ranks_view, run.folder, run.ranks))

    def _run(self, name: str) -> ServedRun:
        run = self.runs.get(name)
        if run is None:
            raise HTTPException(404, "no such run")
        return run


def _answer(view: Callable[..., Any], *given: Any) -> Any:
    """Return the view of a run's files. If a file was removed or cannot be read, the answer is 404."""
    try:
        return view(*given)
    except ShoalError as error:
        raise HTTPException(409, str(error)) from error
    except OSError as error:
        raise HTTPException(404, "the run cannot be read") from error


def _whole(query: Mapping[str, str], name: str, default: int) -> int:
    """Return a whole number of the address. Raises `HTTPException` if it is none."""
    text = query.get(name, "")
    if text and not re.fullmatch(r"-?\d{1,16}", text, re.ASCII):
        raise HTTPException(400, f"{name} must be a whole number")
    return int(text) if text else default


def _window_json(window: Window) -> dict[str, Any]:
    """Return a window for JSON, its values with six significant digits."""
    found: dict[str, Any] = {name: getattr(window, name).tolist() for name in ("step", "tokens", "count", "gaps")}
    return found | {name: _rounded(getattr(window, name)) for name in ("seconds", "low", "high", "mean")}


def _rounded(values: NDArray[np.float64]) -> list[float | None]:
    return [float(f"{each:.6g}") if math.isfinite(each) else None for each in values.tolist()]


def _json(data: Any) -> Response:
    """Return an answer of JSON; NaN and infinity, which JSON lacks, are null."""
    try:
        text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return Response(text, media_type="application/json")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(each) for each in data] if isinstance(data, list | tuple) else data


@functools.cache
def _page() -> tuple[bytes, str]:
    """Return the page and its content security policy."""
    page = dashboard_html()
    found = re.search(rb'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert found is not None
    return page, f"{found[1].decode()}; frame-ancestors 'none'"


def listen(port: int | None) -> socket.socket:
    """
    Return a socket that listens on 127.0.0.1. port: None tries `PORT` and those after it.

    Raises `ShoalError` if the port is used.
    """
    for each in [port] if port is not None else [*range(PORT, PORT + PORTS), 0]:
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", each))
            found.listen(128)
            return found
        except OSError as error:
            found.close()
            why = error.strerror
        except OverflowError:
            found.close()
            why = "a port is at most 65535"
    raise ShoalError(f"port {port} cannot be used: {why}; choose another with --port, or omit the option")


def _warm(runs: Mapping[str, ServedRun]) -> None:
    """Make what the first request needs, before a person has opened the address."""
    _page()
    for name, run in runs.items():
        run.summary(name)


def serve(root: Path, port: int | None, say: Callable[[str], None]) -> None:
    """
    Serve the runs in `root` until Ctrl-C. say: prints a line. Raises `ShoalError` if the port is used.
    """
    runs = ServedRuns(root)
    with listen(port) as listening:
        own_port = listening.getsockname()[1]
        token = secrets.token_urlsafe(32)
        app = Dashboard(runs).app(token, own_port)
        found = runs.look()
        say(f"{len(found)} run{'s' * (len(found) != 1)} in {runs.root}: http://127.0.0.1:{own_port}/?token={token}")
        for name, way in runs.left_out.items():
            say(f"skipped: {name}, because {way} is a link to another folder; start a dashboard there")
        say("Ctrl-C ends the dashboard; the runs continue")
        config = uvicorn.Config(
            app, log_config=None, log_level="critical", access_log=False, proxy_headers=False, server_header=False, lifespan="off", ws="none",
            timeout_graceful_shutdown=1, limit_concurrency=200,
        )  # fmt: skip
        threading.Thread(target=_warm, args=(found,), name="warm", daemon=True).start()
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn raises it again after it has ended cleanly
            say("\nthe dashboard has ended")
        finally:
            runs.close()
