"""What only this machine, the data and the tokenizer can say of a config; and what a run writes down before it starts."""

from __future__ import annotations

import shutil

from shoal.config import Config
from shoal.data.prepare import Prepared
from shoal.data.tokenize import tokenizer_folder
from shoal.hub.beside import OF_MODEL, TOKENIZER, keep, keep_headers
from shoal.hub.find import find_model
from shoal.hub.folder import HEADERS, ModelFolder
from shoal.metrics.meter import settle_dtype
from shoal.parallel.mesh import Mesh, check_dtype
from shoal.runs import RunFolder


def settle(config: Config, folder: RunFolder, prepared: Prepared, mesh: Mesh) -> Config:
    """
    Fill what only this machine and the tokenizer can say: the vocabulary, the dtype. A collective over the world.

    Raises `DataError` where the vocabulary is too small, `LaunchError` where the device lacks the dtype.
    """
    config = folder.settled(config)
    size = config.model.vocab_size or prepared.vocab_size
    prepared.tokenizer.check_rows(size)
    dtype = settle_dtype(config.train.dtype, mesh)
    check_dtype(dtype, mesh.device)
    return config.replace("model", vocab_size=size).replace("train", dtype=dtype)


def write_run_files(folder: RunFolder, config: Config, prepared: Prepared) -> None:
    """The config, the tokenizer, and what lay beside the weights. Raises `OSError`."""
    folder.save_config(config)
    origin = None if config.model.from_ is None else find_model(config.model.from_)
    tokenizer = tokenizer_folder(config.data.tokenizer)
    if origin is not None and not (folder.source / HEADERS).is_file():
        keep(origin, OF_MODEL if tokenizer != origin else (*OF_MODEL, *TOKENIZER), folder.source)
        keep_headers(ModelFolder.open(origin), folder.source)
    if tokenizer is not None and tokenizer != origin:
        keep(tokenizer, TOKENIZER, folder.tokenizer)
    shutil.copyfile(prepared.folder / "tokenizer.json", folder.tokenizer_file)
