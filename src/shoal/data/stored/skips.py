"""Records with a fault, counted by reason, in the journal and the manifest of a folder of prepared tokens. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from shoal.data.corpus.documents import LOST_PART, START, Cursor, Skipped
from shoal.data.corpus.paths import count_kinds
from shoal.errors import DataError
from shoal.system.output import on_one_line

NAMED_AT_MOST: Final = 5  # maximum number of files named in a message; the rest are counted
EXAMPLES: Final = 3  # maximum number of records named for each reason
COUNTS: Final = ("skips", "flaws", "overlap")  # a manifest's fields of this kind; an older one has fewer


@dataclass
class Skips:
    """
    Records with a fault: how many, the first few, and the place up to which they are counted. Those with several count for each.

    damaged: the number that counts against `data.bad_records`. lost: the first parts of files that are lost (`LOST_PART`).
    """

    count: int = 0
    first: list[str] = field(default_factory=list)
    upto: Cursor = START
    reasons: dict[str, int] = field(default_factory=dict)
    damaged: int = 0
    first_damaged: list[str] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)  # the first records of each reason
    lost: list[str] = field(default_factory=list)

    def add(self, item: Skipped) -> None:
        """Count a skipped record, once even if a restart reads it again."""
        if item.damaged and item.after > self.upto:
            self.damaged += item.damaged
            named = self.lost if item.damaged == LOST_PART else self.first_damaged
            if len(named) < NAMED_AT_MOST:
                named.append(f"{item.name}: {item.reason}")
        self.add_all(item.name, [item.reason], item.after)

    def add_all(self, name: str, reasons: Iterable[str], after: Cursor) -> None:
        """Count each fault of a record, once even if a restart reads it again."""
        if after <= self.upto:
            return
        self.upto = after
        for reason in reasons:
            self.count += 1
            self.reasons[reason] = self.reasons.get(reason, 0) + 1
            if len(self.first) < NAMED_AT_MOST:
                self.first.append(f"{name}: {reason}")
            named = self.examples.setdefault(reason, [])
            if len(named) < EXAMPLES and name not in named:
                named.append(name)

    def kinds(self, outcome: str) -> list[str]:
        """Return a line for each reason, most frequent first: how many records, their `outcome`, and the first ones."""
        most = sorted(self.reasons.items(), key=lambda said: -said[1])
        return [f"{count:,} {outcome}, {reason}: {self._examples_of(reason, count)}" for reason, count in most]

    def _examples_of(self, reason: str, count: int) -> str:
        named = self.examples.get(reason, [])
        return ", ".join(map(on_one_line, named)) + (", ..." if count > len(named) else "")

    def joined(self, other: Skips) -> Skips:
        """Return the counts of both."""
        reasons, examples = dict(self.reasons), dict(self.examples)
        for reason, count in other.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
            examples[reason] = [*examples.get(reason, []), *other.examples.get(reason, [])][:EXAMPLES]
        first = [*self.first, *other.first][:NAMED_AT_MOST]
        return Skips(
            self.count + other.count,
            first,
            max(self.upto, other.upto),
            reasons,
            self.damaged,
            self.first_damaged,
            examples,
            self.lost,
        )

    def check(self, bad_records: int) -> None:
        """Raise DataError, naming the first ones, if more records are damaged than `data.bad_records` allows."""
        if self.damaged > bad_records and self.lost:
            raise DataError(
                f"{'; '.join(map(on_one_line, [*self.lost, *self.first_damaged]))}; fetch or write it again, or take it out of data.paths. To read on "
                f"without that part, which counts as {LOST_PART:,} damaged records, raise data.bad_records (now {bad_records:,})"
            )
        if self.damaged > bad_records:
            named = "; ".join(map(on_one_line, self.first_damaged))
            raise DataError(
                f"more than {bad_records:,} records are damaged (data.bad_records): {named}"
                f"{'; ...' if self.damaged > len(self.first_damaged) else ''}; correct the files or data.text_key, or raise data.bad_records"
            )

    def note(self) -> str:
        """Return one line for the console."""
        if len(self.reasons) == 1 and self.count > len(self.first) and self.examples:
            [(reason, named)] = self.examples.items()
            return f"{self.count:,} skipped, not text: {on_one_line(reason)}; the first is {on_one_line(named[0])}"
        if self.count == len(self.first) or not self.reasons:
            return f"{self.count:,} skipped, not text: {'; '.join(map(on_one_line, self.first))}"
        return (
            f"{self.count:,} skipped, not text: {count_kinds(self.reasons)}; the first is {on_one_line(self.first[0])}"
        )

    @classmethod
    def load(cls, saved: Any) -> Skips:
        return cls(**{**saved, "upto": Cursor(**saved["upto"])})


def with_skips(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a saved manifest, with those that count records read back."""
    return {name: Skips.load(value) if name in COUNTS else value for name, value in saved.items()}
