"""Parsing HOST:PORT, and listening on one address rather than on all interfaces. No torch."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from typing import Any

from shoal.errors import LaunchError

LOOPBACK = ("127.0.0.1", "::1")  # given explicitly, these are intended: several launchers on one machine
QUEUE = 4096  # connections waiting to be accepted: all processes of a run connect at once


def read_address(text: str) -> tuple[str, int] | None:
    """Return (host, port) of "node0:29400" or "[::1]:29400"; None for anything else."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not host or "/" in host or "@" in host or not (port.isascii() and port.isdigit()):
        return None
    return (host, int(port)) if 0 < int(port) < 65536 else None


def scheme_of(path: str) -> str:
    """Return the scheme of a URL in lower case: "https" of "https://...", "s3" of "s3://..."; "" for a local path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", path)
    return found[1].lower() if found else ""


def listen(host: str, port: int, *, option: str, from_afar: bool = False) -> socket.socket:
    """
    Return a socket that listens on the address of `host` only; port 0 takes any free port.

    torch's `TCPStore` listens on all interfaces regardless of its host, unless it gets a socket (`master_listen_fd`).
    option: the option with the address, for messages. from_afar: whether other machines must reach the address,
    see `address_of`. Raises `LaunchError` if the port is in use, or the address is unknown or not this machine's.
    """
    family, address = address_of(host, port, option=option, from_afar=from_afar)
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _notice_who_is_gone(listener)
    try:
        listener.bind(address)
        listener.listen(QUEUE)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            any_ = ", or to 0 for any free port" if option == "launch.port" else ""
            raise LaunchError(f"port {port} is in use ({error.strerror}); set {option} to another port{any_}") from None
        raise LaunchError(
            f"cannot listen on {host}, port {port}: {error.strerror}; set {option} to an address of this machine that the "
            "other machines can reach"
        ) from None
    return listener


def address_of(host: str, port: int, *, option: str, from_afar: bool) -> tuple[int, Any]:
    """
    Return (family, address) of `host` for socket calls.

    from_afar: whether other machines must reach the address; if so, a name that resolves only to loopback is rejected. Debian
    resolves a machine's own name to 127.0.1.1, in addition to its network address or instead of it. Raises `LaunchError` if
    the name is rejected or cannot be resolved.
    """
    found = _resolve(host, port)
    if not from_afar or host in LOOPBACK:
        return found[0]
    for family, address in found:
        if not ipaddress.ip_address(address[0]).is_loopback:
            return family, address
    raise LaunchError(
        f"{host} resolves to {found[0][1][0]}, a loopback address that other machines cannot reach; set {option} to the "
        "machine's network address"
    )


def is_here(host: str, *, option: str) -> bool:
    """Return whether `host` is an address of this machine. Raises `LaunchError` if it cannot be resolved."""
    family, address = address_of(host, 0, option=option, from_afar=False)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _notice_who_is_gone(listener: socket.socket) -> None:
    """Enable keepalive: accepted connections end one minute after the other machine loses power."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def is_loopback(host: str) -> bool:
    """Return whether `host` is reachable from this machine only."""
    try:
        return all(ipaddress.ip_address(a[0]).is_loopback for _, a in _resolve(host, 0))
    except LaunchError:
        return False


def _resolve(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        return [(family, address) for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise LaunchError(f"cannot find the address of {host}: {error.strerror or error}") from None
