"""Completes a config with facts of the machine, data and tokenizer, and writes the files of a run that starts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from shoal.config.data_options import Data
from shoal.config.options import Config
from shoal.data.dataset import Dataset
from shoal.data.instruct import ConversationEncoder, open_template, special_texts
from shoal.data.tokens.chat_template import TEMPLATE_FILE, ChatTemplate
from shoal.data.tokens.tokenize import tokenizer_folder
from shoal.data.tokens.tokenizer_ends import TOKENIZER_CONFIG, read_object
from shoal.errors import DataError
from shoal.hub.beside import GENERATION, OF_MODEL, TOKENIZER, keep, keep_headers
from shoal.hub.find import find_model
from shoal.hub.folder import HEADERS, ModelFolder
from shoal.mesh.mesh import Mesh, check_dtype, has_bfloat16
from shoal.metrics.products import product_rates
from shoal.run.folder import RunFolder
from shoal.system.cpu import multiplies_bfloat16
from shoal.system.disk import write_whole

# Measurements at a start may take half a second in all; `free_cores` takes the rest.
MEASURING_SECONDS: Final = 0.4
# Stop measuring once one dtype is this many times faster: noise cannot reverse that.
CLEAR: Final = 1.25


def finish_config(
    config: Config, folder: RunFolder, dataset: Dataset, mesh: Mesh, say: Callable[[str], None] = lambda text: None
) -> Config:
    """
    Fill in the vocabulary size and the dtype, from the tokenizer and this machine. A collective over the world.

    say: called with a warning if bfloat16 is slow on this CPU.
    Raises `DataError` if the vocabulary is too small or the prompt of the sample too long, `LaunchError` if the device lacks
    the dtype.
    """
    config = folder.with_earlier_choices(config)
    size = config.model.vocab_size or dataset.vocab_size
    dataset.tokenizer.check_rows(size)
    _check_prompt(config, dataset)
    dtype = choose_dtype(config.train.dtype, mesh)
    check_dtype(dtype, mesh.device)
    if dtype == "bfloat16" and mesh.device.type == "cpu" and mesh.is_first and not multiplies_bfloat16():
        say(describe_slow_bfloat16(mesh.device))
    return config.replace("model", vocab_size=size).replace("train", dtype=dtype)


def _check_prompt(config: Config, dataset: Dataset) -> None:
    """Raise DataError if the sample at the end of the run would have no room for a token after its prompt."""
    if not config.train.sample_prompt:
        return
    length, room = len(dataset.tokenizer.encode_prompt(config.train.sample_prompt)), config.model.max_seq_len
    if length >= room:
        raise DataError(
            f"train.sample_prompt has {length:,} tokens, which leaves no room in model.max_seq_len {room:,}; shorten it, or "
            "set it to an empty text for no sample"
        )


def choose_dtype(wanted: str, mesh: Mesh) -> str:
    """
    Return `wanted` or, for "auto", the dtype to use here, the same on every rank.

    A collective over the world for "auto" on CPUs.

    A CPU with bfloat16 instructions may multiply bfloat16 twice as fast as float32, or half as fast.
    """
    if wanted != "auto":
        return wanted
    if mesh.device.type == "cuda":
        return "bfloat16" if has_bfloat16(mesh.device) else "float32"
    mesh.barrier()  # measure on all ranks at once, as they will train
    ratio = -math.inf  # log2 of the rate of bfloat16 over float32
    if multiplies_bfloat16():
        bfloat16, float32 = _rates(mesh.device, clear=CLEAR)
        ratio = math.log2(bfloat16 / float32) if bfloat16 else 0.0
    return "bfloat16" if float(mesh.sum(torch.tensor(ratio, dtype=torch.float64))) > 0 else "float32"


def describe_slow_bfloat16(device: torch.device) -> str:
    """Return a warning for a CPU without bfloat16 instructions: how many times slower bfloat16 is, measured now."""
    bfloat16, float32 = _rates(device)
    slower = f"{float32 / bfloat16:.0f} times as long as" if bfloat16 else "far longer than"
    return (
        f"this CPU has no bfloat16 instructions: a matrix product takes {slower} in float32; set train.dtype to float32 "
        "or auto"
    )


def _rates(device: torch.device, clear: float = math.inf) -> list[float]:
    """Return FLOP/s of bfloat16 and of float32."""
    return product_rates((torch.bfloat16, torch.float32), device, MEASURING_SECONDS, clear=clear)


def write_run_files(folder: RunFolder, config: Config, dataset: Dataset) -> None:
    """Write the config, the tokenizer, and the files that came with the weights. Raises `OSError` if a file cannot be written."""
    folder.save_config(config)
    origin = None if config.model.from_ is None else find_model(config.model.from_, config.model.kept)
    tokenizer = tokenizer_folder(config.data.tokenizer, config.data.kept)
    if origin is not None and not (folder.source / HEADERS).is_file():
        keep(origin, OF_MODEL if tokenizer != origin else (*OF_MODEL, *TOKENIZER), folder.source)
        keep_headers(ModelFolder.open(origin), folder.source)
    if tokenizer is not None and tokenizer != origin:
        keep(tokenizer, TOKENIZER, folder.tokenizer)
    write_whole(folder.tokenizer_file, [dataset.tokenizer.to_json().encode()])
    if (chats := dataset.conversations()) is not None:
        _write_chat_files(folder.tokenizer, chats, tokenizer, dataset)


def _write_chat_files(target: Path, data: Data, origin: Path | None, dataset: Dataset) -> None:
    """
    Write the template of the conversations beside the tokenizer, so that `shoal chat` and exports use it.

    origin: the tokenizer's folder, if it has one. Writes nothing if that folder has this template itself.
    """
    template = open_template(data)
    own = None if origin is None else ChatTemplate.of(origin)
    if own is not None and own.source == template.source:
        return
    if origin is not None:
        keep(origin, TOKENIZER, target)
    else:
        target.mkdir(exist_ok=True)
        (target / "tokenizer.json").write_text(dataset.tokenizer.to_json(), encoding="utf-8")
        special = special_texts(dataset.tokenizer)
        described = {"tokenizer_class": "PreTrainedTokenizerFast", **{k: v for k, v in special.items() if v}}
        write_whole(target / TOKENIZER_CONFIG, [json.dumps(described, ensure_ascii=False).encode()])
    ends = ConversationEncoder(dataset.tokenizer, template, answers_only=True).end_ids()
    generation = read_object(target / GENERATION) | {"eos_token_id": ends}
    write_whole(target / GENERATION, [json.dumps(generation).encode()])
    write_whole(target / TEMPLATE_FILE, [template.source.encode()])
