"""The history of a GPU's allocator in the recorded steps, as values for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from shoal.system.torch_private import PRIVATE, exists

MOST_EVENTS: Final = 100_000  # of the allocator, in memory
KEPT_BLOCKS: Final = 1000  # the largest blocks in use that are written


class AllocatorHistory:
    """
    Records who allocates on a GPU; on a CPU it does nothing.

    torch's own functions for this are private: without them, the snapshot is empty. Its pickled form is never used.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.is_available = device.type == "cuda" and all(map(exists, PRIVATE["memory_snapshot"].names))

    def start(self) -> None:
        """Record from now on: stacks of Python, of the newest events."""
        if self.is_available:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")

    def read(self) -> dict[str, Any]:
        """Stop, and return the summary of the snapshot; empty on a CPU."""
        if not self.is_available:
            return {}
        found: Mapping[str, Any] = torch.cuda.memory._snapshot(self._device)
        torch.cuda.memory._record_memory_history(enabled=None)
        return summarize(found)


def summarize(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """Return the totals of a snapshot, its bytes by line of code, and its largest blocks, as values for JSON."""
    blocks = [b for segment in snapshot["segments"] for b in segment["blocks"] if b["state"] == "active_allocated"]
    by_line: Counter[str] = Counter()
    for block in blocks:
        by_line[_line(block.get("frames", ()))] += block["size"]
    largest = sorted(blocks, key=lambda block: -block["size"])[:KEPT_BLOCKS]
    return {
        "reserved_bytes": sum(segment["total_size"] for segment in snapshot["segments"]),
        "allocated_bytes": sum(block["size"] for block in blocks),
        "segments": len(snapshot["segments"]),
        "bytes_by_line": dict(by_line.most_common(KEPT_BLOCKS)),
        "largest_blocks": [[block["size"], _line(block.get("frames", ()))] for block in largest],
    }


def _line(frames: Sequence[Mapping[str, Any]]) -> str:
    """Return "file:line function" of the innermost Python frame; "unknown" for a block from before the recording."""
    return f"{frames[0]['filename']}:{frames[0]['line']} {frames[0]['name']}" if frames else "unknown"
