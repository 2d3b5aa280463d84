"""
The tokens that begin and end a document, from a tokenizer.json or a Hugging Face folder. No torch.

They are saved in the tokenizer.json itself, as its post-processor, which puts tokens before a single text and between two
texts. So shoal and other libraries need only that file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from shoal.errors import DataError, ModelError
from shoal.hub.values import token_ids

# Common names of the end-of-text token; the first that a tokenizer has is used.
END_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)
SPECIAL = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
TOKENIZER_CONFIG, TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"


@dataclass(frozen=True)
class Ends:
    """Ids of the tokens before and after each document; `bos` is None if there is none before."""

    bos: int | None
    eos: int


def read_ends(tokenizer: tokenizers.Tokenizer, name: str) -> Ends:
    """
    Read the ends from a tokenizer.json.

    Raises DataError, with `name` in its message, if the file has no end-of-text token or puts several tokens before a text.
    """
    bos = _beginning(tokenizer, name)
    eos = _end(tokenizer, bos)
    if eos is None:
        raise DataError(
            f"{name} has no end-of-text token (one of {', '.join(END_NAMES)}); add one, or set data.tokenizer"
        )
    return Ends(bos, eos)


def apply_folder(tokenizer: tokenizers.Tokenizer, folder: Path, *, has_json: bool) -> None:
    """
    Set the tokenizer's ends to those in the config files of a Hugging Face folder.

    As in `transformers`, `add_bos_token` applies only without a tokenizer.json, which has its own setting. Raises
    DataError if a named token is missing.
    """
    bos = _beginning(tokenizer, str(folder))
    special = special_tokens(folder)
    puts_bos = not has_json and read_object(folder / TOKENIZER_CONFIG).get("add_bos_token")
    if puts_bos and "bos_token" in special:
        bos = _id_of(tokenizer, special["bos_token"], "bos_token", folder)
    eos = _end_of_folder(tokenizer, special.get("eos_token"), folder)
    if eos is None:
        eos = read_ends(tokenizer, str(folder)).eos
    _write_ends(tokenizer, Ends(bos, eos), str(folder))


def special_tokens(folder: Path) -> dict[str, str]:
    """
    Return the texts of those `SPECIAL` tokens that the config files of a Hugging Face folder name.

    As in `transformers`, the older special_tokens_map.json overrides tokenizer_config.json, even with null, unless the latter
    has `added_tokens_decoder`.
    """
    said = read_object(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in said:
        said |= read_object(folder / TOKENS_MAP)
    return {key: text for key in SPECIAL if (text := _content_of(said.get(key))) is not None}


def _content_of(token: Any) -> str | None:
    """Return the text of a token, which these files store as text or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _end_of_folder(tokenizer: tokenizers.Tokenizer, name: str | None, folder: Path) -> int | None:
    if name is not None:
        return _id_of(tokenizer, name, "eos_token", folder)
    for file in ("generation_config.json", "config.json"):
        try:
            ids = token_ids(read_object(folder / file).get("eos_token_id"), str(folder / file))
        except ModelError as error:
            raise DataError(str(error)) from None
        if ids:
            first = ids[0]
            if tokenizer.id_to_token(first) is None:
                raise DataError(f"{folder / file} has eos_token_id {first}, which the tokenizer lacks; correct one")
            return first
    return None


def _id_of(tokenizer: tokenizers.Tokenizer, token: str, key: str, folder: Path) -> int:
    index: int | None = tokenizer.token_to_id(token)
    if index is None:
        raise DataError(
            f"{folder} has {key} {token}, which the tokenizer lacks; correct it in {TOKENIZER_CONFIG} or {TOKENS_MAP}"
        )
    return index


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file gives an empty one. Raises DataError if the file is anything else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path}: {error}; correct or remove it") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object; correct or remove it")
    return found


def _beginning(tokenizer: tokenizers.Tokenizer, name: str) -> int | None:
    before, _ = _around(tokenizer)
    if len(before) > 1:
        tokens = " ".join(str(tokenizer.id_to_token(index)) for index in before)
        raise DataError(f"{name} puts more than one token before a text ({tokens}); set data.tokenizer to another")
    return before[0] if before else None


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer puts before and after a text."""
    plain: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    full: list[int] = tokenizer.encode("a").ids
    if len(full) == len(plain):
        return [], []
    first = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
    return full[:first], full[first + len(plain) :]


def _end(tokenizer: tokenizers.Tokenizer, bos: int | None) -> int | None:
    """Return the first token put between two texts if it ends the first text, else the first known one of END_NAMES, else None."""
    plain: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    both: list[int] = tokenizer.encode("a", "a").ids
    first = (bos is not None) + len(plain)
    if len(both) > first + len(plain) and both[first] != bos:
        return both[first]
    return next((index for index in map(tokenizer.token_to_id, END_NAMES) if index is not None), None)


def _write_ends(tokenizer: tokenizers.Tokenizer, ends: Ends, name: str) -> None:
    """Set the tokenizer's ends. Leaves it unchanged if they are set already, so that its file and the file's hash stay the same."""
    before, after = _around(tokenizer)
    wanted = [] if ends.bos is None else [ends.bos]
    if before == wanted and _end(tokenizer, ends.bos) == ends.eos:
        return
    names = {index: str(tokenizer.id_to_token(index)) for index in (*wanted, ends.eos, *after)}
    begin = [names[index] for index in wanted]
    try:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *(names[index] for index in after)],
            pair=[*begin, "$A", names[ends.eos], *begin, "$B:1"],
            special_tokens=[(token, index) for index, token in names.items()],
        )
    except ValueError as error:
        raise DataError(f"{name}: its tokens {begin} cannot be saved in a tokenizer.json: {error}") from error
