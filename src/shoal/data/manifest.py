"""The manifest of a folder of prepared tokens, and the journal of an unfinished one. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from shoal.data.corpus.documents import START, Corpus, CorpusFile, Cursor, Skipped
from shoal.data.corpus.paths import count_kinds
from shoal.data.files import write_atomically
from shoal.data.shards import CURE, ShardRecord
from shoal.errors import DataError
from shoal.system.output import on_one_line

FORMAT = 1
MANIFEST, JOURNAL, TOKENIZER, YARDSTICK = "manifest.json", "journal.json", "tokenizer.json", "yardstick.json"
ROW_INDEXES = "*-rows-*.index"  # see `best_fit_rows.index_name`
SEGMENTS = ".filter-?????"  # see `segment_name`
NAMED_AT_MOST = 5  # maximum number of files named in a message; the rest are counted

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


@dataclass
class Skips:
    """Skipped records: how many, the first few, and the place up to which they are counted."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    upto: Cursor = START
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, item: Skipped) -> None:
        """Count a skipped record, once even if a restart reads it again."""
        if item.after <= self.upto:
            return
        self.count, self.upto = self.count + 1, item.after
        self.reasons[item.reason] = self.reasons.get(item.reason, 0) + 1
        if len(self.first) < NAMED_AT_MOST:
            self.first.append(f"{item.name}: {item.reason}")

    def note(self) -> str:
        """Return one line for the console."""
        if self.count == len(self.first) or not self.reasons:
            return f"{self.count:,} skipped, not text: {'; '.join(map(on_one_line, self.first))}"
        return (
            f"{self.count:,} skipped, not text: {count_kinds(self.reasons)}; the first is {on_one_line(self.first[0])}"
        )

    @classmethod
    def load(cls, saved: Any) -> Skips:
        return cls(saved["count"], saved["first"], Cursor(**saved["upto"]), saved.get("reasons", {}))


@dataclass
class Removal:
    """Documents that a filter removed for one reason: how many, and the names of the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Filtered:
    """
    The progress of the filters' pass: the place of the last segment, and what was removed by reason.

    kept: documents that are left. version: the version of the segments' content.
    """

    upto: Cursor = START
    segments: int = 0
    kept: int = 0
    version: int = 0
    done: bool = False
    removed: dict[str, Removal] = field(default_factory=dict)

    def remove(self, reason: str, name: str) -> None:
        """Count a removed document."""
        removal = self.removed.setdefault(reason, Removal())
        removal.count += 1
        if len(removal.first) < NAMED_AT_MOST:
            removal.first.append(name)

    @classmethod
    def load(cls, saved: Any) -> Filtered:
        return cls(**{**saved, "upto": Cursor(**saved["upto"]), "removed": load_removed(saved["removed"])})


def load_removed(saved: Any) -> dict[str, Removal]:
    """Return saved counts of removed documents."""
    return {reason: Removal(**removal) for reason, removal in saved.items()}


def segment_name(number: int) -> str:
    """Return the name of a file of the filters' pass; all are removed once the tokens are finished."""
    return f".filter-{number:05d}"


@dataclass
class Written:
    """The finished shards of a split, and the place of the document after them."""

    shards: list[ShardRecord] = field(default_factory=list)
    after: Cursor = START


@dataclass
class Journal:
    """The progress of preparing. A shard is recorded once it is complete on disk, so a kill loses at most one shard per split."""

    options: Mapping[str, Any]
    listing: list[CorpusFile]
    splits: dict[SplitName, Written] = field(default_factory=lambda: {name: Written() for name in SPLITS})
    skips: Skips = field(default_factory=Skips)
    fast: bool = True  # False once the faster tokenizer gave wrong ids
    filtered: Filtered = field(default_factory=Filtered)

    def start_again_without_fast(self, folder: Path) -> None:
        """Discard every shard, since the faster tokenizer gave wrong ids."""
        self.splits, self.fast = {name: Written() for name in SPLITS}, False
        self.save(folder)  # before removing shards, so that after a kill the journal lists no missing shard
        clear(folder, ["*.safetensors"])

    def save(self, folder: Path) -> None:
        write_atomically(folder / JOURNAL, [json.dumps(asdict(self)).encode()])

    def resume_at(self) -> Cursor:
        """Return the place of the first document that a split still lacks."""
        return min(written.after for written in self.splits.values())


