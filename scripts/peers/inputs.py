"""What all contenders get: shoal's recipe of a shape, and the same tokens and initial weights as files."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from scripts.peers.contract import Spec

from shoal.config.families import FAMILIES
from shoal.config.options import Config
from shoal.config.presets import resolve_shape
from shoal.data.dataset import new_order, open_data
from shoal.data.loader import Loader
from shoal.models.build import build_model, initialize
from shoal.resolve.resolve import resolve
from shoal.run.console import Console

SHAPES: Final[dict[str, str]] = {
    "10m": """
model: {family: llama, dim: 384, num_layers: 6, num_heads: 6, ffn_dim: 1024, vocab_size: 257, max_seq_len: 256}
data: {corpus: stdlib, tokenizer: bytes, seq_len: 256}
optim: {lr: 1e-3}
train: {steps: 12, global_batch: 12, micro_batch: 12}
""",
    "124m": """
model: {family: llama, dim: 768, num_layers: 12, num_heads: 12, ffn_dim: 2048, vocab_size: 50304, max_seq_len: 512, tie_embeddings: true}
data: {corpus: stdlib, tokenizer: bpe, tokenizer_vocab_size: 4096, seq_len: 512}
optim: {lr: 6e-4}
train: {steps: 6, global_batch: 2, micro_batch: 2}
""",
}
ALWAYS: Final = {
    "optim.schedule": "constant", "optim.warmup_steps": "0", "train.device": "cpu", "train.eval_every": "0",
    "train.sample_prompt": "", "checkpoint.every": "0", "metrics.every": "1", "metrics.split_every": "1",
    "launch.name": "peers",
}  # fmt: skip


def recipe_of(shape: str, folder: Path, options: Mapping[str, str]) -> Config:
    """Return shoal's config for a shape with further options. folder: where the recipe, tokens and runs go."""
    recipe = folder / f"{shape}.yaml"
    recipe.write_text(SHAPES[shape], encoding="utf-8")
    places = {"data.folder": str(folder / "data"), "launch.runs": str(folder / "runs")}
    overrides = {**ALWAYS, **places, **options}
    return resolve(recipe, [(key, value, "benchmark") for key, value in overrides.items()]).config


def prepare(config: Config, folder: Path) -> Spec:
    """Return the spec of `config`; write it to `folder`, with the tokens and weights unless they are there."""
    spec = spec_of(config, folder)
    spec.write(folder / f"{spec.dtype}.json")
    content = json.dumps(without_files(dataclasses.replace(spec, dtype="", threads=0)))
    made = folder / "made.json"
    if not made.is_file() or made.read_text(encoding="utf-8") != content:
        made.unlink(missing_ok=True)
        write_tokens(config, Path(spec.tokens))
        write_weights(config, Path(spec.weights))
        made.write_text(content, encoding="utf-8")
    return spec


def spec_of(config: Config, folder: Path) -> Spec:
    """Return what `config` asks for as a spec. folder: where its tokens and weights are."""
    model, optim, train = resolve_shape(config.model), config.optim, config.train
    assert model.vocab_size is not None
    assert model.ffn_dim is not None
    assert train.steps is not None
    assert train.dtype != "auto"
    return Spec(
        vocab_size=model.vocab_size,
        dim=model.dim,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        ffn_dim=model.ffn_dim,
        norm_eps=model.norm_eps,
        rope_theta=model.rope_theta,
        tie_embeddings=model.tie_embeddings,
        batch=train.global_batch,
        seq_len=config.data.seq_len,
        dtype=train.dtype,
        threads=config.launch.threads or 1,
        steps=train.steps,
        lr=optim.lr,
        beta1=optim.beta1,
        beta2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
        tokens=str(folder / "tokens.int32"),
        weights=str(folder / "weights.safetensors"),
    )


def write_tokens(config: Config, file: Path) -> None:
    """Write the rows of all steps in the order in which shoal trains on them: int32 [steps, batch, seq_len + 1]."""
    rows = open_data(config.data, Console(on_stderr=True)).rows("train")
    batch = config.train.global_batch
    order = new_order(config.data, rows.sizes, config.train.seed, batch)
    loader = Loader(rows, order, global_batch=batch, micro_batch=batch, dp_rank=0, dp_size=1)
    with file.open("wb") as out:
        for _ in range(config.train.steps or 0):
            [read] = loader.next_step()
            row = torch.cat((read.tokens, read.labels[:, -1:]), dim=1)
            if not torch.equal(row[:, 1:], read.labels):
                raise ValueError("a label is not the next token: the peers cannot train on this data")
            out.write(row.int().numpy().tobytes())
    loader.close()


def write_weights(config: Config, file: Path) -> None:
    """Write the initial weights of `config`'s model under the names of transformers' Llama."""
    model = build_model(config.model, compute_dtype=torch.float32)
    initialize(model, config.train.seed, "cpu")
    save_file({their_name(name): p.detach() for name, p in model.named_parameters()}, file)


def their_name(name: str) -> str:
    """Return transformers' name of a Llama's parameter."""
    layer = re.search(r"\.(\d+)\.", name)
    stored = FAMILIES["llama"].tensors[re.sub(r"\.\d+\.", ".N.", name)].name
    return stored.replace(".N.", f".{layer[1]}.") if layer else stored


def without_files(spec: Spec) -> dict[str, Any]:
    """Return the spec without the paths of its files."""
    return {key: value for key, value in dataclasses.asdict(spec).items() if key not in ("tokens", "weights")}
