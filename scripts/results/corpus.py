"""A corpus that every Debian machine can make: the text of documentation packages, one document for each HTML page."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

PACKAGES: Final = (
    "linux-doc-6.1", "python3.11-doc", "postgresql-doc-15", "debian-policy", "debian-reference-en", "developers-reference",
)  # fmt: skip
FEWEST_CHARACTERS: Final = 200  # a shorter page only forwards to another
HIDDEN: Final = ("script", "style", "nav", "head")  # elements without text to learn from


def write_corpus(file: Path) -> None:
    """Download the packages with apt-get, as any user, and write their pages as JSON lines with a `text` key, in a fixed order."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "-qq", "download", *PACKAGES], cwd=folder, check=True, stderr=subprocess.DEVNULL)
        part = file.with_suffix(".part")
        with part.open("w", encoding="utf-8") as out:
            for package in sorted(Path(folder).glob("*.deb")):
                for text in _pages(package):
                    out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        part.replace(file)


def _pages(package: Path) -> Iterator[str]:
    """Yield the text of each HTML page of a package, by path."""
    unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", package], check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(unpacked)) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if not (member.isfile() and member.name.endswith(".html")):
                continue
            opened = archive.extractfile(member)
            assert opened is not None  # a file
            text = text_of(opened.read().decode("utf-8", errors="replace"))
            if len(text) >= FEWEST_CHARACTERS:
                yield text


def text_of(html: str) -> str:
    """Return the text of an HTML page, with at most one empty line between paragraphs."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    lines = [line.rstrip() for line in "".join(reader.parts).splitlines()]
    kept = [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]
    return "\n".join(kept).strip() + "\n"


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._hidden += tag in HIDDEN

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in HIDDEN and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)
