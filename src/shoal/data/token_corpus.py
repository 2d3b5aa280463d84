"""
Token files that other trainers made, opened as prepared data: nothing is copied, and nothing is read that need not be. No torch.

The data's folder holds the tokenizer and a record, `token_files.json`: the files with their sizes, times and digests, where
the held-out tokens begin, and the counts of each split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from shoal.config.data_options import Data, Source
from shoal.data.corpus.documents import CorpusFile
from shoal.data.pretokenized.find import check_held_out, find_token_files
from shoal.data.pretokenized.formats import open_token_file
from shoal.data.pretokenized.token_file import TokenFile, Vocabulary
from shoal.data.stored.files import locked_folder, write_atomically
from shoal.data.stored.manifest import SPLITS, TOKENIZER, Manifest, SplitName, SplitRecord, check_unchanged
from shoal.data.stored.skips import Skips, with_skips
from shoal.data.stored.stream import Section, Stream, TokenStream
from shoal.data.text_bytes import count_text_bytes
from shoal.data.tokens.byte_lengths import byte_lengths
from shoal.data.tokens.tokenize import Tokenizer
from shoal.errors import DataError
from shoal.system.disk import sha256_of

RECORD: Final = "token_files.json"
FORMAT: Final = 1
BLOCK_BYTES: Final = 4096
MOST_BLOCKS, FEWEST_BLOCKS, BLOCKS_IN_ALL = 64, 4, 4096  # blocks of a file, and of all files, that its digest covers
SEARCHED_TOKENS: Final = 1 << 22  # on either side of the wanted border between the splits
WINDOW_TOKENS: Final = 1 << 20


@dataclass(frozen=True)
class Opened:
    """What `Prepared` holds besides the folder and the tokenizer."""

    manifest: Manifest
    streams: Mapping[SplitName, Stream]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Record:
    """
    The content of `token_files.json`.

    cut: the first held-out token of the files of `data.paths`; None if `data.val_paths` holds the held-out tokens.
    """

    manifest: Manifest
    cut: int | None
    notes: tuple[str, ...]

    def save(self, folder: Path) -> None:
        content = {**asdict(self.manifest), "format": FORMAT, "cut": self.cut, "notes": self.notes}
        write_atomically(folder / RECORD, [json.dumps(content, indent=1).encode()])


def load_record(folder: Path) -> Record | None:
    """Return the record of a folder; None if it has none that can be read: making it again takes less than a second."""
    try:
        saved = json.loads((folder / RECORD).read_bytes())
        if saved.pop("format") != FORMAT:
            return None
        cut, notes = saved.pop("cut"), tuple(saved.pop("notes"))
        saved["listing"] = tuple(CorpusFile(**entry) for entry in saved["listing"])
        saved["splits"] = {name: SplitRecord(**saved["splits"][name] | {"shards": ()}) for name in SPLITS}
        return Record(Manifest(**with_skips(saved)), cut, notes)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def prepare_token_files(
    folder: Path, data: Data, tokenizer: Tokenizer, options: Mapping[str, Any], waits: Callable[[], None]
) -> Opened:
    """
    Open the token files that `data` names, and make their record if there is none. Of several processes, one makes it.

    waits: called repeatedly while another process makes it. Raises DataError if a file is not a token file of the format
    asked for, or if a file has changed since the record was made, unless `data.rebuild` is set.
    """
    corpus = TokenCorpus(data, tokenizer, f"data.tokenizer {data.tokenizer}")
    record = _usable(folder, corpus, data)
    if record is None:
        with locked_folder(folder, waits):
            record = _usable(folder, corpus, data)
            if record is None:
                record = make_record(corpus, tokenizer, options, data.val_fraction)
                write_atomically(folder / TOKENIZER, [tokenizer.to_json().encode()])
                record.save(folder)
    return _open(corpus, record)


def open_recorded(record: Record, tokenizer: Tokenizer) -> Opened:
    """Open the files of a record. Raises DataError if one is gone or has changed."""
    options = record.manifest.options
    given = {key: options[key] for key in ("token_format", "token_type")}
    source = Source(corpus="tokens", paths=tuple(options["paths"]), val_paths=tuple(options["val_paths"]), **given)
    corpus = TokenCorpus(source, tokenizer, "the tokenizer")
    check_unchanged(record.manifest, corpus)
    return _open(corpus, record)


class TokenCorpus:
    """The token files of a source, with the listing and digests that show whether they have changed."""

    def __init__(self, source: Source, tokenizer: Tokenizer, tokenizer_name: str) -> None:
        """Find and open the files. Raises DataError if one is not usable, or if they are of several types or formats."""
        vocabulary = Vocabulary(tokenizer_name, tokenizer.vocab_size, tokenizer.eot_id, tokenizer.bos_id)

        def opened(files: Sequence[tuple[str, Path]]) -> list[TokenFile]:
            found = [open_token_file(*file, source.token_format, source.token_type, vocabulary) for file in files]
            _check_alike(found)
            return found

        found = find_token_files(source.paths, "data.paths")
        self.skipped = found.skipped
        held_out = find_token_files(source.val_paths, "data.val_paths") if source.val_paths else None
        train = found.without(held_out) if held_out else found
        if not train.files:
            raise DataError("data.val_paths has all the files of data.paths, so none are left to train on")
        check_held_out(train)
        self.files: dict[SplitName, list[TokenFile]] = {
            "train": opened(train.files), "val": opened(held_out.files) if held_out else [],
        }  # fmt: skip
        every = [file for name in SPLITS for file in self.files[name]]
        indexes = [(str(Path(f.name).with_suffix(".idx")), f.path.with_suffix(".idx")) for f in every if f.borders]
        self._on_disk = [*((f.name, f.path) for f in every), *indexes]

    def listing(self) -> list[CorpusFile]:
        """Return the files, also the indexes: first those to train on, then those held out."""
        entries = []
        for name, path in self._on_disk:
            status = path.stat()
            entries.append(CorpusFile(name, status.st_size, status.st_mtime_ns))
        return entries

    def digest(self, index: int) -> str:
        """Return a hash of a file's size and of evenly spaced blocks, the first and the last included."""
        name, path = self._on_disk[index]
        blocks = max(FEWEST_BLOCKS, min(MOST_BLOCKS, BLOCKS_IN_ALL // len(self._on_disk)))
        try:
            size = path.stat().st_size
            found = hashlib.blake2b(str(size).encode(), digest_size=16)
            with path.open("rb") as file:
                for block in range(blocks):
                    file.seek(max(0, size - BLOCK_BYTES) * block // (blocks - 1))
                    found.update(file.read(BLOCK_BYTES))
        except OSError as error:
            raise DataError(f"cannot read {name}: {error.strerror}; fix it or correct data.paths") from error
        return found.hexdigest()

    def streams(self, cut: int | None) -> dict[SplitName, Stream]:
        """Return the splits. cut: the first held-out token; None if the held-out tokens have files of their own."""
        train = TokenStream(self.files["train"])
        if cut is None:
            return {"train": train, "val": TokenStream(self.files["val"])}
        return {"train": Section(train, 0, cut), "val": Section(train, cut, train.num_tokens)}


def make_record(corpus: TokenCorpus, tokenizer: Tokenizer, options: Mapping[str, Any], val_fraction: float) -> Record:
    """Choose the held-out tokens, and count. Reads at most some millions of tokens. Raises DataError if one is not valid."""
    notes: list[str] = []
    cut = None
    for file in (*corpus.files["train"], *corpus.files["val"]):
        if file.borders is not None:
            file.borders.check()
    if not corpus.files["val"]:
        cut, note = _cut(TokenStream(corpus.files["train"]), val_fraction, tokenizer)
        notes += note
    streams = corpus.streams(cut)
    lengths = byte_lengths(tokenizer)
    splits: dict[SplitName, SplitRecord] = {}
    for name in SPLITS:
        count = count_text_bytes(streams[name], lengths, tokenizer)
        first = cut if cut is not None and name == "val" else 0
        files = corpus.files["train" if cut is not None else name]
        documents = _documents(files, first, first + streams[name].num_tokens)
        splits[name] = SplitRecord(
            count.documents if documents is None else documents,
            streams[name].num_tokens, count.text_bytes, (), streams[name].num_tokens, count.text_bytes, estimated=count.sampled_tokens is not None,
        )  # fmt: skip
        if count.sampled_tokens is not None and name == "val":
            notes.append(
                f"bits per byte use an estimate of the held-out text, {count.text_bytes:,} bytes, from "
                f"{count.sampled_tokens:,} of its {streams[name].num_tokens:,} tokens"
            )
    listing = corpus.listing()
    digests = tuple(corpus.digest(index) for index in range(len(listing)))
    tokenizer_sha256 = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
    data_id = _data_id(corpus, tokenizer_sha256, cut, listing, digests)
    manifest = Manifest(
        options, tuple(listing), digests, tokenizer_sha256, tokenizer.vocab_size, splits, Skips(), data_id
    )
    return Record(manifest, cut, tuple(notes))


def _usable(folder: Path, corpus: TokenCorpus, data: Data) -> Record | None:
    """Return the folder's record; None if there is none, or if files have changed and `data.rebuild` is set."""
    record = load_record(folder)
    if record is None or not _has_tokenizer(folder, record):
        return None
    try:
        check_unchanged(record.manifest, corpus)
    except DataError:
        if not data.rebuild:
            raise
        return None
    return record


def _has_tokenizer(folder: Path, record: Record) -> bool:
    """Return whether the folder's tokenizer.json, which runs copy, is there and unaltered."""
    try:
        return sha256_of(folder / TOKENIZER) == record.manifest.tokenizer_sha256
    except OSError:
        return False


def _open(corpus: TokenCorpus, record: Record) -> Opened:
    skipped = [f"data.paths has files that are not token files, which are skipped: {corpus.skipped}"]
    # the files' times as they are now, by which the index of documents is known to be current
    manifest = replace(record.manifest, listing=tuple(corpus.listing()))
    return Opened(manifest, corpus.streams(record.cut), (*(skipped if corpus.skipped else ()), *record.notes))


def _check_alike(files: Sequence[TokenFile]) -> None:
    """Raise DataError if the files of a split have several types or formats."""
    first = files[0]
    for file in files:
        for what in ("dtype", "format"):
            one, other = (getattr(f.contents, what) for f in (first, file))
            if one != other:
                raise DataError(
                    f"{first.name} is {one} and {file.name} is {other}: token files of one corpus must have one type and one "
                    "format; convert some, or set data.token_type or data.token_format"
                )


def _cut(stream: Stream, val_fraction: float, tokenizer: Tokenizer) -> tuple[int, list[str]]:
    """Return the first held-out token: a document's first, near the last `val_fraction` of the tokens. And notes on it."""
    wanted = min(max(1, round(stream.num_tokens * (1 - val_fraction))), stream.num_tokens)
    for low in range(wanted, min(wanted + SEARCHED_TOKENS, stream.num_tokens), WINDOW_TOKENS):
        found = stream.starts(low, min(low + WINDOW_TOKENS, stream.num_tokens))
        if len(found):
            return int(found[0]), []
    for high in range(wanted, max(wanted - SEARCHED_TOKENS, 1), -WINDOW_TOKENS):
        found = stream.starts(max(1, high - WINDOW_TOKENS), high)
        if len(found):
            return int(found[-1]), []
    return wanted, [
        f"no document border (token {tokenizer.eot_id:,}, {tokenizer.decode([tokenizer.eot_id])!a}) is near the last "
        f"{val_fraction:.0%} of the tokens, so a document may be partly held out. Is data.tokenizer the one that made the files?"
    ]


def _documents(files: Sequence[TokenFile], first: int, last: int) -> int | None:
    """Return how many documents start in tokens [first, last) of the files end to end; None if a file has no index."""
    found, begin = 0, 0
    for file in files:
        if file.borders is None:
            return None
        low, high = (min(max(at - begin, 0), file.num_tokens) for at in (first, last))
        found += file.borders.documents_before(high) - file.borders.documents_before(low)
        begin += file.num_tokens
    return found


def _data_id(
    corpus: TokenCorpus, tokenizer_sha256: str, cut: int | None, listing: Sequence[CorpusFile], digests: Sequence[str]
) -> str:
    """Return a hash of the files' names without their folders, sizes, types and digests, and of the place of the held-out tokens."""
    content = [tokenizer_sha256, f"held out from {cut}"]
    content += [f"{name} {f.contents.format} {f.contents.dtype.str}" for name in SPLITS for f in corpus.files[name]]
    content += [f"{Path(e.name).name} {e.bytes} {digest}" for e, digest in zip(listing, digests, strict=True)]
    return hashlib.blake2b("\n".join(content).encode(), digest_size=8).hexdigest()
