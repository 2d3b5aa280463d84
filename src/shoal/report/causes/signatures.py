"""A signature recognizes one kind of failure in a line of a log. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

# "cause": a process failed by itself. "outside": the kernel or Slurm reports why a process or a node failed. "follows": usually
# the consequence of another process's failure. "end": says only how a process ended.
Kind = Literal["cause", "outside", "follows", "end"]


@dataclass(frozen=True)
class Signature:
    """
    One kind of failure.

    pattern: searched for in a line; its named groups fill `what`. what: completes "rank 3 on node1 ...". helps: what a user can
    do; may be empty. seen: whether a test produces it with a real failure; otherwise its lines are from published reports.
    """

    name: str
    pattern: re.Pattern[str]
    what: str
    helps: str = ""
    kind: Kind = "cause"
    seen: bool = True

    def sentence(self, found: re.Match[str]) -> str:
        """Return `what` with the groups of a match."""
        return self.what.format(**{name: value or "?" for name, value in found.groupdict().items()})


def signature(
    name: str, pattern: str, what: str, helps: str = "", *, kind: Kind = "cause", seen: bool = True
) -> Signature:
    """Return a signature with a compiled pattern."""
    return Signature(name, re.compile(pattern), what, helps, kind, seen)


def recognize(line: str, among: Sequence[Signature]) -> tuple[Signature, re.Match[str]] | None:
    """Return the first signature whose pattern is in `line`, with the match; None if there is none."""
    for each in among:
        if found := each.pattern.search(line):
            return each, found
    return None


# Meanings of the errors that NVIDIA's driver reports most often in training (NVIDIA, "Xid Errors").
XIDS: Final = {
    13: "a kernel of the program failed",
    31: "a kernel of the program accessed invalid memory",
    32: "corrupted commands",
    38: "a driver error",
    43: "the GPU stopped processing a failed program",
    45: "cleanup after the program ended",
    48: "an uncorrectable memory error (ECC)",
    61: "an internal error of the GPU",
    62: "an internal error of the GPU",
    63: "a memory row was remapped",
    64: "a memory row could not be remapped",
    74: "an NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many corrected memory errors (ECC)",
    94: "a contained memory error (ECC)",
    95: "an uncontained memory error (ECC)",
    109: "the GPU switched tasks too slowly",
    119: "the GPU's system processor did not answer",
    120: "an error of the GPU's system processor",
    140: "an unrecovered memory error (ECC)",
    145: "an NVLink error",
    149: "an NVLink error",
}
XIDS_THAT_FOLLOW: Final = (43, 45)  # the driver's cleanup after a process has failed
