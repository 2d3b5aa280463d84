"""The manifest of a folder of prepared tokens, and the journal of an unfinished one. No torch."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from shoal.data.corpus.documents import START, CorpusFile, Cursor, Listed
from shoal.data.stored.files import write_atomically
from shoal.data.stored.shards import CURE, ShardRecord
from shoal.data.stored.skips import NAMED_AT_MOST, Skips, with_skips
from shoal.errors import DataError
from shoal.system.output import on_one_line

FORMAT = 1
MANIFEST, JOURNAL, TOKENIZER, YARDSTICK = "manifest.json", "journal.json", "tokenizer.json", "yardstick.json"
ROW_INDEXES = "*-rows-*.index"  # see `best_fit_rows.index_name`
SEGMENTS = ".filter-?????"  # see `segment_name`
FINISHED = (MANIFEST, TOKENIZER, YARDSTICK, "*.safetensors", ROW_INDEXES)  # the files of finished tokens
FILTERS = ("shorter", "longer", "shares", "exact", "near")  # how the reasons of each filter begin, as the filters run

SHARE_TIMES = 3  # how far the held-out share of the text may be from `data.val_fraction` without a warning

SplitName = Literal["train", "val"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


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


def _filter_of(reason: str) -> int:
    """Return the place of a reason's filter in the order in which filters run."""
    return next((n for n, begins in enumerate(FILTERS) if reason.startswith(begins)), len(FILTERS))


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
    rejected: Skips = field(default_factory=Skips)  # conversations that cannot be learned, found while encoding
    flaws: Skips = field(default_factory=Skips)  # faults of conversations that are kept
    overlap: Skips = field(default_factory=Skips)  # training documents whose text a document of a held-out file has

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
            *(Skips.load(saved[name]) if name in saved else Skips() for name in ("rejected", "flaws", "overlap")),
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return journal if journal.options == options and journal.listing == listing else None


def _written(saved: Any) -> Written:
    return Written([ShardRecord(**record) for record in saved["shards"]], Cursor(**saved["after"]))


@dataclass(frozen=True)
class SplitRecord:
    """
    The counts and shards of a split.

    tokens: includes each document's begin and end tokens. text_bytes: counts UTF-8 bytes. learned_tokens, learned_bytes: the
    part of both that is learned, which is less only for conversations. estimated: whether the bytes, and documents unless an
    index counts them, are estimates from a sample of the tokens.
    """

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[ShardRecord, ...]
    learned_tokens: int
    learned_bytes: int
    estimated: bool = False


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
        """Return a line for each reason why the filters removed documents, in the order in which they run."""
        return [
            f"removed {removal.count:,} ({reason}): {', '.join(map(on_one_line, removal.first))}"
            + (", ..." if removal.count > len(removal.first) else "")
            for reason, removal in sorted(self.removed.items(), key=lambda item: _filter_of(item[0]))
        ]

    def overlaps(self) -> list[str]:
        """Return a line on training documents that are held out too, if any."""
        count, names = self.overlap.count, [name for named in self.overlap.examples.values() for name in named]
        what = "1 training document equals" if count == 1 else f"{count:,} training documents equal"
        listed = ", ".join(map(on_one_line, names)) + (", ..." if count > len(names) else "")
        return [f"{what} a held-out one: {listed}; data.deduplicate exact removes them"] * bool(count)

    flaws: Skips = field(default_factory=Skips)  # faults of conversations that were kept
    overlap: Skips = field(default_factory=Skips)  # training documents whose text a document of a held-out file has

    def skip_notes(self) -> list[str]:
        """Return what the user is told of skipped records; of conversations, a line for each kind of fault, with three records."""
        if self.has_conversations:
            return [*self.skips.kinds("dropped"), *self.flaws.kinds("kept")]
        return [self.skips.note()] if self.skips.count else []

    def share_notes(self) -> list[str]:
        """Return a line if the held-out text is far from `data.val_fraction` of the text, as one of three files is."""
        train, val = (self.splits[name] for name in SPLITS)
        fraction = self.options.get("val_fraction")  # not in the options of held-out files
        share = val.text_bytes / max(train.text_bytes + val.text_bytes, 1)
        if fraction is None or fraction / SHARE_TIMES <= share <= fraction * SHARE_TIMES:
            return []
        corpus = self.options["corpus"]
        held_out = (
            "the split to hold out in data.val_split"
            if corpus == "datasets"
            else "the files to hold out in data.val_paths"
        )
        divide = "divide texts into documents (data.separator), " if corpus in ("text", "files") else ""
        return [
            f"{100 * share:.2g}% of the text is held out ({val.documents:,} of {train.documents + val.documents:,} documents), although "
            f"data.val_fraction is {fraction:g}: documents are held out whole; name {held_out}, {divide}or add documents"
        ]

    @property
    def has_conversations(self) -> bool:
        """Whether the documents are conversations, of which perhaps only a part is learned."""
        return "conversations" in self.options

    @property
    def has_held_out_files(self) -> bool:
        """Whether the held-out split is that of other files than the training split."""
        return bool(self.options.get("val_paths") or self.options.get("val_split"))

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
        journal.skips.joined(journal.rejected),
        _data_id(tokenizer_sha256, splits),
        removed=journal.filtered.removed,
        flaws=journal.flaws,
        overlap=journal.overlap,
    )


