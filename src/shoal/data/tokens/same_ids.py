"""Check that two tokenizers give the same ids, on texts chosen to tell them apart. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator

import tokenizers

from shoal.errors import DataError

TEXTS = (
    "",
    " ",
    "   three before, three after   ",
    "\n\n\t  \r\n \x00\x01\x7f\n",
    "The quick brown fox doesn't jump; they'LL say: \"it's I'm\" and 'ſ 'K.",
    "a\u0301 é e\u0301\u0302 ﬁ ½ Ⅷ ① ｆｕｌｌ \u200d\u200b\ufeff\u00a0\u3000\u2028\u0085x",
    "Tie\u0302\u0301ng Vie\u0323\u0302t, A\u030angstro\u0308m, ½\u0301 \u00a0\u0301 ﬁ\u0302 か\u3099 ｶﾞ ～",  # decomposed
    "👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 👍🏽 漢字かな交じり文 שלום \u202e العربية हिन्दी ภาษาไทย 한국어 𝒳𝒴",
    "\U0010ffff\ufffd\ufffe 𐍈\u0600",
    "1234567890 0x1F 1_000.5e-7 3.14159 १२३ 12,345,678",
    "def f(x):\n        return x  \n\n\n    # end\r\n\r\n\tif x<=1 and y!=2: {'a': [1, 2]} //**//\n",
    "<|x|> [INST] <s>hi</s> <unk> <0x41> <pad>",
    "▁ ▁▁ \u2581word",
    "camelCase HTTPServer snake_case kebab-case ALLCAPS",
    " " * 300 + "end" + "\n" * 40 + "x" + "-" * 200 + "=" * 77 + "ab" * 150,
)
LAST_SWEPT = 0x3100  # covers letters, digits, marks and spaces of most scripts


def sample(special: Iterable[str] = ()) -> list[str]:
    """Return texts that two tokenizers must encode alike. special: names of special tokens, included as plain text."""
    return [*TEXTS, *_sweep(), " a".join(special)]


def _sweep() -> Iterator[str]:
    """Yield texts with each assigned character up to LAST_SWEPT next to letters, spaces and a digit, where patterns differ."""
    known = [c for c in map(chr, range(LAST_SWEPT)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")]
    for low in range(0, len(known), 512):
        yield "".join(f"a{c}b {c} 1{c}\n" for c in known[low : low + 512])


def check_same_ids(name: str, converted: tokenizers.Tokenizer, encode: Callable[[str], list[int]]) -> None:
    """Raise DataError, with the first text that differs, if `converted` and `encode` give different ids."""
    converted.encode_special_tokens = True
    special = [t.content for t in converted.get_added_tokens_decoder().values() if t.special][:100]
    texts = sample(special)
    for text, encoding in zip(texts, converted.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        if encoding.ids != encode(text):
            shown = next((line for line in text.splitlines() if _differs(line, converted, encode)), text)[:60]
            raise DataError(
                f"{name} cannot be used: converted to a tokenizer.json it gives other ids than its own library "
                f"(for {shown!a}); set data.tokenizer to a tokenizer.json from its authors, or to another tokenizer"
            )


def _differs(text: str, converted: tokenizers.Tokenizer, encode: Callable[[str], list[int]]) -> bool:
    ids: list[int] = converted.encode(text, add_special_tokens=False).ids
    return ids != encode(text)
