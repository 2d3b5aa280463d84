"""
Bits per byte of a text with gzip and xz, to compare a model with. No torch.

A model has read the training text before it sees the held-out text, so a compressor may read it too. The "primed" size of a
text is what it adds to the compressed size of the training text; its "cold" size is that of the text compressed alone.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable

MIN_WINDOW, MAX_WINDOW = 4096, 1 << 26  # xz's dictionary in bytes; xz needs about twelve times as much memory


def sizes(training: bytes, text: bytes) -> dict[str, dict[str, float]]:
    """Return the bits per byte of `text` with `xz -9e` and `gzip -9`: cold, and primed with `training`."""
    window = min(max(len(training) + len(text), MIN_WINDOW), MAX_WINDOW)
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "xz": lambda content: _xz(content, window),
        "gzip": lambda content: gzip.compress(content, 9, mtime=0),
    }
    found = {}
    for name, compress in compressors.items():
        cold, before, both = (len(compress(content)) for content in (text, training, training + text))
        found[name] = {"cold": 8 * cold / len(text), "primed": 8 * (both - before) / len(text)}
    return found


def _xz(content: bytes, window: int) -> bytes:
    preset = 9 | lzma.PRESET_EXTREME
    return lzma.compress(content, filters=[{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": window}])
