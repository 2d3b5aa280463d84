"""
Which format a token file has, and where its ids are. No torch.

| format | file |
| --- | --- |
| nanogpt | `.bin`: ids, no header; each document ends with the end token |
| llm.c | `.bin`: 256 int32 (magic, version, number of tokens), then ids; each document begins with the end token |
| megatron | `.bin`: ids; beside it an `.idx` with their type and the documents |
| raw | `.npy` or `.ds`: ids, no header (OLMo, dolma, datatrove), or a NumPy header; each document ends with the end token |
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final

import numpy as np

from shoal.data.pretokenized.megatron import MegatronIndex
from shoal.data.pretokenized.token_file import Borders, Contents, Format, TokenFile, Vocabulary
from shoal.errors import DataError

SUFFIXES: Final = (".bin", ".idx", ".npy", ".ds")
PICKLES: Final = (".pkl", ".pickle", ".pt", ".pth")

LLM_C_HEADER: Final = struct.Struct("<256i")
LLM_C_TYPES: Final[dict[int, np.dtype[Any]]] = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
LLM_C_VERSIONS: Final = (1, 7)
LLM_C_OTHERS: Final = {
    20240522: "an evaluation file of llm.c (multiple-choice questions)",
    20240326: "a model of llm.c",
    20240327: "a debugging state of llm.c",
    20240328: "a tokenizer of llm.c",
    20240527: "an optimizer state of llm.c",
}
NPY_MAGIC: Final = b"\x93NUMPY"
FEWEST_PAIRS: Final = 16  # fewer tokens do not show their type


def open_token_file(name: str, path: Path, token_format: str, token_type: str, vocabulary: Vocabulary) -> TokenFile:
    """
    Open a token file; of Megatron-LM's two files, the .bin.

    token_format, token_type: values of the options of these names. Raises DataError if the file does not have this format, or
    is empty, cut short, or of another type.
    """
    if path.suffix.lower() in PICKLES:
        raise _pickle(name)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(LLM_C_HEADER.size)
        found = find_format(name, path, head) if token_format == "auto" else token_format
        contents, borders = _contents(found, name, path, size, head, token_type, vocabulary)
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror or error}; fix it or correct data.paths") from error
    if not contents.num_tokens:
        raise DataError(f"{name} has no tokens; take it out of data.paths")
    _check_type(name, contents, token_type)
    if borders is None and vocabulary.eot_id > np.iinfo(contents.dtype).max:
        raise DataError(
            f"{name} holds {contents.dtype} ids, too narrow for the end token of {vocabulary.name}, {vocabulary.eot_id:,}; set "
            "data.tokenizer to the tokenizer that made the file, or data.token_type to its type"
        )
    return TokenFile(name, path, contents, vocabulary, borders)


def find_format(name: str, path: Path, head: bytes) -> Format:
    """Return the format of a file that begins with `head`. Raises DataError if it is none, or a known file without tokens."""
    suffix = path.suffix.lower()
    magic = struct.unpack("<i", head[:4])[0] if len(head) >= 4 else 0
    if suffix == ".bin" and path.with_suffix(".idx").exists():
        return "megatron"
    if suffix == ".bin" and magic in LLM_C_OTHERS:
        raise DataError(f"{name} is {LLM_C_OTHERS[magic]}, not a token file; take it out of data.paths")
    if suffix == ".bin" and magic in LLM_C_TYPES:
        return "llm.c"
    if suffix in SUFFIXES:
        return "nanogpt" if suffix == ".bin" else "raw"
    raise DataError(
        f"{name}: names of token files end in {', '.join(SUFFIXES)}; set data.token_format if this is one, else data.corpus"
    )


def _contents(
    token_format: str, name: str, path: Path, size: int, head: bytes, token_type: str, vocabulary: Vocabulary
) -> tuple[Contents, Borders | None]:
    match token_format:
        case "llm.c":
            return _llm_c(name, size, head), None
        case "megatron":
            return _megatron(name, path, size)
        case "raw" if head.startswith(NPY_MAGIC):
            return _npy(name, path, size), None
        case _:
            if head.startswith(NPY_MAGIC):
                raise DataError(f"{name} has a NumPy header; set data.token_format to raw")
            headless: Format = "nanogpt" if token_format == "nanogpt" else "raw"
            return _headless(headless, name, size, head, token_type, vocabulary), None


def _llm_c(name: str, size: int, head: bytes) -> Contents:
    if len(head) < LLM_C_HEADER.size:
        raise DataError(f"{name} has {size:,} bytes, less than the 1,024 of llm.c's header; copy it again")
    magic, version, count, *_ = LLM_C_HEADER.unpack(head)
    if magic not in LLM_C_TYPES:
        what = LLM_C_OTHERS.get(magic, f"not a token file of llm.c: it begins with {magic}, not {_either(LLM_C_TYPES)}")
        raise DataError(f"{name} is {what}; correct data.token_format or data.paths")
    if version not in LLM_C_VERSIONS:
        raise DataError(
            f"{name} has version {version} of llm.c's format; shoal reads versions {_either(LLM_C_VERSIONS)}"
        )
    dtype = LLM_C_TYPES[magic]
    if count < 0 or LLM_C_HEADER.size + count * dtype.itemsize != size:
        raise DataError(
            f"{name}: its header counts {count:,} tokens of {dtype}, {LLM_C_HEADER.size + count * dtype.itemsize:,} bytes in "
            f"all, but the file has {size:,}; copy it again"
        )
    return Contents("llm.c", dtype, LLM_C_HEADER.size, count)


def _megatron(name: str, path: Path, size: int) -> tuple[Contents, Borders]:
    index = path.with_suffix(".idx")
    if not index.exists():
        raise DataError(
            f"{name} has no {index.name} beside it; put it there, or set data.token_format to nanogpt or llm.c"
        )
    found = MegatronIndex(str(Path(name).with_suffix(".idx")), index, path.name, size)
    return found.contents, found


def _headless(
    token_format: Format, name: str, size: int, head: bytes, token_type: str, vocabulary: Vocabulary
) -> Contents:
    by_size = "uint16" if vocabulary.size <= 1 << 16 else "uint32"
    dtype = np.dtype(by_size if token_type == "auto" else token_type).newbyteorder("<")
    why = f", the type for a vocabulary of {vocabulary.size:,}" if token_type == "auto" else ""
    if size % dtype.itemsize:
        raise DataError(
            f"{name} has {size:,} bytes, not a multiple of the {dtype.itemsize} of {dtype}{why}: it was cut short, or "
            "data.token_type is wrong"
        )
    if dtype.itemsize == 2 and _is_wide(head):
        raise DataError(f"{name} looks like 4-byte ids, not {dtype}{why}; set data.token_type to uint32 or int32")
    return Contents(token_format, dtype, 0, size // dtype.itemsize)


def _is_wide(head: bytes) -> bool:
    """Return whether every second uint16 is 0, as in 4-byte ids below 65,536: such a file would pass for uint16 ids."""
    pairs = np.frombuffer(head[: len(head) // 4 * 4], "<u2").reshape(-1, 2)
    return len(pairs) >= FEWEST_PAIRS and bool(pairs[:, 0].any()) and not pairs[:, 1].any()


def _npy(name: str, path: Path, size: int) -> Contents:
    """Read a NumPy header, which NumPy evaluates as a literal, never as code."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with path.open("rb") as file:
        try:
            shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
        except Exception as error:  # NumPy raises many kinds, also of Python's parser
            raise DataError(f"{name} has a damaged NumPy header ({error}); copy it again") from error
        offset = file.tell()
    if dtype.hasobject:
        raise _pickle(name)
    if len(shape) != 1 or dtype.kind not in "iu":
        raise DataError(f"{name} is an array of {dtype}, shape {shape}; token files have one dimension of integers")
    if offset + shape[0] * dtype.itemsize != size:
        raise DataError(
            f"{name}: its header counts {shape[0]:,} tokens of {dtype}, {offset + shape[0] * dtype.itemsize:,} bytes in all, but "
            f"the file has {size:,}; copy it again"
        )
    return Contents("raw", dtype, offset, shape[0])


def _check_type(name: str, contents: Contents, token_type: str) -> None:
    if token_type != "auto" and contents.dtype != np.dtype(token_type):
        raise DataError(f"{name} holds {contents.dtype} ids by its header, not {token_type}; remove data.token_type")


def _pickle(name: str) -> DataError:
    return DataError(
        f"{name} is a pickle, which can run any code when it is opened, so shoal does not read it; name the token files "
        f"({', '.join(SUFFIXES)}) in data.paths, and their vocabulary as a tokenizer.json in data.tokenizer"
    )


def _either(numbers: Any) -> str:
    return " or ".join(map(str, numbers))
