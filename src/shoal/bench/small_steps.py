"""Times steps of small models on a CPU: what each operation, micro-batch and step takes beyond the operations' own times."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Final

import torch

from shoal.config.data_options import Data
from shoal.config.layout import Layout
from shoal.config.options import Config, Model, Train
from shoal.config.presets import resolve_shape
from shoal.data.loader import Batch
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.plan.fits import need_of
from shoal.plan.rehearse.work import Kind
from shoal.plan.speed.rates import OWN, Curve, Rates, beyond
from shoal.training.assemble import assemble
from shoal.training.step import train_step

# family, checkpointing, blocks, micro-batches: each cost is in some more often than in others
CASES: Final = [
    (family, checkpointing, blocks, turns)
    for family, checkpointing in itertools.product(("llama", "gpt2"), ("none", "full", "selective"))
    for blocks, turns in ((2, 2), (6, 2), (2, 8))
]
SEQ_LEN: Final = 64
LEAST: Final = 1e-9  # seconds of a cost that the steps do not show


def host_costs(rates: Rates, dtype: str, seconds: float) -> dict[Kind, Curve]:
    """
    Return the seconds that a CPU's steps spend outside the operations' own times: Python, autograd, dispatch, cold caches.

    rates: those of single operations, each of which was measured in a row of its like; in a step it follows another kind.
    The costs fit the steps' times best, relative to each. seconds: of measuring; each case is measured at least twice.
    """
    torch.manual_seed(0)
    configs = [_config(*case, dtype) for case in CASES]
    steps = [_step_of(config) for config in configs]
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    for number in itertools.count():
        if number >= 2 and time.perf_counter() > end:
            break
        for step, so_far in zip(steps, times, strict=True):
            begun = time.perf_counter()
            step()
            so_far.append(time.perf_counter() - begun)
    measured = [statistics.median(each[1:]) for each in times]  # without the first
    known, counts = zip(*(_counted(config, rates) for config in configs), strict=True)
    return _fitted(measured, known, counts)


def _config(family: str, checkpointing: str, blocks: int, turns: int, dtype: str) -> Config:
    model = Model(family=family, dim=128, num_layers=blocks, num_heads=4, vocab_size=512, max_seq_len=SEQ_LEN)  # type: ignore[arg-type]
    train = Train(
        steps=1, global_batch=turns, micro_batch=1, dtype=dtype, device="cpu", activation_checkpointing=checkpointing  # type: ignore[arg-type]
    )  # fmt: skip
    return Config(model=resolve_shape(model), data=Data(seq_len=SEQ_LEN), train=train)


def _step_of(config: Config) -> Callable[[], object]:
    """Return a function that takes a step of `config` in this process alone."""
    runnable, state = assemble(config, Mesh(Place(), torch.device("cpu")), lambda text: None)
    ids = torch.randint(512, (1, SEQ_LEN))
    places = torch.arange(SEQ_LEN)[None]
    batches = [Batch(ids, ids, places, None, (), SEQ_LEN)] * config.train.global_batch
    return lambda: train_step(runnable, state, batches, step=1, lr=1e-4, clip_norm=1.0).read()


def _counted(config: Config, rates: Rates) -> tuple[float, Mapping[Kind, float]]:
    """Return the seconds of a step's operations, and how often each cost is in it."""
    seconds, counts = 0.0, dict.fromkeys(OWN, 0.0)
    (work,) = need_of(config, Layout(), cuda=False).works
    for counted in (work.done, work.once):
        for op, times in counted.items():
            if op.kind in OWN:
                counts[op.kind] += times
            else:
                counts[beyond(op)] += times
                seconds += times * rates.device(op)
    return seconds, counts


def _fitted(
    measured: list[float], known: tuple[float, ...], counts: tuple[Mapping[Kind, float], ...]
) -> dict[Kind, Curve]:
    """Return the costs whose steps come nearest to those measured, none below zero."""
    costs = dict.fromkeys(OWN, LEAST)
    left = list(OWN)
    while left:  # those that would be negative are nothing
        rows = torch.tensor([[each[kind] / s for kind in left] for each, s in zip(counts, measured, strict=True)])
        goal = torch.tensor([1 - k / s for k, s in zip(known, measured, strict=True)])
        found = torch.linalg.lstsq(rows.double(), goal.double()[:, None], driver="gelsd").solution[:, 0].tolist()
        if min(found) >= 0:
            costs |= {kind: max(LEAST, seconds) for kind, seconds in zip(left, found, strict=True)}
            break
        left = [kind for kind, seconds in zip(left, found, strict=True) if seconds > min(found)]
    return {kind: Curve((), (seconds,)) for kind, seconds in costs.items()}
