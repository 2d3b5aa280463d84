"""Where an export goes. No torch: whether it can go there is said at once."""

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
    """Where an export goes: a folder that appears when it is whole, and replaces nothing but another export."""

    def __init__(self, out: Path, force: bool) -> None:
        """Raises `ModelError` where `out` is taken by what must not be replaced."""
        self._said = said = on_one_line(out)
        try:
            self._out = out.expanduser().resolve()  # through links, to the disk that they lead to
            there = sorted(p.name for p in self._out.iterdir()) if self._out.is_dir() else []
            taken = bool(there) or (self._out.exists() and not self._out.is_dir())
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{said} cannot be written: {error}; set --out to a folder that can") from error
        foreign = [n for n in there if not any(fnmatch(n, known) for known in WRITTEN)]
        if there and not foreign and not is_card(self._out / CARD):
            raise ModelError(f"{said} is there already, and no export wrote it; set --out to another folder")
        if taken and (foreign or not self._out.is_dir()):
            what = f"holds {foreign[0]}, which no export writes" if foreign else "is a file"
            raise ModelError(f"{said} is there already, and {what}; set --out to another folder")
        if taken and not force:
            raise ModelError(f"{said} is there already; --force replaces it, or set --out to another folder")

    @contextlib.contextmanager
    def written(self, needed: int) -> Iterator[Path]:
        """An empty folder aside, on a disk that has `needed` bytes; put in place when all went well."""
        aside = self._out.with_name(f".{self._out.name}.export")
        try:
            aside.mkdir(parents=True, exist_ok=True)
            with self._alone(aside):
                try:
                    empty_folder(aside)
                    self._check_space(aside, needed)
                    yield aside
                    replace_folder(aside, self._out)
                except BaseException:  # after a success that name may be another export's
                    shutil.rmtree(aside, ignore_errors=True)
                    raise
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or error
            raise ModelError(f"{self._said} cannot be written: {why}; set --out to another disk") from error

    @contextlib.contextmanager
    def _alone(self, aside: Path) -> Iterator[None]:
        descriptor = os.open(aside, os.O_RDONLY)
        try:
            if not try_lock(descriptor):
                raise ModelError(f"another export to {self._said} is going on; wait for it, or set --out to another")
            yield
        finally:
            os.close(descriptor)

    def _check_space(self, aside: Path, needed: int) -> None:
        free = shutil.disk_usage(aside).free
        if free < needed:
            raise ModelError(
                f"{self._said} needs {gigabytes(needed)}, and its disk has {gigabytes(free)} free; set --out to another "
                "disk, or --dtype to bfloat16"
            )
