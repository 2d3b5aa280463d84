"""Where the launchers of a Slurm job meet: at its first node, by a name or address that all nodes reach. No torch."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Final

import psutil

from shoal.errors import LaunchError
from shoal.system.network import address_of
from shoal.system.output import on_one_line

INTERFACES: Final = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # chosen by the user or cluster.yaml
OPTION: Final = "launch.rendezvous"
# Ports of the launchers' rendezvous, below those that systems give to outgoing connections.
FIRST_PORT: Final = 10000
PORTS: Final = 20000
_TRIED: Final = 100  # ports in a row


def meeting_place(environment: Mapping[str, str] = os.environ) -> str:
    """
    Return HOST:PORT where the launchers of this job meet. The port depends on the job, so that two jobs on a node do not collide.

    Raises `LaunchError` if the node has no address that others can reach, or no free port.
    """
    host = meeting_host(environment)
    job = environment.get("SLURM_JOB_ID", "0")
    port = _free_port(host, FIRST_PORT + (int(job) if job.isdigit() else 0) % PORTS)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _free_port(host: str, first: int) -> int:
    """Return the first port from `first` on that no process listens on; `first` if `host` is another machine."""
    family, address = address_of(host, 0, option=OPTION, from_afar=True)
    for port in range(first, first + _TRIED):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address[0], port, *address[2:]))
                probe.listen()
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
            return port
    raise LaunchError(f"ports {first} to {first + _TRIED - 1} of {on_one_line(host)} are all in use")


def meeting_host(environment: Mapping[str, str] = os.environ) -> str:
    """
    Return the name of the job's first node, or its address if the name leads elsewhere or to a loopback address.

    Raises `LaunchError` if the node has no address that others can reach.
    """
    first = first_host(environment.get("SLURM_JOB_NODELIST", ""))
    name = environment.get("SLURMD_NODENAME", "")
    if first and name != first and socket.gethostname().partition(".")[0] != first.partition(".")[0]:
        return _checked(first)  # a shell of salloc, on the login node: only the name is known
    own = dict(_own_addresses())
    if chosen := next((environment[n] for n in INTERFACES if environment.get(n)), ""):
        if chosen not in psutil.net_if_addrs() and not set("^=,") & set(chosen):
            raise LaunchError(
                f"this node has no network interface {on_one_line(chosen)}; it has {', '.join(sorted(set(own.values())))}"
            )
        on_it = [address for address, interface in own.items() if interface == chosen]
        if on_it:
            return next((n for n in _names(first, name) if _address(n) in on_it), on_it[0])
    found = next((n for n in _names(first, name) if _address(n) in own), None) or _default(own)
    if found is None:
        raise LaunchError(
            "this node has no network address other than loopback; set launch.rendezvous to a host that all nodes reach"
        )
    return found


def first_host(nodes: str) -> str:
    """Return the first host of Slurm's list of nodes: "gpu03" of "gpu[03-05,9],login1"; "" of an empty list."""
    found = re.match(r"([^,\[]*)(?:\[([^\]]*)\]([^,\[]*))?", nodes)
    if not found or not found[0]:
        return ""
    prefix, ranges, suffix = found.groups()
    return prefix + (re.split(r"[-,]", ranges)[0] if ranges else "") + (suffix or "")


def _names(*given: str) -> Iterator[str]:
    yield from dict.fromkeys(name for name in (*given, socket.gethostname(), socket.getfqdn()) if name)


def _address(name: str) -> str | None:
    """Return the address of a name that other nodes can reach; None if there is none."""
    try:
        return str(address_of(name, 0, option=OPTION, from_afar=True)[1][0])
    except LaunchError:
        return None


def _checked(name: str) -> str:
    address_of(name, 0, option=OPTION, from_afar=True)
    return name


def _own_addresses() -> Iterator[tuple[str, str]]:
    """Yield (address, interface) of this node's addresses, without loopback and link-local ones."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    for interface, addresses in psutil.net_if_addrs().items():
        for each in addresses:
            if each.family in (socket.AF_INET, socket.AF_INET6) and interface in up:
                address = ipaddress.ip_address(each.address.partition("%")[0])
                if not address.is_loopback and not address.is_link_local:
                    yield str(address), interface


def _default(own: Mapping[str, str]) -> str | None:
    """Return the address on the default route, else any; IPv4 before IPv6."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
            if (address := str(probe.getsockname()[0])) in own:
                return address
        except OSError:
            pass
    return min(own, key=lambda address: ":" in address, default=None)
