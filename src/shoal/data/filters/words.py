"""The words of a text, for comparing texts. No torch."""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """
    Return the words of a text in lower case: its longest runs of letters, digits and underscores.

    Everything else, such as punctuation, line ends and HTML's brackets, only separates words.
    """
    return _WORD.findall(text.lower())
