"""The host at which the launchers of a Slurm job meet: the job's first node, by a name or address that all reach. No torch."""

from __future__ import annotations

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
