"""GPT-2's alphabet: a printable character for each byte, used by byte-level vocabularies. No torch."""

from __future__ import annotations


def byte_characters() -> list[str]:
    """Return a character for each byte 0 to 255: itself if printable, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
