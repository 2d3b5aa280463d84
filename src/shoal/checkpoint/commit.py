"""Receipts of written shards, and the manifest that completes a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.checkpoint.saved import FORMAT, MANIFEST, STATE
from shoal.checkpoint.shard_file import Digest
from shoal.system.disk import sha256_of, write_whole


def leave_receipt(folder: Path, rank: int, shard: Path, digest: Digest | None) -> None:
    """
    Record that `rank` has written `shard`, or that it had nothing to write if `digest` is None.

    Raises `OSError` if the record cannot be written.
    """
    files = {} if digest is None else {shard.name: asdict(digest)}
    write_whole(_receipt(folder, rank), [json.dumps(files).encode()])


def write_manifest(folder: Path, ranks: Iterable[int], state: Mapping[str, Any]) -> None:
    """
    Write `state.json`, and the manifest from the receipts of `ranks`; remove the receipts.

    Raises `OSError` if a receipt is missing or a file cannot be written.
    """
    files: dict[str, Any] = {}
    for rank in ranks:
        receipt = _receipt(folder, rank)
        files |= json.loads(receipt.read_text("utf-8"))
        receipt.unlink()
    path = folder / STATE
    write_whole(path, [json.dumps(state, indent=1).encode()])
    files[STATE] = asdict(Digest(path.stat().st_size, sha256_of(path)))
    write_whole(folder / MANIFEST, [json.dumps({"format": FORMAT, "files": files}, indent=1).encode()])


def _receipt(folder: Path, rank: int) -> Path:
    return folder / f"written-{rank:05d}.json"
