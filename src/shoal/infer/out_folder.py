"""The output folder of an export, checked before torch is imported."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from shoal.errors import ModelError
from shoal.hub.beside import LICENSES, TOKENIZER
from shoal.hub.card import CARD, is_card
from shoal.hub.folder import CONFIG, INDEX
from shoal.system.disk import empty_folder, gigabytes, replace_folder, try_lock
from shoal.system.output import on_one_line

WRITTEN: Final = (CARD, CONFIG, INDEX, "*.safetensors", *TOKENIZER, *LICENSES)


class OutFolder:
    """The output folder of an export: it appears when complete, and replaces nothing but another export."""

    def __init__(self, out: Path, force: bool) -> None:
        """Raise `ModelError` if `out` exists and must not be replaced."""
        self._name = name = on_one_line(out)
        try:
            self._out = out.expanduser().resolve()  # follow links, to write on the disk they point to
            there = sorted(p.name for p in self._out.iterdir()) if self._out.is_dir() else []
            taken = bool(there) or (self._out.exists() and not self._out.is_dir())
        except (OSError, RuntimeError) as error:
            raise ModelError(f"cannot write {name}: {error}; set --out to a writable folder") from error
        foreign = [n for n in there if not any(fnmatch(n, known) for known in WRITTEN)]
        if there and not foreign and not is_card(self._out / CARD):
            raise ModelError(f"{name} already exists and is not an export; set --out to another folder")
        if taken and (foreign or not self._out.is_dir()):
            what = f"contains {foreign[0]}, which no export writes" if foreign else "is a file"
            raise ModelError(f"{name} already exists and {what}; set --out to another folder")
        if taken and not force:
            raise ModelError(f"{name} already exists; set --force to replace it, or --out to another folder")

    @contextlib.contextmanager
    def written(self, needed: int) -> Iterator[Path]:
        """
        Yield an empty temporary folder on a disk with `needed` bytes free; rename it into place on success.

        Raises `ModelError` if the disk has less space or cannot be written, or if another export to this folder is running.
        """
        aside = self._out.with_name(f".{self._out.name}.export")
        try:
            aside.mkdir(parents=True, exist_ok=True)
            with self._alone(aside):
                try:
                    empty_folder(aside)
                    self._check_space(aside, needed)
                    yield aside
                    replace_folder(aside, self._out)
                except BaseException:  # only on failure: after success, another export may use that name
                    shutil.rmtree(aside, ignore_errors=True)
                    raise
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or error
            raise ModelError(f"cannot write {self._name}: {why}; set --out to another disk") from error

    @contextlib.contextmanager
    def _alone(self, aside: Path) -> Iterator[None]:
        descriptor = os.open(aside, os.O_RDONLY)
        try:
            if not try_lock(descriptor):
                raise ModelError(
                    f"another export to {self._name} is running; wait for it, or set --out to another folder"
                )
            yield
        finally:
            os.close(descriptor)

    def _check_space(self, aside: Path, needed: int) -> None:
        free = shutil.disk_usage(aside).free
        if free < needed:
            raise ModelError(
                f"{self._name} needs {gigabytes(needed)}, and its disk has {gigabytes(free)} free; set --out to another "
                "disk, or --dtype to bfloat16"
            )
