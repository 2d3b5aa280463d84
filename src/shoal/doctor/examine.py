"""An examination, in the order of its events. A node's own faults are found before those between nodes. No torch."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.doctor.facts import Facts
from shoal.doctor.findings import Finding, Report
from shoal.doctor.judge_folder import judge_behavior, judge_looks, judge_seen, of_all
from shoal.doctor.judge_node import Wanted, judge_nodes
from shoal.doctor.judge_wires import judge_wires
from shoal.doctor.reach import START_SECONDS, Node, Silence, ask_all, ask_each, close_all
from shoal.doctor.speed import SLOW_DISK, TURNS, examine_speed
from shoal.doctor.wires import ANY_PORT, BULK_SECONDS, CONNECT_SECONDS, WORD_BYTES
from shoal.system.disk import gigabytes

FACTS_SECONDS: Final = 30.0
FOLDER_SECONDS: Final = 15.0  # a file system that does not answer for so long hangs
CLOCK_TRIES: Final = 5
CLOCK_SECONDS: Final = 1.0  # that clocks may differ; runs on several nodes tolerate two
RACE_FILES: Final = 20
WRITE_BYTES: Final = 16 << 20
QUICK_WRITE_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Plan:
    """
    What to examine.

    commands: by node, the command that starts its probe. shared: a folder that should be one on all nodes; None: not checked.
    ports: that runs listen on. quick: whether to skip what needs torch, and large writes.
    """

    commands: Mapping[str, Sequence[str]]
    shared: Path | None
    ports: Sequence[int]
    wanted: Wanted
    quick: bool = False


def examine(plan: Plan, report: Report) -> None:
    """Examine the nodes, and add what is found to the report."""
    started = [Node(name, command) for name, command in plan.commands.items()]
    try:
        nodes = reach(started, report)
        nodes, facts = look_at_each(nodes, plan, report)
        if not nodes:
            return
        seen: dict[str, dict[str, Any]] = {}
        if len(nodes) > 1:
            compare_clocks(nodes, report)
            seen = connect_all(nodes, facts, plan, report)
        else:
            try_ports(nodes, plan, report)
        if plan.shared is not None:
            use_folder(nodes, plan, report)
        if not plan.quick:
            examine_speed(nodes, facts, seen, report)
    finally:
        close_all(started)


def answered(nodes: Sequence[Node], found: Mapping[str, Any], what: str, report: Report) -> list[Node]:
    """Return the nodes that answered, and report the others. what: the check, in words."""
    silent = {node.name: each for node in nodes if isinstance(each := found[node.name], Silence)}
    for name, silence in silent.items():
        report.add([Finding("no-answer", (name,), f"{what}: {silence.why}")])
    return [node for node in nodes if node.name not in silent]


def reach(nodes: Sequence[Node], report: Report) -> list[Node]:
    """Wait until the probes have started; report nodes that cannot be reached."""
    found = ask_all(nodes, "time", START_SECONDS)
    for node in nodes:
        silence = found[node.name]
        if isinstance(silence, Silence):
            report.add([Finding(*_why_unreachable(node.name, silence))])
    return [node for node in nodes if not isinstance(found[node.name], Silence)]


def _why_unreachable(name: str, silence: Silence) -> tuple[str, tuple[str, ...], str]:
    words = silence.why
    if "No module named" in words or "unknown request" in words:
        return "no-shoal", (name,), f"{words}; install the same shoal there, or start from a shared disk"
    if "/bin/python" in words:  # the shell's message, which says why it cannot be started
        return "no-shoal", (name,), f"{words}; this Python must exist on all nodes, and the user may run it"
    if not silence.is_over:
        return "unreachable", (name,), f"no answer within {START_SECONDS:.0f} s; is it up?"
    return "unreachable", (name,), f"{words}; check that `ssh {name} true` works without a password"


def look_at_each(nodes: Sequence[Node], plan: Plan, report: Report) -> tuple[list[Node], dict[str, Facts]]:
    """Ask each node for its facts, and judge them; return the remaining nodes, each machine once."""
    found = ask_all(nodes, "facts", FACTS_SECONDS)
    nodes = answered(nodes, found, "its versions, limits and devices", report)
    facts = {node.name: Facts.of_json(found[node.name]) for node in nodes}
    first: dict[str, str] = {}
    for name, each in facts.items():
        other = first.setdefault(each.machine, name)
        if other != name:
            report.add([Finding("same-machine", (name,), f"this is the same machine as {other}; name each node once")])
    nodes = [node for node in nodes if first[facts[node.name].machine] == node.name]
    facts = {node.name: facts[node.name] for node in nodes}
    report.add(judge_nodes(facts, dict.fromkeys(facts, plan.wanted)))
    for name, each in facts.items():
        if each.gpus.get("xid_unknown") and each.gpus.get("cards"):
            report.unchecked.append(f"{name}: errors of the GPU driver (Xid): dmesg: {each.gpus['xid_unknown']}")
    return nodes, facts


def compare_clocks(nodes: Sequence[Node], report: Report) -> None:
    """Compare the nodes' clocks through this one: of several tries, the quickest answer tells most exactly."""
    offsets = {}
    for node in nodes:
        tries = []
        for _ in range(CLOCK_TRIES):
            before = time.time()
            node.request("time", {})
            answer = node.answer(time.monotonic() + CONNECT_SECONDS)
            after = time.time()
            if isinstance(answer, Silence):
                break
            tries.append((after - before, answer - (before + after) / 2))
        if tries:
            offsets[node.name] = min(tries)[1]
    report.add(judge_clocks(offsets))


