"""
Times generation: `python -m shoal.bench.generate_worker CONFIG ANSWER TURNS PROMPT NEW BATCHES LENGTHS`.

LENGTHS: equal, or unequal for prompts of half of PROMPT tokens up to all of it, padded on the left.

The model has random weights, spread widely enough that rounding changes no token in float32. transformers, if it is installed,
opens the same folder, and both take turns in this process.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from shoal.bench.environment import facts
from shoal.bench.worker_process import answering
from shoal.checkpoint.convert import to_hugging_face
from shoal.config.options import Config, Model
from shoal.config.presets import resolve_shape
from shoal.data.dataset import open_data
from shoal.hub.shape import write_shape
from shoal.infer.load import load_folder
from shoal.models.build import COMPUTE_DTYPES, build_model, initialize
from shoal.models.generate import generate
from shoal.plan.estimate import parameter_count
from shoal.resolve.resolve import read_back
from shoal.run.console import Console
from shoal.system.signals import die_with_parent
from shoal.training.loop import set_threads

SPREAD: Final = 0.05  # standard deviation of the weights
SHOAL, PEER = "shoal", "transformers.generate"
Timed = Callable[[Sequence[Sequence[int]], int], tuple[float, float, list[list[int]]]]
"""Generates: (prompts, new tokens) -> seconds until the first new token, seconds after it, the tokens."""


def main(
    recipe: Path, answer: Path, turns: int, prompt: int, new: int, batches: Sequence[int], *, unequal: bool
) -> None:
    """Generate with each program and each batch; write the seconds of each turn."""
    die_with_parent()
    config = read_back(recipe)
    set_threads(config)
    with answering(answer):
        shape = _shape(config)
        folder = _folder(shape, recipe.parent / "model")
        programs, dtype, device = _programs(folder, config)
        found = []
        for batch in batches:
            found += _timed(programs, _prompts(batch, prompt, shape.vocab_size or 1, unequal=unequal), new, turns)
        said = {
            "rows": found, "model": f"{shape.preset or shape.family}, {parameter_count(shape):,} parameters", "dtype": dtype,
            "about": facts(device),
        }  # fmt: skip
        answer.write_text(json.dumps(said), encoding="utf-8")


def _shape(config: Config) -> Model:
    """Return the recipe's shape with its vocabulary."""
    size = config.model.vocab_size or open_data(config.data, Console(speaks=False)).vocab_size
    return resolve_shape(dataclasses.replace(config.model, vocab_size=size, init_std=SPREAD))


def _folder(shape: Model, folder: Path) -> Path:
    """Write random weights as a Hugging Face folder, which both programs open."""
    folder.mkdir()
    model = build_model(shape, compute_dtype=torch.float32)
    initialize(model, 0, "cpu")
    tensors = to_hugging_face(shape.family, dict(model.named_parameters()))
    save_file(
        {name: t.detach().contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    ends = {"eos_token_id": None, "bos_token_id": None}
    (folder / "config.json").write_text(json.dumps(write_shape(shape) | ends), encoding="utf-8")
    return folder


def _programs(folder: Path, config: Config) -> tuple[dict[str, Timed], str, torch.device]:
    """Return the installed programs, and the dtype and the device of both."""
    ours = load_folder(str(folder), device=config.train.device, dtype=config.train.dtype)
    dtype = next(name for name, each in COMPUTE_DTYPES.items() if each == ours.model.compute_dtype)

    def shoal(prompts: Sequence[Sequence[int]], new: int) -> tuple[float, float, list[list[int]]]:
        clock = _Clock(ours.device)
        out = generate(ours.model, prompts, max_new_tokens=new, on_token=lambda row, token: clock.tick())
        return *clock.split(), out

    programs: dict[str, Timed] = {SHOAL: shoal}
    if importlib.util.find_spec("transformers"):
        programs[PEER] = _peer(folder, ours.model.compute_dtype, ours.device)
    return programs, dtype, ours.device


def _peer(folder: Path, dtype: torch.dtype, device: torch.device) -> Timed:
    """Return transformers.generate on the same weights, greedy."""
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.eval().to(device)

    def run(prompts: Sequence[Sequence[int]], new: int) -> tuple[float, float, list[list[int]]]:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        clock = _Clock(device)

        def tick(*_: Any, **__: Any) -> torch.Tensor:
            clock.tick()
            return torch.zeros(len(prompts), dtype=torch.bool, device=device)

        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0,
            stopping_criteria=[tick],
        )  # fmt: skip
        return *clock.split(), out[:, longest:].tolist()

    return run


class _Clock:
    """Measures the seconds until the first tick, and from then on."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begun, self._first = self._now(), 0.0

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def tick(self) -> None:
        """Note that a token has come."""
        if not self._first:
            self._first = self._now()

    def split(self) -> tuple[float, float]:
        """Return both times, up to now."""
        return self._first - self._begun, self._now() - self._first


def _prompts(batch: int, length: int, vocab_size: int, *, unequal: bool) -> list[list[int]]:
    """Return random prompts; unequal ones get shorter from the first to the last."""
    generator = torch.Generator().manual_seed(1)
    shorter = length // 2 if unequal else 0
    lengths = [length - shorter * row // max(batch - 1, 1) for row in range(batch)]
    return [torch.randint(1, vocab_size, (each,), generator=generator).tolist() for each in lengths]


def _timed(programs: dict[str, Timed], prompts: list[list[int]], new: int, turns: int) -> list[dict[str, Any]]:
    """Return the seconds of each program in each turn; the programs alternate, and each begins every second turn."""
    for program in programs.values():
        program(prompts, new)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    tokens: dict[str, list[list[int]]] = {}
    for turn in range(turns):
        for name in list(programs)[:: 1 if turn % 2 == 0 else -1]:
            first, rest, tokens[name] = programs[name](prompts, new)
            seconds[name].append((first, rest))
    rows = zip(*tokens.values(), strict=True)
    different = sum(len({*each}) > 1 for row in rows for each in zip(*row, strict=True))
    return [
        {
            "program": name, "batch": len(prompts), "prompt_tokens": sum(map(len, prompts)), "prefill_seconds": [first for first, _ in each],
            "decode_seconds": [rest for _, rest in each], "different_tokens": different,
        }
        for name, each in seconds.items()
    ]  # fmt: skip


if __name__ == "__main__":
    recipe, answer, turns, prompt, new, batches, lengths = sys.argv[1:]
    counts = [int(n) for n in batches.split(",")]
    main(Path(recipe), Path(answer), int(turns), int(prompt), int(new), counts, unequal=lengths == "unequal")
    sys.stdout.flush()
    os._exit(0)
