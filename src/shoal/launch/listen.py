"""Where this process listens: one address, and not on every interface of the machine. No torch."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any

from shoal.errors import LaunchError

LOOPBACK = ("127.0.0.1", "::1")  # who writes one of these means it: several launchers on one machine
QUEUE = 4096  # connections that wait to be accepted: all processes of a run come at once


def listen(host: str, port: int, *, from_afar: bool = False, option: str = "MASTER_ADDR") -> socket.socket:
    """
    A socket that listens on the address of `host` alone; port 0 takes any that is free.

    torch's `TCPStore` listens on all interfaces, whatever host it is given, unless it is given a socket
    (`master_listen_fd`). `from_afar`: other machines are to reach it, so that a name will not do which means loopback
    here. `option`: where `host` was set. Raises `LaunchError`.
    """
    family, address = _address(host, port, option if from_afar and host not in LOOPBACK else "")
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(QUEUE)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise LaunchError(
                f"port {port} is taken ({error.strerror}); set launch.port to another, or to 0 for any"
            ) from None
        raise LaunchError(
            f"cannot listen on {host}, port {port}: {error.strerror}; set {option} to an address of this machine by which the "
            "others reach it"
        ) from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether `host` is reached from this machine alone."""
    try:
        return all(ipaddress.ip_address(a[0]).is_loopback for _, a in _resolve(host, 0))
    except LaunchError:
        return False


def _address(host: str, port: int, option: str) -> tuple[int, Any]:
    """Where others are to reach it, `option` says so."""
    found = _resolve(host, port)
    if not option:
        return found[0]
    for family, address in found:  # Debian gives a machine's own name 127.0.1.1 beside, or instead of, its address
        if not ipaddress.ip_address(address[0]).is_loopback:
            return family, address
    raise LaunchError(
        f"{host} is {found[0][1][0]} on its own machine, where no other can reach it; set {option} to the machine's address on "
        "the network"
    )


def _resolve(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        return [(family, address) for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise LaunchError(f"cannot find the address of {host}: {error.strerror or error}") from None
