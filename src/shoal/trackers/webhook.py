"""Posts JSON to a webhook whose address is in an environment variable. The address is named nowhere. No torch."""

from __future__ import annotations

import json
import os
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from shoal.errors import ShoalError

TIMEOUT_SECONDS: Final = 10.0
PAUSES: Final = (1.0, 4.0)  # seconds between the attempts
LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
_LATER: Final = (429, 500, 502, 503, 504)  # answers after which another attempt may succeed


class Webhook:
    """A webhook. Neither its messages nor its `repr` contain the address, which is a secret."""

    def __init__(self, variable: str, address: str) -> None:
        """variable: the environment variable with the address, for messages. Raises `ShoalError` if the address is invalid."""
        self.variable = variable
        self._address = address
        self._opener = urllib.request.build_opener(*_handlers(variable, address))

    @classmethod
    def from_environment(cls, variable: str, environment: Mapping[str, str] = os.environ) -> Webhook | None:
        """Return the webhook in an environment variable; None if it is not set. Raises `ShoalError` if its address is invalid."""
        address = environment.get(variable, "").strip()
        return cls(variable, address) if address else None

    def post(self, message: Mapping[str, Any], stopped: threading.Event | None = None) -> str:
        """
        Post a message; try again after errors that may pass. Return "" or why it failed, without the address.

        stopped: an event that ends the wait for another attempt.
        """
        body = json.dumps(message, allow_nan=False).encode()
        stopped = stopped or threading.Event()
        problem, again = self._post_once(body)
        for pause in PAUSES:
            if not again or stopped.wait(pause):
                break
            problem, again = self._post_once(body)
        return problem

    def _post_once(self, body: bytes) -> tuple[str, bool]:
        """Return why a post failed, "" if it did not, and whether another attempt may succeed."""
        headers = {"Content-Type": "application/json", "User-Agent": "shoal"}
        try:
            request = urllib.request.Request(self._address, body, headers)
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
                answer.read(1024)
        except urllib.error.HTTPError as error:
            error.close()
            return f"it answered {error.code}", error.code in _LATER
        except Exception as error:  # any: an alert must end no run, and the error's own text may quote the address
            return _reason(error), True
        return "", False


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Reports a redirect as an error: its target was not checked, and a POST would become a GET."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow no redirect."""


def _handlers(variable: str, address: str) -> list[urllib.request.BaseHandler]:
    """Return how to reach an address. Raises `ShoalError` if it is neither https nor on this machine."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port  # `port` raises ValueError if it is not a number
    except ValueError:
        parts, host, port = urlsplit(""), "", None
    local = host in LOOPBACK
    if not host or port == 0 or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise ShoalError(
            f"the address in {variable} is not a webhook: it must begin with https://, or with http:// on this machine "
            "(127.0.0.1)"
        )
    # A proxy cannot reach this machine's own addresses
    proxies = urllib.request.ProxyHandler({}) if local else urllib.request.ProxyHandler()
    return [proxies, _NoRedirects(), urllib.request.HTTPSHandler(context=ssl.create_default_context())]


def _reason(error: Exception) -> str:
    """Return why there was no answer, in words that do not depend on the address."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no answer within {TIMEOUT_SECONDS:.0f} s"
    if isinstance(cause, ssl.SSLError):
        return "its TLS certificate or connection is invalid"
    if isinstance(cause, socket.gaierror):
        return "its host is unknown"
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno)
    return type(cause).__name__
