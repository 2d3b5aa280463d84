"""
Tokenizers: a byte-level BPE trained here, plain bytes, or an existing tokenizer. No torch.

Each becomes a `tokenizers.Tokenizer`, saved as a tokenizer.json that other libraries read.
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

# GPT-4's pattern with two changes for source code. A line end includes the next line's indentation, and punctuation
# includes both ("):\n        " can be one token): 7% fewer tokens on Python. Digits are grouped by two, to keep
# numbers from filling a small vocabulary. Every character matches one alternative.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the character before it: " the", "(self", "_name"
    r"|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]+(?:\s*\n[ \t]*)?"  # punctuation, to the start of the next line's text
    r"|\s*\n[ \t]*"
    r"|[ \t]+(?!\S)"  # spaces, except the one before a word
    r"|\s+"
)
PATTERN_VERSION = 1  # change it with the pattern, so that tokens are prepared again


class Tokenizer:
    """
    Text <-> token ids. Names of special tokens in a text are encoded as plain text, so no text yields `eot_id`.

    eot_id: the id of the token after each document. bos_id: the id of the token before each document; None if there is none.
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
        """Ids of all special tokens (document ends, chat roles, padding), which plain text never yields."""
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of the tokens that were added to the model's vocabulary: special tokens, and others that are plain text."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def pieces(self) -> dict[str, int]:
        """Return the vocabulary: the id of each token by its text, as the tokenizer stores it."""
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocab

    def id_of(self, token: str) -> int | None:
        """Return the id of a token, special or not, by its text; None if there is none."""
        index: int | None = self._tokenizer.token_to_id(token)
        return index

    def encode(self, text: str) -> list[int]:
        """Encode without the tokens that begin and end a document."""
        return self.encode_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Encode the start of a document that a model will continue: `bos_id` first, if there is one."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    def encode_chat(self, text: str) -> list[int]:
        """Encode the output of a chat template: names of special tokens become those tokens, and no token is added."""
        ids: list[int] = self._with_special.encode(text, add_special_tokens=False).ids
        return ids

    def encode_chat_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode outputs of a chat template on all cores, as `encode_chat` does."""
        return [e.ids for e in self._with_special.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts on all cores (`RAYON_NUM_THREADS` limits them), with the GIL released."""
        if self.ids_are_bytes:  # the same ids, without a Rust object per id
            return [list(text.encode()) for text in texts]
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text, with the names of special tokens; invalid UTF-8 becomes U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = self._tokenizer.decode_batch([list(ids) for ids in batch], skip_special_tokens=False)
        return texts

    def to_json(self) -> str:
        """Return the content of a tokenizer.json."""
        text: str = self._tokenizer.to_str()
        return text

    @cached_property
    def can_be_cut(self) -> bool:
        """Whether a text encoded in parts decodes to itself; False if the tokenizer puts a space before each part."""
        return self.decode(self.encode("a\n") + self.encode("b")) == "a\nb"

    def check_rows(self, rows: int) -> None:
        """Raise DataError if an embedding of `rows` rows is too small, and name the first tokens without a row."""
        if self.vocab_size <= rows:
            return
        without = range(rows, self.vocab_size)
        tokens = [t for t in map(self._tokenizer.id_to_token, without) if t is not None]
        named = ", ".join(ascii(token) for token in tokens[:5]) + (", ..." if len(tokens) > 5 else "")
        raise DataError(
            f"model.vocab_size {rows:,} is smaller than the tokenizer's {self.vocab_size:,}: no row for {named}; "
            "raise it, omit it to use the tokenizer's, or set data.tokenizer to the tokenizer that the model was made for"
        )

    @cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """A copy that recognizes special tokens, which is a setting of the whole tokenizer."""
        copy = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = False
        return copy


def train_bpe(texts: Iterator[str], vocab_size: int, progress: Callable[[], None] = lambda: None) -> Tokenizer:
    """
    Train a byte-level BPE of at most `vocab_size` tokens; id 0 is `<|endoftext|>`.

    progress: called about twice a second, also while merges are learned and no text is read.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    splitter = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([splitter, _byte_level()])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that any text can be encoded
        show_progress=False,
    )
    with ThreadPoolExecutor(1) as executor:
        training = executor.submit(tokenizer.train_from_iterator, texts, trainer)
        while not wait([training], HEARTBEAT_SECONDS).done:
            progress()
        training.result()
    return Tokenizer(tokenizer, eot_id=0)


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer of 257 tokens: each byte is its own id, and 256 is the end of text."""
    vocab = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return Tokenizer(tokenizer, eot_id=256, ids_are_bytes=True)


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def load_tokenizer(spec: str, kept: Path | None = None) -> Tokenizer:
    """
    Load `bytes`, `tiktoken:NAME`, a tokenizer.json, a SentencePiece model, or the tokenizer of a model's folder or name.

    A folder's config files may also set which tokens begin and end a document. kept: the run's copy of that
    folder, used if the original is gone, or of tiktoken's; None if there is no copy.

    Raises DataError if there is no such tokenizer, or if it cannot be read or converted.
    """
    if spec == "bytes":
        return byte_tokenizer()
    if spec.startswith(TIKTOKEN) and kept is not None:
        return load_tokenizer(str(kept))
    if spec.startswith(TIKTOKEN):
        from shoal.data.tokens.tiktoken_files import from_tiktoken

        return _with_ends(from_tiktoken(spec.removeprefix(TIKTOKEN)), spec)
    path = _find(spec, kept)
    if path.is_file():
        return _with_ends(_open(path), spec)
    file = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), None)
    if file is None:
        raise DataError(f"{path} has neither tokenizer.json nor tokenizer.model; set data.tokenizer to another")
    tokenizer = _open(file)
    apply_folder(tokenizer, path, has_json=file.suffix == ".json")
    return _with_ends(tokenizer, spec)


def tokenizer_folder(spec: str, kept: Path | None = None) -> Path | None:
    """Return the folder that `spec` names; None if it is not a folder."""
    if spec in ("bpe", "bytes") or spec.startswith(TIKTOKEN):
        return None
    path = _find(spec, kept)
    return path if path.is_dir() else None


def _find(spec: str, kept: Path | None) -> Path:
    try:
        return find_path(spec) or find_model(spec, kept)
    except ModelError as error:
        raise DataError(
            f"no such tokenizer: {spec} ({error}); set data.tokenizer to bpe, bytes, tiktoken:NAME, the path of a "
            "tokenizer.json or tokenizer.model, or a model's folder or name"
        ) from error


def _open(path: Path) -> tokenizers.Tokenizer:
    if ".model" in path.suffixes:  # for tokenizer.model.v1 too
        from shoal.data.tokens.sentencepiece_model import from_sentencepiece

        return from_sentencepiece(path)
    try:
        return _from_json(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the tokenizer {path}: {error}; set data.tokenizer") from error


def parse_tokenizer(text: str, name: str) -> Tokenizer:
    """Parse the content of a tokenizer.json. Raises DataError, with `name` in its message, if that fails."""
    return _with_ends(_from_json(text, name), name)


def _from_json(text: str, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{name} is not a tokenizer.json: {error}; set data.tokenizer") from error


def _with_ends(tokenizer: tokenizers.Tokenizer, name: str) -> Tokenizer:
    tokenizer.no_truncation()  # before encoding: a tokenizer.json may enable truncation or padding
    tokenizer.no_padding()
    ends = read_ends(tokenizer, name)
    return Tokenizer(tokenizer, ends.eos, ends.bos)
