"""
Follows a run's files: what is new since a tracker got its last line, also after a resume that took lines back. No torch.

Beside each file that it follows, a tracker keeps the checksum of each line that it got. The lines of a file that was
rewritten are compared with them: the first that differs shows where the run went back to. This needs no clock, and no
agreement with the writer.
"""

from __future__ import annotations

import array
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from shoal.run.folder import RunFolder
from shoal.run.jsonl import object_of
from shoal.run.records import Evaluation, RanksRecord, StepRecord
from shoal.trackers.points import Batch, Note, Scalars, note_of, of_evaluation, of_ranks, of_step

LINES_AT_ONCE: Final = 2_000  # of each file: what is in memory at a time


class Followed:
    """A file of JSON lines and the checksums of those that were sent, which a file beside it keeps."""

    def __init__(self, path: Path, sent_file: Path) -> None:
        self.path = path
        self.went_back = False  # whether lines that were sent are no longer in the file
        self._sent_file = sent_file
        self._sent = array.array("I")
        if sent_file.is_file():
            data = sent_file.read_bytes()
            self._sent.frombytes(data[: len(data) // 4 * 4])
        self._saved = len(self._sent)  # how many of them are in the file
        self._inode, self._offset = 0, 0  # the position in bytes after the last line sent
        self._ahead, self._read = 0, array.array("I")  # the same for lines that were read and not yet sent

    def read(self, limit: int = LINES_AT_ONCE) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """
        Return the lines after those that were sent, at most `limit`; if the file is new to this process or was rewritten, also
        the last line that was sent and is still there.

        Sets `went_back`. The same lines are returned again until `commit`.
        """
        self.went_back, kept, found = False, None, []
        self._read = array.array("I")
        if not self.path.is_file():
            return [], None
        with self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                kept = self._compare(file)
                self._inode = status.st_ino
            file.seek(self._offset)
            self._ahead = self._offset
            for end, record in _lines(file, self._offset):
                if record is not None:
                    found.append(record)
                    self._read.append(_checksum(record))
                self._ahead = end
                if len(found) == limit:
                    break
        return found, kept

    def _compare(self, file: BinaryIO) -> dict[str, Any] | None:
        """Find the first line that differs from those sent; forget the checksums from there on. Return the line before it."""
        self._offset, count, last = 0, 0, None
        for end, record in _lines(file, 0):
            if record is not None:
                if count == len(self._sent) or _checksum(record) != self._sent[count]:
                    break
                count, last = count + 1, record
            self._offset = end
        self.went_back = count < len(self._sent)
        del self._sent[count:]
        if count < self._saved:
            os.truncate(self._sent_file, self._sent.itemsize * count)
            self._saved = count
        return last

    def look_again(self) -> None:
        """Compare the file with what was sent at the next `read`, as if it were new."""
        self._inode = 0

    def commit(self, *, safe: bool) -> None:
        """Note that the lines last read were sent. safe: whether they, and all before them, need not be sent after a crash."""
        self._sent.extend(self._read)
        self._read = array.array("I")
        self._offset = self._ahead
        if safe and self._saved < len(self._sent):
            with self._sent_file.open("ab") as file:
                file.write(self._sent[self._saved :].tobytes())
            self._saved = len(self._sent)


def _checksum(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _lines(file: BinaryIO, offset: int) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield the position after each whole line and its record, None for a line that is none."""
    for line in file:
        if not line.endswith(b"\n"):
            return
        offset += len(line)
        yield offset, object_of(line)


class Follower:
    """All files of a run that a tracker gets, as batches."""

    def __init__(self, folder: RunFolder, kept: Path) -> None:
        """kept: the folder with the checksums of the lines sent to this tracker."""
        self._folder, self._kept = folder, kept
        self._metrics = Followed(folder.metrics_file, kept / "metrics.sent")
        self._ranks = Followed(folder.ranks_file, kept / "ranks.sent")
        self._events = Followed(folder.events_file, kept / "events.sent")
        self._starts: list[tuple[float, int]] = []  # (time, processes) of each start
        self._samples = _read_json(kept / "samples.sent")
        self._new_samples: dict[str, Any] = {}
        self._step = 0

    def read(self) -> Batch:
        """Return what was not sent yet, at most some thousand lines. The same batch is returned again until `commit`."""
        batch = Batch()
        events, _ = self._events.read()
        lines, kept = self._metrics.read()
        if kept is not None or self._metrics.went_back:
            batch.cut = int(kept["step"]) if kept else 0
        self._learn_starts(events)
        batch.scalars += [self._scalars(line) for line in lines]
        self._step = batch.scalars[-1].step if batch.scalars else self._step
        ranks, _ = self._ranks.read()
        batch.scalars += [_of_ranks_line(line) for line in ranks if "busy_seconds" in line]
        batch.notes += [note_of(event, self._step) for event in events if "event" in event]
        batch.notes += self._read_samples()
        return batch

    def commit(self, *, safe: bool) -> None:
        """Note that the last batch was sent. safe: whether it need not be sent after a crash."""
        for each in (self._metrics, self._ranks, self._events):
            each.commit(safe=safe)
        if self._new_samples:
            self._samples |= self._new_samples
            self._new_samples = {}
            if safe:
                (self._kept / "samples.sent").write_text(json.dumps(self._samples), encoding="utf-8")

    def look_again(self) -> None:
        """Compare the files with what was sent before the next batch is read; that batch then has a `cut`."""
        for each in (self._metrics, self._ranks, self._events):
            each.look_again()

    def last_started(self) -> dict[str, Any]:
        """Return the last event "started"; empty if there is none."""
        return next((e for e in reversed(self._all_starts()) if e), {})

    def _all_starts(self) -> list[dict[str, Any]]:
        if not self._folder.events_file.is_file():
            return []
        with self._folder.events_file.open("rb") as file:
            return [e for _, e in _lines(file, 0) if e is not None and e.get("event") == "started"]

    def _learn_starts(self, events: Sequence[Mapping[str, Any]]) -> None:
        if not self._starts or any(event.get("event") == "started" for event in events):
            self._starts = [(float(e.get("time") or 0), int(e.get("processes") or 1)) for e in self._all_starts()]

    def _devices(self, time: float) -> int:
        """Return the number of processes at a time."""
        before = [count for begun, count in self._starts if begun <= time]
        return before[-1] if before else self._starts[0][1] if self._starts else 1

    def _scalars(self, line: Mapping[str, Any]) -> Scalars:
        time = float(line.get("time") or 0.0)
        if "val_loss" in line:
            return Scalars(int(line["step"]), time, of_evaluation(Evaluation.of_line(line)))
        devices = self._devices(time) if time else self._starts[-1][1] if self._starts else 1
        return Scalars(int(line["step"]), time, of_step(StepRecord.of_line(line), devices))

    def _read_samples(self) -> Sequence[Note]:
        """Return the files of samples that are new or were changed."""
        found, self._new_samples = [], {}
        for path in sorted(self._folder.samples.glob("*.txt")):
            status = path.stat()
            seen = [status.st_mtime_ns, status.st_size]
            if self._samples.get(path.name) != seen:
                text = path.read_text(encoding="utf-8", errors="replace")
                found.append(Note(self._step, status.st_mtime, f"samples/{path.stem}", text))
                self._new_samples[path.name] = seen
        return found


def _of_ranks_line(line: Mapping[str, Any]) -> Scalars:
    record = RanksRecord.of_line(line)
    return Scalars(record.step, float(record.time or 0.0), of_ranks(record))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
