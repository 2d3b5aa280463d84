"""
Tokenizers: a byte-level BPE trained here, plain bytes, or one of other people's. No torch.

Whatever it was, it becomes a `tokenizers.Tokenizer`, and its file a tokenizer.json that other libraries read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from shoal.data.tokens.byte_level import byte_characters
from shoal.data.tokens.tokenizer_ends import apply_folder, read_ends
from shoal.errors import DataError, ModelError
from shoal.hub.find import find_model, find_path

END_OF_TEXT = "<|endoftext|>"
TIKTOKEN = "tiktoken:"
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
    """
    Text <-> token ids. Special tokens spelt out in a text are text; `eot_id` never comes out of one.

    `bos_id` is the token that stands before each document, None where there is none.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        eot_id: int,
        bos_id: int | None = None,
        *,
        ids_are_bytes: bool = False,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.ids_are_bytes = ids_are_bytes
        self.eot_id = eot_id
        self.bos_id = bos_id
        self.vocab_size: int = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def special_ids(self) -> frozenset[int]:
        """Of all tokens that no text becomes: ends, roles of a chat, padding."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def id_of(self, token: str) -> int | None:
        """Of a token by its text, special ones too; None where there is none."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def encode(self, text: str) -> list[int]:
        """Without the tokens at a document's ends."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """As a document begins that a model is to go on with: `bos_id` first, where there is one."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    def encode_chat(self, text: str) -> list[int]:
        """Text that a chat template wrote: its special tokens are special, and nothing is put before or after."""
        ids: list[int] = self._with_special.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """On all cores (Rayon's; `RAYON_NUM_THREADS` limits them). The GIL is free meanwhile."""
        if self.ids_are_bytes:  # the same ids, without a Rust object for each of them
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

    @cached_property
    def can_be_cut(self) -> bool:
        """Whether the ids of a text's parts give the text; not where each part gets a space in front."""
        return self.decode(self.encode("a\n") + self.encode("b")) == "a\nb"

    def check_rows(self, rows: int) -> None:
        """Raises DataError, naming tokens, where a model of `rows` embeddings has none for some of them."""
        if self.vocab_size <= rows:
            return
        without = range(rows, self.vocab_size)
        tokens = [t for t in map(self._tokenizer.id_to_token, without) if t is not None]
        named = ", ".join(ascii(token) for token in tokens[:5]) + (", ..." if len(tokens) > 5 else "")
        raise DataError(
            f"model.vocab_size {rows:,} is smaller than the tokenizer's {self.vocab_size:,}: no row for {named}; "
            "raise it or leave it out to take the tokenizer's, or set data.tokenizer to the one that the model was made for"
        )

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """A copy: how special tokens are read is a setting of the whole."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = False
        return copy


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
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return Tokenizer(tokenizer, eot_id=256, ids_are_bytes=True)


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def load_tokenizer(spec: str) -> Tokenizer:
    """
    `bytes`; `tiktoken:NAME`; a file: tokenizer.json or a SentencePiece model; or a model's folder or name.

    A file is what it says itself. Of a folder the config files are read too: which token begins and ends a
    document there. Raises DataError.
    """
    if spec == "bytes":
        return byte_tokenizer()
    if spec.startswith(TIKTOKEN):
        from shoal.data.tokens.tiktoken_files import from_tiktoken

        return _with_ends(from_tiktoken(spec.removeprefix(TIKTOKEN)), spec)
    path = _find(spec)
    if path.is_file():
        return _with_ends(_open(path), spec)
    file = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), None)
    if file is None:
        raise DataError(f"{path} has neither tokenizer.json nor tokenizer.model; set data.tokenizer to another")
    tokenizer = _open(file)
    apply_folder(tokenizer, path, has_json=file.suffix == ".json")
    return _with_ends(tokenizer, spec)


def tokenizer_folder(spec: str) -> Path | None:
    """The folder that `spec` names; None for what is no folder."""
    if spec in ("bpe", "bytes") or spec.startswith(TIKTOKEN):
        return None
    path = _find(spec)
    return path if path.is_dir() else None


def _find(spec: str) -> Path:
    try:
        return find_path(spec) or find_model(spec)
    except ModelError as error:
        raise DataError(
            f"no such tokenizer: {spec} ({error}); set data.tokenizer to bpe, bytes, tiktoken:NAME, the path of a "
            "tokenizer.json or tokenizer.model, or a model's folder or name"
        ) from error


def _open(path: Path) -> tokenizers.Tokenizer:
    if ".model" in path.suffixes:  # also tokenizer.model.v1
        from shoal.data.tokens.sentencepiece_model import from_sentencepiece

        return from_sentencepiece(path)
    try:
        return _from_json(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the tokenizer {path}: {error}; set data.tokenizer") from error


def parse_tokenizer(text: str, name: str) -> Tokenizer:
    """From the content of a tokenizer.json. Raises DataError, with `name` in it."""
    return _with_ends(_from_json(text, name), name)


def _from_json(text: str, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{name} is not a tokenizer.json: {error}; set data.tokenizer") from error


def _with_ends(tokenizer: tokenizers.Tokenizer, name: str) -> Tokenizer:
    tokenizer.no_truncation()  # before anything is encoded: a file may say to cut, or to fill up
    tokenizer.no_padding()
    ends = read_ends(tokenizer, name)
    return Tokenizer(tokenizer, ends.eos, ends.bos)
