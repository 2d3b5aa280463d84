"""HOST:PORT, as a person writes it. Pure, no torch."""

from __future__ import annotations


def read_address(text: str) -> tuple[str, int] | None:
    """(host, port) of "node0:29400" or "[::1]:29400"; None where it is no such thing."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not host or "/" in host or "@" in host or not (port.isascii() and port.isdigit()):
        return None
    return (host, int(port)) if 0 < int(port) < 65536 else None
