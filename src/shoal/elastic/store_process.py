"""The process that serves a run's rendezvous store, started by the launcher whose node has the address. No torch."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

from shoal.errors import LaunchError
from shoal.system.network import is_here, listen, read_address


def start_early(rendezvous: str | None) -> bool:
    """
    Start the store if `rendezvous` is an address of this node and nothing answers there; return whether it was started.

    Call it before torch is imported: the store's process imports torch too, at the same time. An address that cannot be used
    is not reported here, but when the store is needed.
    """
    place = read_address(rendezvous) if rendezvous else None
    if place is None:
        return False
    try:
        if not is_here(place[0], option="launch.rendezvous") or answers(*place):
            return False
        start_store(*place)
    except LaunchError:
        return False
    return True


def start_store(host: str, port: int) -> None:
    """
    Start the store in a separate session, which signals to this process group do not reach.

    Raises `LaunchError` if the address cannot be used.
    """
    try:
        listen(host, port, option="launch.rendezvous", from_afar=True).close()
    except LaunchError:
        time.sleep(1.0)
        if answers(host, port):  # another launcher on this node was first
            return
        raise
    subprocess.run(  # starts a detached process and returns at once
        [sys.executable, "-m", "shoal", "rendezvous", f"{host}:{port}", "--while-used"],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def answers(host: str, port: int) -> bool:
    """Return whether something listens at the address."""
    try:
        with socket.create_connection((host, port), timeout=2.0):  # tries each of the host's addresses
            return True
    except OSError:
        return False