def judge_clocks(offsets: Mapping[str, float]) -> list[Finding]:
    """Return the nodes whose clocks differ from most. offsets: seconds ahead of this machine's clock, by node."""
    fix = "synchronize it with NTP (chrony, systemd-timesyncd)"
    if len(offsets) == 2:
        (a, mine), (b, other) = offsets.items()
        if abs(mine - other) <= CLOCK_SECONDS:
            return []
        return [Finding("clock", (a, b), f"their clocks differ by {abs(mine - other):,.1f} s; {fix}")]
    usual = statistics.median_low(offsets.values()) if offsets else 0.0
    return [
        Finding("clock", (name,), f"its clock is {abs(off):,.1f} s {'ahead' if off > 0 else 'behind'}; {fix}")
        for name, offset in offsets.items()
        if abs(off := offset - usual) > CLOCK_SECONDS
    ]


def try_ports(nodes: Sequence[Node], plan: Plan, report: Report) -> None:
    """Try whether the ports of a single machine are free."""
    found = ask_all(nodes, "listen", FOLDER_SECONDS, ports=list(plan.ports), password=_word(), word=_word())
    report.add(judge_wires({}, {n: opened for n, opened in found.items() if not isinstance(opened, Silence)}, {}))


def connect_all(
    nodes: Sequence[Node], facts: Mapping[str, Facts], plan: Plan, report: Report
) -> dict[str, dict[str, Any]]:
    """Let each node connect to each other by name, and judge the result; return what each saw, see `connect`."""
    password, words = _word(), {node.name: _word() for node in nodes}
    ports = [*plan.ports, ANY_PORT]
    requests = {node: {"ports": ports, "password": password, "word": words[node.name]} for node in nodes}
    opened = {
        n: each for n, each in ask_each(requests, "listen", FOLDER_SECONDS).items() if not isinstance(each, Silence)
    }
    targets = {
        name: {"word": words[name], "ports": [(asked, port) for asked, port, _ in each if port]}
        for name, each in opened.items()
    }
    asking: dict[Node, dict[str, Any]] = {
        node: {"targets": {n: t for n, t in targets.items() if n != node.name}, "password": password} for node in nodes
    }
    # Names that no server knows take a while, and a large job has more ports than threads
    patience = 2 * (CONNECT_SECONDS + BULK_SECONDS) * (1 + len(nodes) * len(ports) // 64) + 10
    found = ask_each(asking, "connect", patience)
    seen = {name: each for name, each in found.items() if not isinstance(each, Silence)}
    answered(nodes, found, "connecting to the other nodes", report)
    report.add(judge_wires(facts, opened, seen))
    return seen


def _word() -> str:
    return secrets.token_hex(WORD_BYTES // 2)


def use_folder(nodes: Sequence[Node], plan: Plan, report: Report) -> None:
    """Use the shared folder from all nodes at once, and judge how it behaves."""
    assert plan.shared is not None
    path, token = str(plan.shared), _word()
    numbers = {node: number for number, node in enumerate(nodes)}
    asking = {node: {"path": path, "token": token, "number": number} for node, number in numbers.items()}
    looks = ask_each(asking, "folder", FOLDER_SECONDS)
    nodes = answered(nodes, looks, f"the shared folder {path} hangs", report)
    report.add(judge_looks(path, {node.name: looks[node.name] for node in nodes}))
    usable = [node for node in nodes if not looks[node.name]["fault"]]
    try:
        if len(usable) > 1:
            usable = share_folder(usable, numbers, path, report)
        if usable:
            write_folder(usable, path, QUICK_WRITE_BYTES if plan.quick else WRITE_BYTES, report)
    finally:
        ask_all(nodes, "in folder", FOLDER_SECONDS, action="clean")


def share_folder(nodes: Sequence[Node], numbers: Mapping[Node, int], path: str, report: Report) -> list[Node]:
    """Check that the nodes see one folder; return those that do."""

    def all_do(action: str, **arguments: Any) -> dict[str, Any]:
        found = ask_all(nodes, "in folder", FOLDER_SECONDS, action=action, **arguments)
        return {name: each for name, each in found.items() if not isinstance(each, Silence)}

    seen = all_do("see", numbers=[numbers[node] for node in nodes])
    order = sorted(numbers, key=lambda node: numbers[node])
    apart = judge_seen(path, [node.name for node in order], seen)
    report.add(apart)
    alone = {name for finding in apart for name in (finding.nodes if len(finding.nodes) == 1 else finding.nodes[1:])}
    if any(not finding.nodes for finding in apart):
        return list(nodes)[:1]
    nodes = [node for node in nodes if node.name not in alone]
    if len(nodes) < 2:
        return list(nodes)
    won = all_do("race", count=RACE_FILES)
    got: dict[str, bool] = {}
    for text in ("old", "new"):  # once read, the old content is in the other nodes' caches
        ask_all(nodes[:1], "in folder", FOLDER_SECONDS, action="put", text=text)
        got = all_do("get", text=text)
    report.add(judge_behavior(path, won, got, all_do("lock")))
    return list(nodes)


def write_folder(nodes: Sequence[Node], path: str, count: int, report: Report) -> None:
    """Write to the folder from all nodes at once, and report failures and nodes that are much slower."""
    found = ask_all(nodes, "in folder", 2 * FOLDER_SECONDS, action="write", count=count)
    nodes = answered(nodes, found, f"writing {gigabytes(count)} to {path}", report)
    bad = [Finding(f["fault"], (n,), f"{path}: {f['why']}") for n, f in found.items() if _failed(f)]
    report.add(of_all(bad, found))
    rates = {node.name: count / found[node.name]["seconds"] for node in nodes if not _failed(found[node.name])}
    if not rates:
        return
    report.figures[f"writing to {path}"] = (
        f"{sum(rates.values()) / 1e6:,.0f} MB/s from {len(rates)} node{'s' * (len(rates) > 1)} at once"
    )
    by_name = {node.name: node for node in nodes}
    good = by_name[max(rates, key=lambda name: rates[name])]

    def rate_alone(node: Node) -> float:
        again = ask_all([node], "in folder", 2 * FOLDER_SECONDS, action="write", count=count)[node.name]
        return 0.0 if isinstance(again, Silence) or _failed(again) else count / again["seconds"]

    for name, rate in rates.items():
        others = [each for other, each in rates.items() if other != name]
        if not others or rate >= SLOW_DISK * statistics.median(others):
            continue
        for _ in range(TURNS):
            mine, right = rate_alone(by_name[name]), rate_alone(good)
            rate = max(rate, mine)
            if mine >= SLOW_DISK * right:
                break
        else:
            text = f"{path}: writes {rate / 1e6:,.1f} MB/s, {good.name} {right / 1e6:,.0f} MB/s"
            report.add([Finding("shared-slow", (name,), f"{text}; check its network and its mount options")])


def _failed(answer: Any) -> bool:
    return isinstance(answer, dict) and bool(answer["fault"])
