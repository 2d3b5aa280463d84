"""A run that changes its layout at each stop: bitwise identical state, and the losses of one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config.options import Config
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Region
from shoal.training.loop import take_step
from shoal.training.run import Run
from tests.parallel.layouts import ALONE, NeverStop, config_of, mesh_for, whole
from tests.world import World

Parts = dict[str, tuple[Region, torch.Tensor]]

CHAIN: list[tuple[int, dict[str, Any]]] = [
    (4, {}),
    (4, {"dp_replicate": 2, "dp_shard": 2}),
    (4, {"tp": 2, "pp": 2, "pp_schedule": "interleaved_1f1b"}),
    (4, {"dp_shard": 2, "cp": 2}),
    (4, {"dp_shard": 2, "tp": 2}),
    (2, {"pp": 2, "pp_schedule": "zbv"}),
    (2, {"dp_shard": 2, "cpu_offload": True}),
    (2, {"tp": 2}),
    (2, {"pp": 2}),
    (2, {"cp": 2}),
    (1, {}),
    (3, {"dp_shard": 3, "reshard_after_forward": "never"}),
]
REPLICAS: list[tuple[int, dict[str, Any]]] = [
    (4, {}),
    (4, {"dp_replicate": 2, "dp_shard": 2}),
    (2, {}),
    (2, {"dp_shard": 2}),
    (1, {}),
    (3, {}),
    (3, {"dp_shard": 3}),
]


HELD_OUT = 960  # tokens: 20 rows, which three replicas share unequally


@dataclasses.dataclass
class Leg:
    """State of a rank at its start and at its end, and the losses in between."""

    loaded: Parts
    saved: Parts
    loss: float
    val_loss: float | None


def leg(mesh: Mesh, config: Config) -> Leg:
    """Resume a run for one step, save, and evaluate."""
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    loaded = _parts(run)
    loss, tokens, *_ = take_step(run).read()
    assert run.saving.finish(run.state, None).ok
    run.evaluate(HELD_OUT)
    run.close()
    return Leg(loaded, _parts(run), loss / tokens, run.val_loss())


def _parts(run: Run) -> Parts:
    return {name: (part.region, part.tensor.clone()) for name, part in run.state.tensors().items()}


def _follow(
    world: Callable[[int], World], folder: Path, chain: list[tuple[int, dict[str, Any]]], **options: Any
) -> None:
    options |= {"train__steps": 20, "checkpoint__every": 1}
    saved: dict[str, torch.Tensor] = {}
    bitwise = options.get("train__repro") == "bitwise"
    for size, parallel in chain:
        alone = leg(ALONE, config_of(folder, "alone", **options))
        asked = options | {f"parallel__{k}": v for k, v in parallel.items()}
        legs = world(size).run(leg, config_of(folder, "moving", **asked))
        loaded = whole([each.loaded for each in legs])
        assert [n for n in saved if not torch.equal(loaded[n], saved[n])] == [], parallel
        saved = whole([each.saved for each in legs])
        for each in legs:
            if bitwise:
                assert (each.loss, each.val_loss) == (alone.loss, alone.val_loss), parallel
            else:
                assert each.loss == pytest.approx(alone.loss, rel=2e-5), parallel
                assert each.val_loss == pytest.approx(alone.val_loss, rel=2e-5), parallel
    if bitwise:
        expected = whole([alone.saved])
        assert [n for n in expected if not torch.equal(saved[n], expected[n])] == []


@pytest.mark.parametrize(
    ("options", "chain"),
    [
        pytest.param({}, CHAIN, id="llama"),
        pytest.param({"family": "gpt2"}, CHAIN[5:8], id="gpt2", marks=pytest.mark.ci),
        pytest.param({"optim__name": "muon"}, CHAIN[1:5], id="muon", marks=pytest.mark.ci),
    ],
)
def test_a_run_that_goes_through_every_layout(
    world: Callable[[int], World], tmp_path: Path, options: dict[str, Any], chain: list[tuple[int, dict[str, Any]]]
) -> None:
    _follow(world, tmp_path, chain, **options)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.ci)])
def test_a_bitwise_run_on_4_2_1_3_processes_is_the_run_of_one(
    world: Callable[[int], World], tmp_path: Path, dtype: str
) -> None:
    _follow(world, tmp_path, REPLICAS, train__repro="bitwise", train__dtype=dtype, optim__clip_norm=0.5)
