"""HOST:PORT as a person writes it, and where this process listens: one address, not every interface. No torch."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any

from shoal.errors import LaunchError

LOOPBACK = ("127.0.0.1", "::1")  # who writes one of these means it: several launchers on one machine
QUEUE = 4096  # connections that wait to be accepted: all processes of a run come at once


def read_address(text: str) -> tuple[str, int] | None:
    """(host, port) of "node0:29400" or "[::1]:29400"; None where it is no such thing."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") if host.startswith("[") else host
    if not host or "/" in host or "@" in host or not (port.isascii() and port.isdigit()):
        return None
    return (host, int(port)) if 0 < int(port) < 65536 else None


def listen(host: str, port: int, *, option: str, from_afar: bool = False) -> socket.socket:
    """
    A socket that listens on the address of `host` alone; port 0 takes any that is free.

    torch's `TCPStore` listens on all interfaces, whatever host it is given, unless it is given a socket
    (`master_listen_fd`). `option`: where the address was set. `from_afar`: other machines are to reach it, see
    `address_of`. Raises `LaunchError`.
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
            any_ = ", or to 0 for any" if option == "launch.port" else ""
            raise LaunchError(f"port {port} is taken ({error.strerror}); set {option} to another{any_}") from None
        raise LaunchError(
            f"cannot listen on {host}, port {port}: {error.strerror}; set {option} to an address of this machine by which the "
            "others reach it"
        ) from None
    return listener


def address_of(host: str, port: int, *, option: str, from_afar: bool) -> tuple[int, Any]:
    """
    (family, address) of `host`, as the socket calls take it. Raises `LaunchError`.

    `from_afar`: other machines are to reach it, so that a name will not do which means loopback here. Debian gives a
    machine's own name 127.0.1.1 beside, or instead of, its address.
    """
    found = _resolve(host, port)
    if not from_afar or host in LOOPBACK:
        return found[0]
    for family, address in found:
        if not ipaddress.ip_address(address[0]).is_loopback:
            return family, address
    raise LaunchError(
        f"{host} is {found[0][1][0]} on its own machine, where no other can reach it; set {option} to the machine's address on "
        "the network"
    )


def _notice_who_is_gone(listener: socket.socket) -> None:
    """Connections that it accepts end a minute after the other machine lost its power, and not never."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def is_loopback(host: str) -> bool:
    """Whether `host` is reached from this machine alone."""
    try:
        return all(ipaddress.ip_address(a[0]).is_loopback for _, a in _resolve(host, 0))
    except LaunchError:
        return False


def _resolve(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        return [(family, address) for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise LaunchError(f"cannot find the address of {host}: {error.strerror or error}") from None
