"""Whether the shared folder is one folder, and behaves like one. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shoal.doctor.findings import Finding, blame
from shoal.doctor.judge_node import LEAST_INODES
from shoal.system.disk import gigabytes

LEAST_FREE_BYTES: Final = 1 << 30
_FIXES: Final = {
    "shared-missing": "mount it there, or give another folder",
    "read-only": "mount it writable, or correct its owner and permissions",
    "disk-full": "remove old checkpoints or other files",
    "inodes": "remove small files",
    "quota": "remove files, or ask for a larger quota",
}


def judge_looks(path: str, looks: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Return which nodes cannot use the folder, from `Folder.look`. A fault of all nodes names none."""
    found = [
        Finding(each["fault"], (node,), f"{path}: {each['why']}; {_FIXES[each['fault']]}")
        for node, each in looks.items()
        if each["fault"]
    ]
    for node, each in looks.items():
        if not each["fault"]:
            found += _room(path, node, each)
    return of_all(found, looks)


def _room(path: str, node: str, look: Mapping[str, Any]) -> Iterator[Finding]:
    room = look["space"]
    if room["inodes_free"] is not None and room["inodes_free"] < LEAST_INODES:
        text = f"{path} has room for {room['inodes_free']} more files (inodes); {_FIXES['inodes']}"
        yield Finding("inodes", (node,), text)
    elif room["free_bytes"] < LEAST_FREE_BYTES:
        free = f"{gigabytes(room['free_bytes'])} of {gigabytes(room['total_bytes'])}"
        yield Finding("disk-full", (node,), f"{path} has {free} free; {_FIXES['disk-full']}")
    if look["quota"]:
        yield Finding("quota", (node,), f"{path}: {look['quota']}; {_FIXES['quota']}")


def of_all(found: Sequence[Finding], nodes: Mapping[str, Any]) -> list[Finding]:
    """Merge findings that all of several nodes share into one that names none: the disk is at fault, not a node."""
    counts = Counter(f.fault for f in found)
    common = {fault for fault, count in counts.items() if count == len(nodes) > 1}
    merged = {f.fault: Finding(f.fault, (), f.text, f.is_warning) for f in found if f.fault in common}
    return [*(f for f in found if f.fault not in common), *merged.values()]


def judge_seen(path: str, nodes: Sequence[str], seen: Mapping[str, Sequence[int]]) -> list[Finding]:
    """Return which nodes have another folder at this path. seen: by node, the numbers of the nodes whose files it sees."""
    apart = {(a, b) for a, numbers in seen.items() for i, b in enumerate(nodes) if b in seen and i not in numbers}
    return [
        Finding(
            "not-shared", who,
            f"{path} is another folder here: files of the other nodes do not appear; mount the shared disk there"
            if len(who) == 1
            else f"{path} is not one folder on {' and '.join(who) if who else 'the nodes'}; give a folder on a shared disk",
        )
        for who in blame(apart, list(seen))
    ]  # fmt: skip


def judge_behavior(
    path: str, won: Mapping[str, Sequence[int]], got: Mapping[str, bool], locks: Mapping[str, str]
) -> list[Finding]:
    """
    Return in which ways the folder behaves unlike a local one.

    won: by node, the files that it created with O_EXCL. got: whether it saw the new content of a replaced file. locks: the results
    of one lock that all asked for.
    """
    found = []
    twice = [n for n, count in Counter(n for numbers in won.values() for n in numbers).items() if count > 1]
    if twice:
        text = f"{path}: {len(twice)} files could be created by two nodes each (O_EXCL); use another file system"
        found.append(Finding("not-exclusive", (), text))
    stale = [node for node, saw in got.items() if not saw]
    text = f"{path}: a file that another node replaced keeps its old content here; mount the disk without such a cache"
    found += of_all([Finding("not-renamed", (node,), text) for node in stale], got)
    taken = [node for node, state in locks.items() if state == "taken"]
    if len(taken) > 1:
        text = f"{path}: {' and '.join(taken)} hold one lock together; two launchers could train one run. Mount the disk with locks (flock)"
        found.append(Finding("locks", (), text, is_warning=True))
    if none := [node for node, state in locks.items() if state == "none"]:
        text = f"{path} has no locks; nothing then stops two launchers from training one run"
        found += of_all([Finding("locks", (node,), text, is_warning=True) for node in none], locks)
    return found
