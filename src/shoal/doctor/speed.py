"""Which node computes slowly, and which pair of nodes exchanges slowly. Suspects are measured again alone. No torch here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shoal.doctor.facts import Facts
from shoal.doctor.findings import Finding, Report, blame
from shoal.doctor.judge_wires import Seen, open_pairs
from shoal.doctor.reach import Node, Silence, ask_each

SLOW_NODE: Final = 0.6  # fraction of the others' median below which a node is slow
SLOW_PAIR: Final = 0.5
SLOW_DISK: Final = 0.25
TURNS: Final = 5  # a suspect must be slower than a good one in each of these turns, because other programs come and go
PRODUCT: Final = {"seconds": 0.25, "tries": 2}
START_SECONDS: Final = 180.0  # to import torch from a cold shared disk on all nodes at once, and to open the GPUs
PAIR_BYTES: Final = 8 << 20
PAIR_SECONDS: Final = 30.0
MOST_ROUNDS: Final = 15  # each node meets as many others; among more nodes, not all pairs are tried


def examine_speed(nodes: Sequence[Node], facts: Mapping[str, Facts], seen: Seen, report: Report) -> None:
    """Measure products and all-reduces, and add what is slow or fails to the report. seen: what each node saw of the others."""
    usable = _start(nodes, facts, report)
    open_ = open_pairs(seen)
    rates = measure_products(usable)
    report.add(slow_nodes(usable, rates))
    for node, found in rates.items():
        if found:
            each = ", ".join(f"{device} {rate / 1e9:,.0f}" for device, rate in found.items())
            report.figures[f"matrix product on {node}"] = f"{each} GFLOP/s"
    pairs = [(a, b) for round_ in rounds(usable) for a, b in round_ if {(a.name, b.name), (b.name, a.name)} <= open_]
    examine_pairs(usable, pairs, seen, report)


def _start(nodes: Sequence[Node], facts: Mapping[str, Facts], report: Report) -> list[Node]:
    """Import torch on all nodes; return those on which that works and finds the GPUs that the driver has."""
    found = ask_torch({node: {} for node in nodes}, "devices", START_SECONDS)
    for node in nodes:
        if why := problem_of(found[node.name]):
            report.add([Finding("no-answer", (node.name,), f"torch does not start there: {why}; try shoal env there")])
    usable = [node for node in nodes if not problem_of(found[node.name])]
    for node in usable:
        cards, devices = len(facts[node.name].gpus.get("cards", [])), found[node.name]
        if cards and not devices["gpus"]:
            built = devices["built_for_cuda"]
            why = f"was built for CUDA {built}: is the driver too old?" if built else "was built without CUDA"
            report.add(
                [Finding("gpu-unused", (node.name,), f"the driver has {cards} GPUs, torch finds none; it {why}")]
            )
    return usable


def ask_torch(requests: Mapping[Node, Mapping[str, Any]], do: str, seconds: float) -> dict[str, Any]:
    """Ask the processes with torch on these nodes; return {node's name: answer}."""
    with_limits = {node: {"do": do, "seconds": seconds, **each} for node, each in requests.items()}
    return ask_each(with_limits, "torch", seconds + 5)


def problem_of(answer: Any) -> str:
    """Return why there is no result in an answer; an empty text if there is one."""
    return answer.why if isinstance(answer, Silence) else str(answer.get("problem", ""))


def measure_products(nodes: Sequence[Node]) -> dict[str, dict[str, float]]:
    """Return FLOP/s of a matrix product by node and device, all nodes at once; empty for a node without a result."""
    # "seconds" is the time limit of the request, so the product's own length has another name there
    found = ask_torch({node: {"options": PRODUCT} for node in nodes}, "product", START_SECONDS)
    return {name: {} if problem_of(each) else each["flops"] for name, each in found.items()}


def slow_nodes(nodes: Sequence[Node], rates: Mapping[str, Mapping[str, float]]) -> Iterator[Finding]:
    """Yield the nodes with a device that is slower than those of the others, after comparing it again with a good node, alone."""
    usual = statistics.median([rate for each in rates.values() for rate in each.values()] or [0.0])
    by_name = {node.name: node for node in nodes}
    good = next((n for n, each in rates.items() if each and min(each.values()) >= usual), None)
    for name, each in rates.items():
        others = [rate for n, found in rates.items() for d, rate in found.items() if (n, d) != _slowest(name, each)]
        if (
            not each
            or not others
            or good in (None, name)
            or min(each.values()) >= SLOW_NODE * statistics.median(others)
        ):
            continue
        device, rate = min(each.items(), key=lambda item: item[1])
        for _ in range(TURNS):
            mine = measure_products([by_name[name]])[name].get(device, 0.0)
            right = min(measure_products([by_name[str(good)]])[str(good)].values(), default=0.0)
            rate = max(rate, mine)
            if mine >= SLOW_NODE * right:
                break
        else:
            yield Finding(
                "slow-node", (name,),
                f"{device} computes {rate / 1e9:,.0f} GFLOP/s in a matrix product, {good} {right / 1e9:,.0f}; look for other "
                "programs, lowered clocks, or a limit of CPU time",
            )  # fmt: skip


def _slowest(name: str, rates: Mapping[str, float]) -> tuple[str, str]:
    return name, min(rates, key=lambda device: rates[device], default="")


def rounds(nodes: Sequence[Node]) -> list[list[tuple[Node, Node]]]:
    """Return rounds of disjoint pairs in which each node meets each other once, or `MOST_ROUNDS` others (circle method)."""
    ring: list[Node | None] = list(nodes)
    if len(ring) % 2:
        ring.append(None)
    found = []
    for _ in range(min(len(ring) - 1, MOST_ROUNDS)):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return found


def examine_pairs(nodes: Sequence[Node], pairs: Sequence[tuple[Node, Node]], seen: Seen, report: Report) -> None:
    """Time an all-reduce of each pair, and add slow and failing ones to the report."""
    seconds: dict[tuple[str, str], float] = {}
    failed: dict[tuple[str, str], str] = {}
    for round_ in rounds(nodes):
        now = [pair for pair in round_ if pair in pairs]
        results = reduce_in_pairs(now, seen)
        # A node that was busy with other programs for a while gets a second chance, alone
        results |= reduce_in_pairs([p for p in now if isinstance(results[p[0].name, p[1].name], str)], seen)
        for names, result in results.items():
            if isinstance(result, str):
                failed[names] = result
            else:
                seconds[names] = result
    everyone = [node.name for node in nodes]
    both_ways = {p for a, b in failed for p in ((a, b), (b, a))}
    for who in blame(both_ways, everyone):
        why = next(text for pair, text in failed.items() if not who or set(who) <= set(pair))
        report.add([Finding("pair-fails", who, f"an all-reduce fails: {why}")])
    by_name = {node.name: node for node in nodes}
    slow = slow_pairs(by_name, seconds, seen)
    computes_slowly = [f.nodes for f in report.findings if f.fault == "slow-node"]
    for who in blame({p for a, b in slow for p in ((a, b), (b, a))}, everyone):
        if who in computes_slowly:
            continue  # an all-reduce on a CPU is slow for the same reason
        speed = min(rate for pair, rate in slow.items() if not who or set(who) <= set(pair))
        usual = _rate(statistics.median(seconds.values()))
        text = f"an all-reduce runs at {_megabytes(speed)}, of most pairs at {_megabytes(usual)}; check cables and switch ports"
        report.add([Finding("slow-pair", who, text)])
    if seconds:
        worst = max(seconds, key=lambda pair: seconds[pair])
        report.figures["all-reduce in pairs"] = (
            f"median {_megabytes(_rate(statistics.median(seconds.values())))}, "
            f"slowest {_megabytes(_rate(seconds[worst]))} ({worst[0]}, {worst[1]})"
        )


def _rate(seconds: float) -> float:
    """Return bytes per second of an all-reduce between two nodes, each of which sends and receives the data once."""
    return PAIR_BYTES / seconds


def _megabytes(rate: float) -> str:
    return f"{rate / 1e6:,.0f} MB/s"


def slow_pairs(
    nodes: Mapping[str, Node], seconds: Mapping[tuple[str, str], float], seen: Seen
) -> dict[tuple[str, str], float]:
    """Return {slow pair: bytes/s}, each measured again alone, in turns with a pair of usual speed."""
    if len(seconds) < 2:
        return {}
    usual = statistics.median(seconds.values())
    good = min(seconds, key=lambda pair: abs(seconds[pair] - usual))
    found = {}
    for pair, first in seconds.items():
        if first <= usual / SLOW_PAIR or pair == good:
            continue
        speed = first
        for _ in range(TURNS):
            mine, usual_now = (_alone(each, nodes, seen) for each in (pair, good))
            speed = min(speed, mine)
            if mine <= usual_now / SLOW_PAIR:
                break
        else:
            found[pair] = _rate(speed)
    return found


def _alone(pair: tuple[str, str], nodes: Mapping[str, Node], seen: Seen) -> float:
    """Return the seconds of a pair's all-reduce while the others are idle; Inf if it fails."""
    result = reduce_in_pairs([(nodes[pair[0]], nodes[pair[1]])], seen)[pair]
    return math.inf if isinstance(result, str) else result


def reduce_in_pairs(pairs: Sequence[tuple[Node, Node]], seen: Seen) -> dict[tuple[str, str], float | str]:
    """Return by pair the seconds of an all-reduce of `PAIR_BYTES`, or why it failed; all pairs at once."""
    addresses = {(a.name, b.name): str(seen[b.name][a.name]["address"]) for a, b in pairs}
    serving = ask_torch({a: {"address": addresses[a.name, b.name]} for a, b in pairs}, "serve", PAIR_SECONDS)
    requests: dict[Node, dict[str, Any]] = {}
    for a, b in pairs:
        if problem_of(serving[a.name]):
            continue
        common = {
            "address": addresses[a.name, b.name],
            "port": serving[a.name]["port"],
            "count": PAIR_BYTES,
            "tries": 3,
        }
        requests[a] = {"rank": 0, "interface": seen[a.name][b.name]["interface"], **common}
        requests[b] = {"rank": 1, "interface": seen[b.name][a.name]["interface"], **common}
    found = ask_torch(requests, "pair", PAIR_SECONDS)
    results: dict[tuple[str, str], float | str] = {}
    for a, b in pairs:
        why = problem_of(serving[a.name]) or problem_of(found[a.name]) or problem_of(found[b.name])
        results[a.name, b.name] = why or max(float(found[n.name]["seconds"]) for n in (a, b))
    return results
