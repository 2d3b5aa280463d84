"""Which node, or which pair of nodes, is at fault when connections fail. No torch."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shoal.doctor.facts import Facts
from shoal.doctor.findings import Finding, blame, differing
from shoal.doctor.judge_node import is_loopback

Opened = Mapping[str, Sequence[tuple[int, int, str]]]  # by node: see `Listener.opened`
Seen = Mapping[str, Mapping[str, Mapping[str, Any]]]  # by node and target: see `connect`
ANOTHER: Final = "another machine answered"
LARGE: Final = "large packets are lost"


def judge_wires(facts: Mapping[str, Facts], opened: Opened, seen: Seen) -> list[Finding]:
    """Return what is wrong between nodes, from what each saw of the others."""
    found = list(_in_use(opened))
    found += _names(facts, seen)
    found += _ports(facts, seen)
    return [*found, *_interfaces(facts, seen)]


def open_pairs(seen: Seen) -> set[tuple[str, str]]:
    """Return the ordered pairs (from, to) of nodes whose connections all work."""
    return {
        (a, b)
        for a, targets in seen.items()
        for b, what in targets.items()
        if what["problems"] and not any(what["problems"].values())
    }


def _in_use(opened: Opened) -> Iterator[Finding]:
    for node, ports in opened.items():
        if wrong := [f"{asked} ({why})" for asked, _, why in ports if why]:
            yield Finding("port-in-use", (node,), f"port {', '.join(wrong)}; end that program, or use other ports")


def _names(facts: Mapping[str, Facts], seen: Seen) -> Iterator[Finding]:
    """Yield names without an address, or with one that leads nowhere."""
    nodes = list(facts)
    unknown, loop, wrong = set(), set(), set()
    for a, targets in seen.items():
        for b, what in targets.items():
            if not what["addresses"]:
                unknown.add((a, b))
            elif all(is_loopback(address) for address in what["addresses"]):
                loop.add((a, b))
            elif ANOTHER in what["problems"].values():
                wrong.add((a, b))
    for fault, pairs, text, fix in (
        ("name-unknown", unknown, "the name has no address", "add it to DNS, or to /etc/hosts on all nodes"),
        ("name-loopback", loop, "the name is a loopback address", "correct /etc/hosts there"),
        ("name-wrong", wrong, "the name leads to another machine", "correct DNS or /etc/hosts there"),
    ):
        for who in blame(pairs, nodes):
            yield Finding(fault, who, f"{text}: {_directions(pairs, who)}; {fix}")


def _ports(facts: Mapping[str, Facts], seen: Seen) -> Iterator[Finding]:
    """Yield blocked ports and lost packets, for each set of pairs that fail alike."""
    nodes = list(facts)
    failed = {
        (a, b): {port: why for port, why in what["problems"].items() if why}
        for a, targets in seen.items()
        for b, what in targets.items()
        if ANOTHER not in what["problems"].values()
    }
    lost = {pair for pair, ports in failed.items() if LARGE in ports.values()}
    blocked = {pair for pair, ports in failed.items() if any(why != LARGE for why in ports.values())}
    for who in blame(lost, nodes):
        yield Finding(
            "large-packets", who,
            f"small packets arrive, large ones do not: {_directions(lost, who)}; a switch or tunnel on the way has a "
            "smaller MTU than the nodes",
        )  # fmt: skip
    for who in blame(blocked, nodes):
        concerned = {pair: failed[pair] for pair in blocked if not who or set(who) <= set(pair)}
        words = Counter(why for ports in concerned.values() for why in ports.values())
        ports = sorted({port for ports in concerned.values() for port in ports}, key=int)
        named = ", ".join("a port that the system chose" if port == "0" else port for port in ports)
        yield Finding(
            "port-blocked", who,
            f"{words.most_common(1)[0][0]}: {_directions(blocked, who)}, port {named}; allow all TCP ports between the "
            "nodes, since gloo and NCCL use any port",
        )  # fmt: skip


def _directions(pairs: set[tuple[str, str]], who: tuple[str, ...]) -> str:
    """Describe the connections of `who` that fail: "from n1 to n2"."""
    concerned = sorted(pair for pair in pairs if not who or set(who) <= set(pair))
    if len(who) == 1:
        towards = [a for a, b in concerned if b == who[0]]
        away = [b for a, b in concerned if a == who[0]]
        parts = [f"from {', '.join(towards)}"] * bool(towards) + [f"to {', '.join(away)}"] * bool(away)
        return " and ".join(parts)
    return ", ".join(f"from {a} to {b}" for a, b in concerned[:4]) + ", ..." * (len(concerned) > 4)


def _interface_of(node: str, seen: Seen) -> str | None:
    """Return the network interface through which a node reaches most of the others."""
    used = Counter(what["interface"] for what in seen.get(node, {}).values() if what["interface"])
    return used.most_common(1)[0][0] if used else None


def _interfaces(facts: Mapping[str, Facts], seen: Seen) -> Iterator[Finding]:
    """Yield differences between the interfaces that connect the nodes."""
    used = {node: facts[node].interfaces[name] for node in seen if (name := _interface_of(node, seen))}
    mtus = {node: interface.mtu for node, interface in used.items()}
    yield from differing("mtu", "the MTU of the network interface", mtus, "set one MTU on all nodes")
    speeds = {node: interface.mbit for node, interface in used.items() if interface.mbit > 0}
    usual = statistics.median(speeds.values()) if speeds else 0
    for node, speed in speeds.items():
        if speed < 0.5 * usual:
            yield Finding(
                "link-speed", (node,),
                f"{_interface_of(node, seen)} runs at {speed} Mbit/s, on most nodes at {usual:.0f}; check cable and switch",
            )  # fmt: skip
