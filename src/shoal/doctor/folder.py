"""The shared folder, as a probe sees it: is it one folder on all nodes, and does it behave as runs need? No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Final

from shoal.doctor.command import run_quietly
from shoal.doctor.facts import space
from shoal.system.disk import NoLocksError, try_lock

PATIENCE_SECONDS: Final = 5.0  # NFS shows what another node wrote a few seconds later
_POLL_SECONDS: Final = 0.05
_FAULTS: Final = {
    errno.ENOENT: "shared-missing", errno.ENOTDIR: "shared-missing", errno.EROFS: "read-only", errno.EACCES: "read-only",
    errno.EPERM: "read-only", errno.ENOSPC: "disk-full", errno.EDQUOT: "quota",
}  # fmt: skip


class Folder:
    """
    A folder of the doctor's own inside the shared one, the same on all nodes if the shared one is.

    path: the shared folder. token: names the doctor's folder. number: this node's; its files bear it.
    """

    def __init__(self, path: str, token: str, number: int) -> None:
        self._shared, self._number, self._token = Path(path), number, token
        self._mine = self._shared / f".shoal-doctor-{token}"
        self._lock: IO[bytes] | None = None

    def look(self) -> dict[str, Any]:
        """
        Create the doctor's folder and this node's file in it; return {"space", "fault", "why", "quota"}.

        fault: the name of the fault if that fails. quota: a text if the user's quota is nearly used up.
        """
        fault = why = ""
        try:
            self._mine.mkdir(exist_ok=True)
            self._write(f"node-{self._number}", self._token)
        except OSError as error:
            fault, why = _FAULTS.get(error.errno or 0, "read-only"), error.strerror or str(error)
        room = space(self._shared)
        if fault == "disk-full" and room.inodes_free == 0:
            fault = "inodes"
        return {"space": asdict(room), "fault": fault, "why": why, "quota": quota_of(self._shared)}

    def do(self, action: str, **arguments: Any) -> Any:
        """Return the result of an action, by its name; actions that need the other nodes are asked of all at once."""
        match action:
            case "see":
                return self._see(**arguments)
            case "race":
                return self._race(**arguments)
            case "put":
                return self._put(**arguments)
            case "get":
                return self._get(**arguments)
            case "lock":
                return self._take_lock()
            case "write":
                return self._write_much(**arguments)
            case "clean":
                shutil.rmtree(self._mine, ignore_errors=True)
                return None
            case _:
                raise ValueError(f"unknown action {action!r}: another version of shoal")

    def _see(self, numbers: Sequence[int]) -> list[int]:
        """Return those of the nodes whose files this node sees, after waiting for them for a while."""
        seen: set[int] = set()
        end = time.monotonic() + PATIENCE_SECONDS
        while True:
            with contextlib.suppress(OSError):
                os.listdir(self._mine)  # asks the server; a single name may be cached as missing
            seen |= {n for n in numbers if n not in seen and self._read(f"node-{n}") == self._token}
            if len(seen) == len(numbers) or time.monotonic() > end:
                return sorted(seen)
            time.sleep(_POLL_SECONDS)

    def _race(self, count: int) -> list[int]:
        """Return which of `count` files this node created; each may be created by one node only."""
        won = []
        for number in range(count):
            with contextlib.suppress(OSError):
                os.close(os.open(self._mine / f"race-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                won.append(number)
        return won

    def _put(self, text: str) -> None:
        """Replace the file `word` by one with other content."""
        self._write("word.new", text)
        os.replace(self._mine / "word.new", self._mine / "word")

    def _get(self, text: str) -> bool:
        """Return whether the file `word` has the content `text`, within a while."""
        end = time.monotonic() + PATIENCE_SECONDS
        while self._read("word") != text:
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _take_lock(self) -> str:
        """Take a lock that all nodes ask for, and keep it; return "taken", "held" by another node, or "none" without locks."""
        self._lock = (self._mine / "lock").open("ab")
        try:
            return "taken" if try_lock(self._lock.fileno()) else "held"
        except NoLocksError:
            return "none"

    def _write_much(self, count: int) -> dict[str, Any]:
        """Write `count` bytes and flush them to the disk; return {"seconds", "fault", "why"}."""
        part = os.urandom(1 << 20)  # a disk that compresses would be too fast
        path = self._mine / f"much-{self._number}"
        start = time.perf_counter()
        try:
            with path.open("wb") as file:
                for begin in range(0, count, len(part)):
                    file.write(part[: count - begin])
                file.flush()
                os.fsync(file.fileno())
            return {"seconds": time.perf_counter() - start, "fault": "", "why": ""}
        except OSError as error:
            return {"seconds": 0.0, "fault": _FAULTS.get(error.errno or 0, "read-only"), "why": error.strerror}
        finally:
            with contextlib.suppress(OSError):
                path.unlink()

    def _read(self, name: str) -> str:
        try:
            return (self._mine / name).read_text(encoding="ascii", errors="replace")
        except OSError:
            return ""

    def _write(self, name: str, text: str) -> None:
        with (self._mine / name).open("w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def quota_of(folder: Path) -> str:
    """Describe the user's quota on the folder's disk if at least 95% of it is used, as `quota` reports it; else return ""."""
    text, why = run_quietly(["quota", "-w", "-p"], 5.0)
    if why and not text:
        return ""  # there are no quotas, or none that this command knows
    disk = disk_of(folder)
    for line in text.splitlines():
        words = line.split()
        if len(words) != 9 or words[0] != disk:
            continue
        for unit, used, soft, hard in (("kB", *words[1:4]), ("files", *words[5:8])):
            limit = int(hard) or int(soft)
            count = int(used.rstrip("*"))
            if limit and count >= 0.95 * limit:
                return f"{count:,} of {limit:,} {unit} are used"
    return ""


def disk_of(folder: Path) -> str:
    """Return the device or server of the disk that holds `folder`, as mounted."""
    best, disk = -1, ""
    with contextlib.suppress(OSError):
        path = folder.resolve()
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
            device, at, *_ = line.split()
            if path.is_relative_to(at) and len(at) > best:
                best, disk = len(at), device
    return disk
