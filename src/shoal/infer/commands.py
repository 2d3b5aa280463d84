"""`shoal eval` and `shoal generate`: a run's model, on one process."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.checkpoint.store import listed, load_model
from shoal.config import Config
from shoal.data.open import open_data
from shoal.data.prepare import held_out_text
from shoal.data.tokenize import Tokenizer, load_tokenizer
from shoal.errors import CheckpointError, GenerateError
from shoal.infer.generate import generate
from shoal.launch.place import Place
from shoal.metrics.compression import bits_per_byte
from shoal.metrics.console import Console
from shoal.models.build import build_model
from shoal.models.family import LanguageModel
from shoal.parallel.mesh import Mesh, choose_device
from shoal.runs import RunFolder
from shoal.train.assemble import DTYPES
from shoal.train.evaluate import evaluate, model_losses


@dataclass(frozen=True)
class LoadedRun:
    """A run's model as a checkpoint has it."""

    config: Config
    model: LanguageModel
    tokenizer: Tokenizer
    step: int
    data_id: str
    device: torch.device


def load_run(runs: Path, target: str, *, step: int | None, device: str) -> LoadedRun:
    """
    The model of run `target` (a name under `runs`, or a folder) at `step` (None: the last).

    Raises `RunError` or `CheckpointError`.
    """
    path = Path(target) if (Path(target) / "config.yaml").is_file() else runs / target
    folder = RunFolder(path)
    config = folder.load_config()
    there = listed(folder.checkpoints)
    chosen = [s for s in there if step is None or s.step == step]
    if not chosen:
        steps = ", ".join(str(s.step) for s in there)
        what = f"no checkpoint of step {step}; there are steps {steps}" if there else "no checkpoint yet"
        raise CheckpointError(f"{path} has {what}")
    place = choose_device(device)
    slow = place.type == "cpu" and config.train.dtype == "float16"
    model = build_model(config.model, compute_dtype=torch.float32 if slow else DTYPES[config.train.dtype])
    state = load_model(chosen[-1], model, place)
    model.eval()
    return LoadedRun(
        config, model, load_tokenizer(str(folder.tokenizer_file)), int(state["step"]), state["data_id"], place
    )


def evaluate_run(runs: Path, target: str, *, step: int | None, device: str, as_json: bool) -> None:
    """Print the loss on all held-out text, and what gzip and xz make of the same text."""
    run = load_run(runs, target, step=step, device=device)
    console = Console(speaks=not as_json)
    prepared = open_data(run.config.data, console)
    if prepared.data_id != run.data_id:
        raise CheckpointError(
            f"{target} was trained on other tokens than {prepared.folder} holds now; its held-out text is gone"
        )
    result = evaluate(model_losses(run.model, run.device), Mesh(Place(), run.device), prepared, run.config, None)
    yardstick = bits_per_byte(held_out_text(prepared))
    record = {
        "step": run.step,
        "nats_per_token": result["val_loss"],
        "perplexity": math.exp(result["val_loss"]),
        "bits_per_byte": result["val_bits_per_byte"],
        **{f"{name}_bits_per_byte": value for name, value in yardstick.items()},
    }
    if as_json:
        print(json.dumps(record))
        return
    console.say(f"{target} at step {run.step}, on {prepared.counts['val'].text_bytes:,} bytes of held-out text:")
    for name, value in record.items():
        if name != "step":
            console.say(f"  {name.replace('_', ' '):24} {value:.4f}")


def generate_from_run(
    runs: Path,
    target: str,
    *,
    step: int | None,
    device: str,
    prompts: list[str],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
) -> None:
    """Print each prompt and what the model makes of it."""
    if any(not prompt for prompt in prompts):
        raise GenerateError("an empty --prompt: give the text to go on from")
    run = load_run(runs, target, step=step, device=device)
    ids = [run.tokenizer.encode_prompt(prompt) for prompt in prompts]
    outputs = generate(
        run.model, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        eot_id=run.tokenizer.eot_id,
    )  # fmt: skip
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if number:
            print("-" * 40)
        print(prompt + run.tokenizer.decode(output))
