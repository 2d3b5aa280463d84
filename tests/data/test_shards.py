"""Token shards against safetensors' own reader, and with bytes altered on purpose."""

from __future__ import annotations

import errno
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from shoal.data.stored import files
from shoal.data.stored.shards import BLOCK_BYTES, Shard, ShardRecord, token_dtype, write_shard
from shoal.data.stored.stream import TokenStream
from shoal.errors import DataError

U16 = np.dtype(np.uint16)


def write(path: Path, count: int = 100_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, ShardRecord]:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 1 << 16, count, dtype=np.uint16)
    starts = np.concatenate([[0], np.sort(draw.choice(np.arange(1, count), min(50, count - 1), replace=False))])
    return tokens, starts, write_shard(path, tokens, starts, 7)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, BLOCK_BYTES // 2, BLOCK_BYTES // 2 + 1, 100_000])
def test_a_shard_is_a_safetensors_file_of_what_was_given(tmp_path: Path, count: int) -> None:
    path = tmp_path / "train-00000.safetensors"
    tokens, starts, record = write(path, count)
    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["tokens"], tokens)
    np.testing.assert_array_equal(loaded["starts"], starts)
    raw = tokens.tobytes()
    blocks = [raw[a : a + 65536] for a in range(0, len(raw), 65536)]
    assert loaded["checks"].tolist() == [zlib.crc32(block) for block in blocks]
    shard = Shard(path, record, U16)
    np.testing.assert_array_equal(shard.read(0, count), tokens)
    np.testing.assert_array_equal(shard.starts(0, shard.num_tokens), starts)
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_a_flipped_bit_is_found_where_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.safetensors"
    tokens, _, record = write(path)
    raw = bytearray(path.read_bytes())
    raw[record.bytes - 2 * 100_000 + 70_000] ^= 1  # in the second block: tokens 32,768 to 65,536
    path.write_bytes(raw)
    shard = Shard(path, record, U16)
    np.testing.assert_array_equal(shard.read(0, 32_768), tokens[:32_768])
    np.testing.assert_array_equal(shard.read(65_536, 100_000), tokens[65_536:])
    for start, stop in [(32_767, 32_769), (40_000, 40_001), (60_000, 70_000)]:
        with pytest.raises(DataError, match=r"train-00000.safetensors was altered.*--data.rebuild true"):
            shard.read(start, stop)


@pytest.mark.parametrize("at", [3, 20, 200])
def test_an_altered_head_is_found(tmp_path: Path, at: int) -> None:
    path = tmp_path / "train-00000.safetensors"
    _, _, record = write(path)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 16
    path.write_bytes(raw)
    with pytest.raises(DataError, match="header or index"):
        Shard(path, record, U16).read(0, 1)


def test_a_shard_cut_short_or_missing_is_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.safetensors"
    _, _, record = write(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train-00000.safetensors has .* bytes, not the .*--data.rebuild true"):
        Shard(path, record, U16)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot open .*train-00000.safetensors"):
        Shard(path, record, U16)


def test_a_stream_is_its_shards_end_to_end(tmp_path: Path) -> None:
    written = [write(tmp_path / f"s{k}", count, k) for k, count in enumerate([100, 1, 70, 300])]
    stream = TokenStream([Shard(tmp_path / record.name, record, U16) for _, _, record in written])
    tokens = np.concatenate([t for t, _, _ in written])
    starts = np.concatenate([s + b for (_, s, _), b in zip(written, [0, 100, 101, 171], strict=True)])
    for start, stop in [(0, 471), (0, 1), (99, 101), (100, 101), (50, 400), (470, 471), (101, 171)]:
        np.testing.assert_array_equal(stream.read(start, stop), tokens[start:stop])
        np.testing.assert_array_equal(stream.starts(start, stop), starts[(starts >= start) & (starts < stop)])
    with pytest.raises(IndexError):
        stream.read(0, 472)


def test_ids_get_the_width_they_need() -> None:
    assert [token_dtype(n).itemsize for n in (257, 65_536, 65_537)] == [2, 2, 4]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_says_no_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    path = tmp_path / "a"
    files.write_atomically(path, [b"old"])

    def refuse(descriptor: int) -> None:
        raise OSError(code, "rejected")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(DataError, match=r"cannot write .*a: rejected; .*data.folder"):
        files.write_atomically(path, [b"new"])
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
