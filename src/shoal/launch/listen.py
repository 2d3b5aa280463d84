"""Where this process listens: one address, and not on every interface of the machine. No torch."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Any

from shoal.errors import LaunchError

QUEUE = 4096  # connections that wait to be accepted: all processes of a run come at once


def listen(host: str, port: int, *, from_afar: bool = False) -> socket.socket:
    """
    A socket that listens on the address of `host` alone; port 0 takes any that is free.

    torch's `TCPStore` listens on all interfaces, whatever host it is given, unless it is given a socket
    (`master_listen_fd`). `from_afar`: other machines are to reach it, so that an address of loopback will not do.
    Raises `LaunchError`.
    """
    family, address = _address(host, port, from_afar=from_afar)
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
            f"cannot listen on {host}, port {port}: {error.strerror}; rank 0 has to run where that address is, so set MASTER_ADDR "
            "to the address by which the others reach rank 0's machine"
        ) from None
    return listener


def is_loopback(host: str) -> bool:
    """Whether `host` is reached from this machine alone."""
    try:
        return all(ipaddress.ip_address(a[0]).is_loopback for _, a in _resolve(host, 0))
    except LaunchError:
        return False


def _address(host: str, port: int, *, from_afar: bool) -> tuple[int, Any]:
    found = _resolve(host, port)
    if not from_afar:
        return found[0]
    for family, address in found:  # Debian gives a machine's own name 127.0.1.1 beside, or instead of, its address
        if not ipaddress.ip_address(address[0]).is_loopback:
            return family, address
    raise LaunchError(
        f"{host} is {found[0][1][0]} on its own machine, where no other can reach it; set MASTER_ADDR to the machine's address on "
        "the network"
    )


def _resolve(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        return [(family, address) for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError as error:
        raise LaunchError(f"cannot find the address of {host}: {error.strerror or error}") from None
