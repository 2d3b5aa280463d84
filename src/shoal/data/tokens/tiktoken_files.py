"""Convert tiktoken's encodings, from its cached files, to the tokenizers library. No torch."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import urllib.request
from collections.abc import Mapping
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from shoal.data.tokens.byte_level import byte_characters
from shoal.data.tokens.same_ids import check_same_ids
from shoal.errors import DataError
from shoal.system.disk import write_whole

HOST = "https://openaipublic.blob.core.windows.net/"
FILES: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json"),
    "r50k_base": ("encodings/r50k_base.tiktoken",),
    "p50k_base": ("encodings/p50k_base.tiktoken",),
    "p50k_edit": ("encodings/p50k_base.tiktoken",),
    "cl100k_base": ("encodings/cl100k_base.tiktoken",),
    "o200k_base": ("encodings/o200k_base.tiktoken",),
    "o200k_harmony": ("encodings/o200k_base.tiktoken",),
}
CONNECT_SECONDS = 5.0


def from_tiktoken(name: str) -> tokenizers.Tokenizer:
    """Convert the encoding `name`, and compare its ids with tiktoken's. Raises DataError if that fails or any id differs."""
    return tokenizers.Tokenizer.from_str(_converted(name))


@lru_cache(maxsize=2)  # preparing loads the tokenizer twice, and the merges of 200,000 tokens take seconds
def _converted(name: str) -> str:
    try:
        import tiktoken
    except ImportError as error:
        raise DataError(f"tiktoken:{name} needs the tiktoken library: pip install 'shoal[tiktoken]'") from error
    if name not in FILES:
        raise DataError(
            f"tiktoken has no encoding {name}; set data.tokenizer to tiktoken: and one of {', '.join(FILES)}"
        )
    for file in FILES[name]:
        _get(HOST + file)
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as error:  # errors of requests may quote a proxy's address; ValueError for a wrong hash
        raise DataError(
            f"tiktoken cannot open {name} ({type(error).__name__}); set data.tokenizer, or TIKTOKEN_CACHE_DIR"
        ) from None
    tokenizer = _convert(encoding)
    check_same_ids(f"tiktoken:{name}", tokenizer, encoding.encode_ordinary)
    text: str = tokenizer.to_str()
    return text


def _get(address: str) -> None:
    """
    Download a file to tiktoken's cache unless it is there, so that the library itself never waits for a network.

    Raises DataError if it is neither cached nor reachable within CONNECT_SECONDS.
    """
    given = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    folder = Path(given) if given else Path(tempfile.gettempdir(), "data-gym-cache")
    path = folder / hashlib.sha1(address.encode()).hexdigest()
    if path.is_file():
        return
    try:
        with urllib.request.urlopen(address, timeout=CONNECT_SECONDS) as answer:
            content = answer.read()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, [content])
    except (OSError, ValueError, HTTPException) as error:  # all but OSError quote the proxy's address
        why = error if isinstance(error, OSError) else f"{type(error).__name__}: see HTTPS_PROXY"
        raise DataError(
            f"tiktoken's file {address} is not on this machine and cannot be downloaded ({why}); put it at {path}"
            + ("" if given else ", or in another folder under that name, and set TIKTOKEN_CACHE_DIR to the folder")
        ) from None


def _convert(encoding: Any) -> tokenizers.Tokenizer:
    """Convert a `tiktoken.Encoding`."""
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    special: dict[str, int] = encoding._special_tokens
    characters = byte_characters()
    written = {token: "".join(characters[byte] for byte in token) for token in ranks}
    vocab = {written[token]: rank for token, rank in ranks.items()}
    merges = [(written[left], written[right]) for left, right in _merges(ranks)]
    # Special tokens are in the vocabulary too, so that they keep their ids, which may have gaps between them.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={**vocab, **special}, merges=merges, ignore_merges=True))
    splitter = pre_tokenizers.Split(Regex(_pattern(encoding._pat_str)), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(special, key=special.__getitem__))
    return tokenizer


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """
    Return every way to build a token from two others, in the order of the result's rank.

    tiktoken merges any two neighbors whose join is a token, lowest rank first, so one way per token is not enough.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in pairs if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _pattern(pattern: str) -> str:
    """
    Translate a pattern from Rust's syntax to Oniguruma's, which tokenizers uses.

    `{1,3}+` is possessive in Rust, but a repeated repetition in Oniguruma; greedy `{1,3}` is equal here, as nothing
    follows it. `$` is the end of the text in Rust, but the end of a line in Oniguruma.
    """
    return re.sub(r"(\{\d+,\d+\})\+", r"\1", pattern).replace("$", r"\z")
