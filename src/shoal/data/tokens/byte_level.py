"""GPT-2's alphabet: a character for each byte, in which byte-level vocabularies are written. No torch."""

from __future__ import annotations


def byte_characters() -> list[str]:
    """Of bytes 0 to 255: printable ones stand for themselves, the others for characters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
