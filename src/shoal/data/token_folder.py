"""The folder of a config's tokens. Its name contains a hash of the options that the tokens depend on. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from shoal.config.data_options import Data, Source
from shoal.data.instruct import open_template, special_texts
from shoal.data.stored.manifest import FORMAT, MANIFEST
from shoal.data.tokens import tokenize
from shoal.data.tokens.tokenize import Tokenizer
from shoal.errors import DataError

# Included only if set, so that folders made before these options existed keep their names.
FILTERS = ("deduplicate", "near_threshold", "shortest_document", "longest_document")
UNSET = Source()
NAME_CHARACTERS = 80  # maximum length of a tokenizer's name in a folder's name, which file systems limit to 255 bytes


def named_tokenizer(data: Data) -> Tokenizer | None:
    """Return the tokenizer that `data` names; None if one is to be trained. Raises DataError if it cannot be loaded."""
    return None if data.tokenizer == "bpe" else tokenize.load_tokenizer(data.tokenizer, data.kept)


def token_options(data: Data, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return everything the tokens depend on except the corpus's content. Omits options that affect only rows and their order."""
    options: dict[str, Any] = {"format": FORMAT, "corpus": data.corpus, "val_fraction": data.val_fraction}
    options["shard_tokens"] = data.shard_tokens
    match data.corpus:
        case "stdlib":
            options["python"] = list(sys.version_info[:3])
        case "datasets":
            options |= {"paths": list(data.paths), "text_key": data.text_key, "split": data.split}
            options |= {} if data.subset is None else {"subset": data.subset}
            options |= {"streaming": True} if data.streaming else {}  # the listing of a stream has no sizes
            options |= {"wikitext": True} if data.wikitext else {}
        case "dummy":
            options["dummy_documents"] = data.dummy_documents
        case "tokens":
            options |= {"paths": list(data.paths), "val_paths": list(data.val_paths)}
            options |= {"token_format": data.token_format, "token_type": data.token_type}
            del options["shard_tokens"]
        case _:
            options |= _file_options(data)
    if data.corpus != "tokens" and (held_out := _held_out_options(data)):
        del options["val_fraction"]
        options |= held_out
    if data.decontaminate:
        options["decontaminate"] = [*data.decontaminate, data.decontaminate_ngram]
    options |= {key: value for key in FILTERS if (value := getattr(data, key)) != getattr(UNSET, key)}
    if data.format != "text":
        options["conversations"] = _conversation_options(data, tokenizer)
    if tokenizer is None:  # one will be trained
        options["bpe"] = [tokenize.PATTERN_VERSION, data.tokenizer_vocab_size, data.tokenizer_sample_bytes]
    else:
        options["tokenizer"] = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
        if tokenizer.bos_id is not None:
            options["bos"] = tokenizer.bos_id
    return options


def _file_options(data: Data) -> dict[str, Any]:
    """Return the options of a corpus of files. A later option is in it only if set, so that older folders keep their names."""
    options: dict[str, Any] = {"paths": list(data.paths)}
    if data.corpus != "text":
        options["text_key"] = data.text_key
    if data.separator:
        options["separator"] = data.separator
    if data.wikitext:
        options["wikitext"] = True
    return options


def _held_out_options(data: Data) -> dict[str, Any]:
    """Return the options of held-out files, which make `data.val_fraction` meaningless; none without such files."""
    if data.val_paths:
        return {"val_paths": list(data.val_paths)}
    return {"val_split": data.val_split} if data.val_split else {}


def _conversation_options(data: Data, tokenizer: Tokenizer | None) -> dict[str, Any]:
    template = open_template(data)
    special = {} if tokenizer is None else special_texts(tokenizer)
    content = json.dumps([template.source, special | dict(template.special)], sort_keys=True)
    return {
        "format": data.format,
        "template": hashlib.sha256(content.encode()).hexdigest(),
        "broken": data.broken_conversations,
        "learn": data.learn,
    }


def find_folder(data: Data, options: dict[str, Any]) -> Path:
    """
    Return the folder where these tokens are or will be.

    Finds them by the hash of their options alone, since the tokenizer's name may have changed. Raises DataError if
    `data.folder` cannot be searched.
    """
    own = folder_name(data, options)
    digest = own.rpartition("-")[2]
    try:
        above = Path(data.folder).expanduser()
        others = sorted(path.parent for path in above.glob(f"{data.corpus}-*-{digest}/{MANIFEST}"))
        has_own = (above / own / MANIFEST).exists()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"cannot search {data.folder} ({why}); set data.folder to another") from error
    return above / own if has_own or not others else others[0]


def find_by_id(data: Data, data_id: str) -> Path | None:
    """
    Return the folder of the tokens with this id, by their manifests; None if there is none.

    The hash of the options may have changed since: a new version of Python, or a template that was edited or is gone.
    """
    for path in sorted(Path(data.folder).expanduser().glob(f"{data.corpus}-*/{MANIFEST}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(path.read_bytes())["data_id"] == data_id:
                return path.parent
    return None


def folder_name(data: Data, options: dict[str, Any]) -> str:
    """Return a readable name such as `stdlib-bpe4096-1a2b3c4d`, unique to these options."""
    tokenizer = Path(data.tokenizer)
    kind = tokenizer.parent.name if tokenizer.name in ("tokenizer.json", "tokenizer.model") else tokenizer.name
    kind = f"bpe{data.tokenizer_vocab_size}" if data.tokenizer == "bpe" else re.sub(r"[^\w.]+", "_", kind)
    digest = hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{data.corpus}-{kind[:NAME_CHARACTERS] or 'tokenizer'}-{digest}"