def _sum(shards: Sequence[ShardRecord]) -> SplitRecord:
    documents, tokens, text_bytes = (sum(getattr(s, f) for s in shards) for f in ("documents", "tokens", "text_bytes"))
    learned_tokens = sum(s.tokens if s.learned_tokens is None else s.learned_tokens for s in shards)
    learned_bytes = sum(s.text_bytes if s.learned_bytes is None else s.learned_bytes for s in shards)
    return SplitRecord(documents, tokens, text_bytes, tuple(shards), learned_tokens, learned_bytes)


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
        saved["removed"] = load_removed(saved.get("removed", {}))
        manifest = Manifest(**{**with_skips(saved), "splits": splits})
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


def check_unchanged(manifest: Manifest, corpus: Listed) -> None:
    """Raise DataError, naming files, if the corpus has changed since its tokens were prepared. See `name_changes`."""
    if changes := name_changes(manifest, corpus):
        raise DataError(f"{changes}; `--data.rebuild true` prepares it again, and keeps these tokens in another folder")


def name_changes(manifest: Manifest, corpus: Listed) -> str:
    """
    Return a text that names the files that have changed since the tokens were prepared; "" if none has.

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
    return f"the corpus has changed since its tokens were prepared: {', '.join(differences)}" if differences else ""


def _name_some(kind: str, names: Sequence[str]) -> str:
    more = ", ..." if len(names) > NAMED_AT_MOST else ""
    return f"{len(names):,} {kind} ({', '.join(map(on_one_line, names[:NAMED_AT_MOST]))}{more})"


def set_aside(folder: Path, data_id: str) -> Path:
    """
    Keep finished tokens in a folder named for their id, where `find_by_id` finds them for the runs trained on them.

    Their files stay in `folder` too, as links if the disk has links. A kill leaves either nothing or all of the new folder.
    """
    aside, draft = folder.with_name(f"{folder.name}.{data_id}"), folder.with_name(f".{folder.name}.{data_id}.tmp")
    if (aside / MANIFEST).exists():
        return aside
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for path in (path for pattern in FINISHED for path in folder.glob(pattern)):
        try:
            os.link(path, draft / path.name)
        except OSError:  # such as a file system without links
            shutil.copy2(path, draft / path.name)
    draft.rename(aside)
    return aside


def find_aside(folder: Path) -> list[Path]:
    """Return the folders of tokens that `set_aside` kept when `folder` was prepared again."""
    return sorted(path.parent for path in folder.parent.glob(f"{glob.escape(folder.name)}.*/{MANIFEST}"))


def clear(
    folder: Path,
    patterns: Iterable[str] = (
        *FINISHED,
        JOURNAL,
        SEGMENTS,
        ".*.tmp",
    ),
) -> None:
    """Remove prepared files, the manifest first: without it the rest does not count as complete."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
