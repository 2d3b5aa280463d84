"""
Times steps of small models on a CPU: what they take beyond the times of their operations and messages.

In one process: what each operation, micro-batch and step takes. In several: how much longer processes take that wait for each
other, and what each message of tensor parallel and FSDP2 takes.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from shoal.config.data_options import Data
from shoal.config.layout import Layout
from shoal.config.options import Config, Model, Parallel, Train
from shoal.config.presets import resolve_shape
from shoal.data.loader import Batch
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.plan.fits import need_of
from shoal.plan.rehearse.work import Kind
from shoal.plan.speed.rates import OWN, Curve, Rates, beyond
from shoal.plan.speed.seconds import Part, step_seconds
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
# family, width, blocks, tokens of a sequence: models whose steps several processes divide
DIVIDED: Final = (("llama", 256, 4, 128), ("gpt2", 128, 8, 128))
LEAST_SHARE: Final = 0.1  # of a message's own time that it takes at least in a step


def host_costs(rates: Rates, dtype: str, seconds: float) -> dict[Kind, Curve]:
    """
    Return the seconds that a CPU's steps spend outside the operations' own times: Python, autograd, dispatch, cold caches.

    rates: those of single operations, each of which was measured in a row of its like; in a step it follows another kind.
    The costs fit the steps' times best, relative to each. seconds: of measuring; each case is measured at least three times.
    """
    torch.manual_seed(0)
    configs = [_config(*case, dtype) for case in CASES]
    alone = Mesh(Place(), torch.device("cpu"))
    measured = _timed([_step_of(config, alone) for config in configs], alone, seconds)
    known, counts = zip(*(_counted(config, rates) for config in configs), strict=True)
    return _fitted(measured, known, counts)


def waits(mesh: Mesh, rates: Rates, dtype: str, seconds: float) -> tuple[float, dict[str, Curve]]:
    """
    Return how many times as long as alone processes take that wait for each other, and messages along an axis, by its ranks.

    The first by steps of DDP, which send once; the others by steps of tensor parallel and of FSDP2: with Python, hooks, and the
    wait for the other processes to send. A collective over the world.
    """
    torch.manual_seed(0)
    ranks = mesh.world_size
    sizes = [size for size in range(2, ranks + 1) if ranks % size == 0]
    layouts: dict[Part, list[Layout]] = {
        "replicate": [Layout(dp_replicate=ranks)],
        "tp": [Layout(tp=size, dp_replicate=ranks // size) for size in sizes],
        "shard": [Layout(dp_shard=size, dp_replicate=ranks // size) for size in sizes],
    }
    steps, known = list[Callable[[], object]](), list[Mapping[Part, float]]()
    for layout in itertools.chain(*layouts.values()):
        own = Mesh(mesh.place, mesh.device, layout)
        for model in DIVIDED:
            config = _divided(*model, layout, dtype)
            steps.append(_step_of(config, own))
            known.append(step_seconds(need_of(config, layout, cuda=False).works, layout, 0.0, rates))
    pairs = list(zip(_timed(steps, mesh, seconds), known, strict=True))
    of_layout = (pairs[first : first + len(DIVIDED)] for first in range(0, len(pairs), len(DIVIDED)))
    measured = {axis: list(itertools.islice(of_layout, len(each))) for axis, each in layouts.items()}
    stretch = statistics.median(step / sum(parts.values()) for step, parts in measured["replicate"][0])

    def times_as_long(axis: Part, of_one: Sequence[tuple[float, Mapping[Part, float]]]) -> float:
        """Return how many times as long as alone the axis's messages take in the steps of a layout."""
        over = [(step / stretch - sum(parts.values())) / parts[axis] for step, parts in of_one]
        return max(LEAST_SHARE, 1 + statistics.median(over))

    axes: tuple[Part, ...] = ("tp", "shard")
    return stretch, {
        axis: Curve([sizes], [times_as_long(axis, each) for each in measured[axis]], powers=(0,)) for axis in axes
    }


def _timed(steps: Sequence[Callable[[], object]], mesh: Mesh, seconds: float) -> list[float]:
    """Return each step's median time, of all processes together. They take turns for `seconds`, each at least three times."""
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds

    def is_over() -> bool:
        return mesh.sum(torch.tensor(float(len(times[0]) >= 3 and time.perf_counter() > end))).item() > 0

    while not is_over():
        for step, so_far in zip(steps, times, strict=True):
            mesh.barrier()
            begun = time.perf_counter()
            step()
            mesh.barrier()
            so_far.append(time.perf_counter() - begun)
    return [statistics.median(each[1:]) for each in times]  # without the first


def _config(family: str, checkpointing: str, blocks: int, turns: int, dtype: str) -> Config:
    model = Model(family=family, dim=128, num_layers=blocks, num_heads=4, vocab_size=512, max_seq_len=SEQ_LEN)  # type: ignore[arg-type]
    train = Train(
        steps=1, global_batch=turns, micro_batch=1, dtype=dtype, device="cpu", activation_checkpointing=checkpointing  # type: ignore[arg-type]
    )  # fmt: skip
    return Config(model=resolve_shape(model), data=Data(seq_len=SEQ_LEN), train=train)


def _divided(family: str, dim: int, blocks: int, seq_len: int, layout: Layout, dtype: str) -> Config:
    model = Model(family=family, dim=dim, num_layers=blocks, num_heads=8, vocab_size=512, max_seq_len=seq_len)  # type: ignore[arg-type]
    train = Train(steps=1, global_batch=4 * layout.dp, micro_batch=2, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    parallel = Parallel(tp=layout.tp, dp_shard=layout.dp_shard, dp_replicate=layout.dp_replicate)
    return Config(model=resolve_shape(model), data=Data(seq_len=seq_len), train=train, parallel=parallel)


def _step_of(config: Config, mesh: Mesh) -> Callable[[], object]:
    """Return a function that takes this process's part of a step of `config`."""
    runnable, state = assemble(config, mesh, lambda text: None)
    train, length = config.train, config.data.seq_len
    ids = torch.randint(512, (train.micro_batch, length))
    places = torch.arange(length).expand(train.micro_batch, -1)
    turns = train.global_batch // train.micro_batch // mesh.dp_size
    batches = [Batch(ids, ids, places, None, (), length * train.micro_batch)] * turns
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
