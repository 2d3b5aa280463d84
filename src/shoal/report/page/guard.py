"""
Lets only the person who started the dashboard in: the checks of each request, before any of it is answered. No torch.

A page on another site can make a browser send requests to 127.0.0.1, under another name too (DNS rebinding). So a request
must name this machine as its host, must not come from another origin, and must have the secret token: in the address that
`shoal dashboard` prints, then in a cookie that scripts cannot read and other sites cannot send.
"""

from __future__ import annotations

import hmac
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS: Final = ("127.0.0.1", "localhost")
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
NO_TOKEN: Final = "Open the address that `shoal dashboard` printed: it has the token that lets you in.\n"


class Guard:
    """Passes a request on to `app` if it may be answered, and adds security headers to every answer."""

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token
        self._cookie = f"shoal-{port}"  # cookies are shared by all ports: two dashboards need two names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        gives_cookie = self._has_token_in_address(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if gives_cookie:
                    headers["Set-Cookie"] = f"{self._cookie}={self._token}; HttpOnly; SameSite=Strict; Path=/"
            await send(message)

        refused = self._refused(scope, gives_cookie)
        await (refused or self._app)(scope, receive, send_with_headers)

    def _refused(self, scope: Scope, has_token: bool) -> PlainTextResponse | None:
        """Return the answer to a rejected request; None if it is accepted."""
        headers = Headers(scope=scope)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("The dashboard only reads.\n", 405, {"Allow": "GET, HEAD"})
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not _is_here(hosts[0]):
            return PlainTextResponse("The dashboard answers only as 127.0.0.1 or localhost.\n", 421)
        if any(origin != f"http://{hosts[0]}" for origin in headers.getlist("origin")):
            return PlainTextResponse("The dashboard answers no other site.\n", 403)
        if not has_token and not self._has_cookie(headers):
            return PlainTextResponse(NO_TOKEN, 401)
        return None

    def _has_token_in_address(self, scope: Scope) -> bool:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        return len(given) == 1 and self._is_token(given[0])

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return False
        return cookie is not None and self._is_token(cookie.value)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


def _is_here(host: str) -> bool:
    """Return whether a Host header names this machine; its port may be another one, as through an ssh tunnel."""
    name, _, port = host.partition(":")
    return name in HOSTS and (not port or (port.isascii() and port.isdigit()))