def load_journal(folder: Path, options: Mapping[str, Any], listing: list[CorpusFile]) -> Journal | None:
    """Return the journal of an interrupted preparation if its options and corpus are unchanged, else None."""
    try:
        saved = json.loads((folder / JOURNAL).read_bytes())
        journal = Journal(
            saved["options"],
            [CorpusFile(**entry) for entry in saved["listing"]],
            {name: _written(saved["splits"][name]) for name in SPLITS},
            Skips.load(saved["skips"]),
            saved.get("fast", True),
            Filtered.load(saved["filtered"]) if "filtered" in saved else Filtered(),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return journal if journal.options == options and journal.listing == listing else None


def _written(saved: Any) -> Written:
    return Written([ShardRecord(**record) for record in saved["shards"]], Cursor(**saved["after"]))


@dataclass(frozen=True)
class SplitRecord:
    """The counts and shards of a split. `tokens` includes each document's begin and end tokens; `text_bytes` counts UTF-8 bytes."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything about prepared tokens. `data_id` is a hash of their content: equal ids mean equal tokens."""

    options: Mapping[str, Any]
    listing: tuple[CorpusFile, ...]
    digests: tuple[str, ...]
    tokenizer_sha256: str
    vocab_size: int
    splits: Mapping[SplitName, SplitRecord]
    skips: Skips
    data_id: str
    format: int = FORMAT
    removed: Mapping[str, Removal] = field(default_factory=dict)

    def removals(self) -> list[str]:
        """Return a line for each reason why the filters removed documents."""
        return [
            f"removed {removal.count:,} ({reason}): {', '.join(map(on_one_line, removal.first))}"
            + (", ..." if removal.count > len(removal.first) else "")
            for reason, removal in self.removed.items()
        ]

    def save(self, folder: Path) -> None:
        write_atomically(folder / MANIFEST, [json.dumps(asdict(self), indent=1).encode()])


def finish(journal: Journal, digests: Sequence[str], tokenizer_json: bytes, vocab_size: int) -> Manifest:
    """Return the manifest of a finished preparation."""
    tokenizer_sha256 = hashlib.sha256(tokenizer_json).hexdigest()
    splits = {name: _sum(written.shards) for name, written in journal.splits.items()}
    return Manifest(
        journal.options,
        tuple(journal.listing),
        tuple(digests),
        tokenizer_sha256,
        vocab_size,
        splits,
        journal.skips,
        _data_id(tokenizer_sha256, splits),
        removed=journal.filtered.removed,
    )


def _sum(shards: Sequence[ShardRecord]) -> SplitRecord:
    documents, tokens, text_bytes = (sum(getattr(s, f) for s in shards) for f in ("documents", "tokens", "text_bytes"))
    return SplitRecord(documents, tokens, text_bytes, tuple(shards))


def _data_id(tokenizer_sha256: str, splits: Mapping[SplitName, SplitRecord]) -> str:
    content = [tokenizer_sha256] + [f"{name} {s.sha256}" for name in SPLITS for s in splits[name].shards]
    return hashlib.blake2b("\n".join(content).encode(), digest_size=8).hexdigest()


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest. Raises DataError if it is missing, damaged, altered or of another format."""
    path = folder / MANIFEST
    try:
        saved = json.loads(path.read_bytes())
        if saved["format"] != FORMAT:
            raise DataError(f"{path} has format {saved['format']}, not {FORMAT}; {CURE}")
        splits = {name: _sum([ShardRecord(**s) for s in saved["splits"][name]["shards"]]) for name in SPLITS}
        saved["listing"] = tuple(CorpusFile(**entry) for entry in saved["listing"])
        saved["skips"] = Skips.load(saved["skips"])
        saved["removed"] = load_removed(saved.get("removed", {}))
        manifest = Manifest(**{**saved, "splits": splits})
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; run `shoal prepare RECIPE` first") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}); {CURE}") from error
    for shard in (shard for split in splits.values() for shard in split.shards):
        if Path(shard.name).name != shard.name:
            raise DataError(f"{path} names {shard.name}, which is outside its folder; {CURE}")
    if _data_id(manifest.tokenizer_sha256, splits) != manifest.data_id:
        raise DataError(f"{path} was altered: its data_id does not match its shards; {CURE}")
    return manifest


def check_unchanged(manifest: Manifest, corpus: Corpus) -> None:
    """
    Raise DataError, naming files, if the corpus has changed since its tokens were prepared.

    A file of the same size with another modification time is compared by its hash, so a corpus that was copied or
    checked out again counts as unchanged.
    """
    before = {entry.name: (entry, digest) for entry, digest in zip(manifest.listing, manifest.digests, strict=True)}
    now = {entry.name: (entry, index) for index, entry in enumerate(corpus.listing())}
    changed = []
    for name in before.keys() & now.keys():
        (old, digest), (new, index) = before[name], now[name]
        if old != new and (old.bytes != new.bytes or corpus.digest(index) != digest):
            changed.append(name)
    kinds = {"changed": changed, "added": now.keys() - before.keys(), "removed": before.keys() - now.keys()}
    differences = [_name_some(kind, sorted(names)) for kind, names in kinds.items() if names]
    if differences:
        raise DataError(
            f"the corpus has changed since its tokens were prepared: {', '.join(differences)}; "
            "`--data.rebuild true` prepares it again"
        )


def _name_some(kind: str, names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NAMED_AT_MOST else ""
    return f"{len(names):,} {kind} ({', '.join(map(on_one_line, names[:NAMED_AT_MOST]))}{more})"


def clear(
    folder: Path,
    patterns: Iterable[str] = (
        MANIFEST,
        JOURNAL,
        TOKENIZER,
        YARDSTICK,
        "*.safetensors",
        ROW_INDEXES,
        SEGMENTS,
        ".*.tmp",
    ),
) -> None:
    """Remove prepared files, the manifest first: without it the rest does not count as complete."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
