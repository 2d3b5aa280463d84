"""
The lowest held-out loss in a long `metrics.jsonl`, found without parsing its steps, and kept in `cache/facts.json`. No torch.

The cache says how many bytes were searched. It holds only while the file still has the bytes that ended there: a resume
rewrites the file, and a longer one is searched from where the last search ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

from shoal.run.folder import RunFolder
from shoal.system.disk import write_whole

_KEY: Final = b'"val_loss"'
_END: Final = 256  # bytes before the end of the last search that must be unchanged
_WORTH_KEEPING: Final = 1 << 20  # bytes; a shorter search is as fast as reading the cache


@dataclass(frozen=True)
class Best:
    """
    The evaluation with the lowest held-out loss, and how far the file was searched.

    last_step: step of the last evaluation; 0 if there is none. searched: bytes. end: the bytes before that place, as hex.
    """

    val_loss: float | None = None
    step: int | None = None
    last_step: int = 0
    searched: int = 0
    end: str = ""

    def with_line(self, line: bytes) -> Best:
        """Return the better of this and the evaluation in `line`."""
        try:
            found = json.loads(line)
            loss, step = float(found["val_loss"]), int(found["step"])
        except (ValueError, RecursionError, KeyError, TypeError):
            return self
        after = dataclasses.replace(self, last_step=max(step, self.last_step))
        better = math.isfinite(loss) and (self.val_loss is None or loss < self.val_loss)
        return dataclasses.replace(after, val_loss=loss, step=step) if better else after


def best_evaluation(folder: RunFolder) -> Best:
    """Return the best evaluation of a run; an empty one if there is none. Updates the cache if it can."""
    before = _read(folder)
    try:
        with folder.metrics_file.open("rb") as file:
            found = _search(file, before)
    except (OSError, ValueError):  # no file, or an empty one, which cannot be mapped
        return Best()
    if found.searched - before.searched > _WORTH_KEEPING:
        with contextlib.suppress(OSError):  # a folder of another user
            _cache(folder).parent.mkdir(exist_ok=True)
            write_whole(_cache(folder), [json.dumps(dataclasses.asdict(found)).encode()])
    return found


def _cache(folder: RunFolder) -> Any:
    return folder.path / "cache" / "facts.json"


def _read(folder: RunFolder) -> Best:
    try:
        return Best(**json.loads(_cache(folder).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return Best()


def _search(file: IO[bytes], before: Best) -> Best:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        begun = content[max(0, before.searched - _END) : before.searched].hex()
        found = before if begun == before.end else Best()
        for line in _evaluations(content, found.searched):
            found = found.with_line(line)
        whole = content.rfind(b"\n") + 1  # the last line may be half written
        return dataclasses.replace(found, searched=whole, end=content[max(0, whole - _END) : whole].hex())


def _evaluations(content: mmap.mmap, start: int) -> Iterator[bytes]:
    """Yield the whole lines from byte `start` on that have a held-out loss, last first: mmap searches faster backwards."""
    stop = len(content)
    while (at := content.rfind(_KEY, start, stop)) >= 0:
        begin, end = content.rfind(b"\n", start, at) + 1, content.find(b"\n", at)
        stop = begin = max(begin, start)
        if end >= 0:
            yield content[begin:end]
