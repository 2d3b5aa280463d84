"""Connections between nodes, as a probe tries them: names, ports, and packets of full size. No torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import socket
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import psutil

from shoal.doctor.facts import addresses_of

CONNECT_SECONDS: Final = 3.0
BULK_SECONDS: Final = 5.0
BULK_BYTES: Final = 256 * 1024  # enough for packets of full size; 0.1 s at 20 Mbit/s
WORD_BYTES: Final = 32  # length of a password, a node's word and a digest on the wire
ANY_PORT: Final = 0  # the system chooses one, as gloo and NCCL let it


class Listener:
    """
    Listens on ports of this node while the doctor runs, and answers other probes.

    password: what a caller must send first; others get no answer. word: this node's own word, which tells it from other
    machines. Both have `WORD_BYTES` ASCII characters.
    """

    def __init__(self, ports: Sequence[int], password: str, word: str) -> None:
        self.opened: list[tuple[int, int, str]] = []
        """(port asked for, port that listens or 0, why it does not)"""
        for port in ports:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                # On all addresses: whether a name leads to the right one is what is to be found out
                listener.bind(("", port))
                listener.listen(256)
            except OSError as error:
                listener.close()
                in_use = error.errno == errno.EADDRINUSE
                self.opened.append((port, 0, "in use" if in_use else error.strerror or str(error)))
                continue
            self.opened.append((port, listener.getsockname()[1], ""))
            threading.Thread(target=_accept, args=(listener, password.encode(), word.encode()), daemon=True).start()


def _accept(listener: socket.socket, password: bytes, word: bytes) -> None:
    while True:
        try:
            caller, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(caller, password, word), daemon=True).start()


def _serve(caller: socket.socket, password: bytes, word: bytes) -> None:
    with caller, contextlib.suppress(OSError):
        caller.settimeout(BULK_SECONDS)
        if _receive(caller, WORD_BYTES) == password:
            caller.sendall(word)
            caller.sendall(_digest(_receive(caller, BULK_BYTES)))


def _receive(wire: socket.socket, count: int) -> bytes:
    """Return exactly `count` bytes, fewer only if the other side closes."""
    found = bytearray()
    while len(found) < count and (part := wire.recv(min(65536, count - len(found)))):
        found += part
    return bytes(found)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest()[:WORD_BYTES].encode()


def connect(targets: Mapping[str, Mapping[str, Any]], password: str) -> dict[str, dict[str, Any]]:
    """
    Connect to other nodes, all at once; return {name: {"addresses", "address", "interface", "problems"}}.

    targets: {name: {"word": its word, "ports": its open ports as (port asked for, port)}}. addresses: what the name leads to here;
    address: the one that was used, None if all are loopback. interface: of this node, towards the target; None if unknown.
    problems: {port asked for: "" or why it cannot be used}.
    """
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(max_workers=64) as pool:
        hosts = [name.rpartition("@")[2] for name in targets]  # ssh accepts user@host
        names = dict(zip(targets, pool.map(addresses_of, hosts), strict=True))
        tries = {}
        for name, target in targets.items():
            address = next((a for a in names[name] if not ipaddress.ip_address(a.partition("%")[0]).is_loopback), None)
            found[name] = {
                "addresses": names[name],
                "address": address,
                "interface": address and _interface_towards(address),
                "problems": {},
            }
            for asked, port in target["ports"] if address else ():
                tries[name, asked] = pool.submit(_try, str(address), port, password.encode(), target["word"].encode())
        for (name, asked), result in tries.items():
            found[name]["problems"][str(asked)] = result.result()
    return found


def _try(address: str, port: int, password: bytes, word: bytes) -> str:
    """Return why a port of another node cannot be used; an empty text if it can."""
    try:
        wire = socket.create_connection((address, port), CONNECT_SECONDS)
    except TimeoutError:
        return "timed out"
    except OSError as error:
        return _reason(error)
    with wire:
        wire.settimeout(CONNECT_SECONDS)
        try:
            wire.sendall(password)
            answered = _receive(wire, WORD_BYTES)
        except OSError as error:
            return f"connected, then {_reason(error)}"
        if answered != word:
            return "another machine answered"
        return _bulk(wire)


def _bulk(wire: socket.socket) -> str:
    """Send data in packets of full size; return "large packets are lost" if they do not arrive."""
    data = bytes(BULK_BYTES)
    wire.settimeout(BULK_SECONDS)
    try:
        wire.sendall(data)
        return "" if _receive(wire, WORD_BYTES) == _digest(data) else "data arrived altered"
    except OSError:
        return "large packets are lost"


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    return (error.strerror or str(error)).lower()


def _interface_towards(address: str) -> str | None:
    """Return the network interface from which packets to `address` leave; None if there is no route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # chooses the route; sends nothing
        except OSError:
            return None
        mine = probe.getsockname()[0]
    return next((n for n, each in psutil.net_if_addrs().items() if any(a.address == mine for a in each)), None)
