"""Ranges of files, against the bytes that were written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.errors import DataError
from shoal.system.byte_file import MOST_OPEN, ByteFile, reopen


def test_more_files_than_are_kept_open(tmp_path: Path) -> None:
    reopen()
    before = len(os.listdir("/proc/self/fd"))
    files = []
    for number in range(2 * MOST_OPEN):
        path = tmp_path / str(number)
        path.write_bytes(bytes([number % 256]) * 10 + b"end")
        files.append(ByteFile(path, str(number), "fix it"))
    for _ in range(2):
        for number, file in enumerate(files):
            assert file.read(8, 12) == bytes([number % 256]) * 2 + b"en"
    assert len(os.listdir("/proc/self/fd")) <= before + MOST_OPEN
    reopen()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_file_that_is_gone_and_one_written_since(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(DataError, match="cannot read a: No such file or directory; put it back"):
        ByteFile(path, "a", "put it back").read(0, 1)
    path.write_bytes(b"old")
    old = ByteFile(path, "a", "")
    assert old.read(0, 3) == b"old"
    (tmp_path / "b").write_bytes(b"new")
    (tmp_path / "b").replace(path)
    assert ByteFile(path, "a", "").read(0, 3) == b"new"
    assert old.read(0, 3) == b"old"
    with pytest.raises(DataError, match="a was cut short while it was read"):
        old.read(2, 4)
