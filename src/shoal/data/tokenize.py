"""Tokenizers: a byte-level BPE trained here, plain bytes, or any tokenizer.json. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from shoal.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# Names that others gave the token at the end of a document; the first that a tokenizer has is taken.
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "<｜end▁of▁sentence｜>", "[SEP]")
HEARTBEAT_SECONDS = 0.5

# GPT-4's pattern with two changes for source code. A line's end takes the next line's indentation, and
# punctuation takes both ("):\n        " can be one token): 7% fewer tokens on Python. Digits come in
# twos, so that a small vocabulary is not spent on numbers. Every character matches one alternative.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with the one character before it: " the", "(self", "_name"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+(?:\s*\n[ \t]*)?"  # punctuation, to the start of the next line's text
    r"|\s*\n[ \t]*"
    r"|[ \t]+(?!\S)"  # spaces, but for the one that a word takes
    r"|\s+"
)
PATTERN_VERSION = 1  # change it with the pattern: tokens prepared by another are not these


class Tokenizer:
    """Text <-> token ids. Special tokens spelt out in a text are text; `eot_id` never comes out of one."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, eot_id: int, *, ids_are_bytes: bool = False) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._ids_are_bytes = ids_are_bytes
        self.eot_id = eot_id
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Without an end-of-text token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """On all cores (Rayon's; `RAYON_NUM_THREADS` limits them). The GIL is free meanwhile."""
        if self._ids_are_bytes:  # the same ids, without a Rust object for each of them
            return [list(text.encode()) for text in texts]
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens spelt out; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = self._tokenizer.decode_batch([list(ids) for ids in batch], skip_special_tokens=False)
        return texts

    def to_json(self) -> str:
        """The content of a tokenizer.json, which other libraries read too."""
        text: str = self._tokenizer.to_str()
        return text

    def token_bytes(self) -> npt.NDArray[np.int64] | None:
        """[vocab_size] bytes of text that each token stands for, or None if it is not byte-level."""
        spec = json.loads(self._tokenizer.to_str())
        if not _is_byte_level(spec.get("decoder")):
            return None
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)  # byte-level vocabularies write a byte as a character
        for added in spec.get("added_tokens", ()):
            lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return lengths


def _is_byte_level(decoder: Any) -> bool:
    if not isinstance(decoder, dict):
        return False
    return decoder.get("type") == "ByteLevel" or any(_is_byte_level(part) for part in decoder.get("decoders", ()))


def train_bpe(texts: Iterator[str], vocab_size: int, progress: Callable[[], None] = lambda: None) -> Tokenizer:
    """
    Train a byte-level BPE of at most `vocab_size` tokens; id 0 is `<|endoftext|>`.

    `progress` is called about twice a second, also while merges are learnt, when no text is read.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    splitter = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, _byte_level()])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte: any text can be said
        show_progress=False,
    )
    with ThreadPoolExecutor(1) as executor:
        training = executor.submit(tokenizer.train_from_iterator, texts, trainer)
        while not wait([training], HEARTBEAT_SECONDS).done:
            progress()
        training.result()
    return Tokenizer(tokenizer, eot_id=0)


def byte_tokenizer() -> Tokenizer:
    """256 bytes, each its own id, and the end of text: 257."""
    vocab = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return Tokenizer(tokenizer, eot_id=256, ids_are_bytes=True)


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _byte_characters() -> list[str]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def load_tokenizer(spec: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json (or of a folder that has one). Raises DataError."""
    if spec == "bytes":
        return byte_tokenizer()
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise DataError(f"no such tokenizer: {spec}; set data.tokenizer to bpe, bytes or the path of a tokenizer.json")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the tokenizer {spec}: {error}; set data.tokenizer") from error
    return parse_tokenizer(text, spec)


def parse_tokenizer(text: str, name: str) -> Tokenizer:
    """From the content of a tokenizer.json. Raises DataError, with `name` in it."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{name} is not a tokenizer.json: {error}; set data.tokenizer") from error
    for token in END_NAMES:
        eot_id = tokenizer.token_to_id(token)
        if eot_id is not None:
            return Tokenizer(tokenizer, eot_id)
    raise DataError(f"{name} has no end-of-text token (one of {', '.join(END_NAMES)}); add one, or set data.tokenizer")
