"""The same model in every layout: the first step's loss, gradients and norm against one process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.layouts import ALONE, Step, config_of, first_step, whole
from tests.world import World

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {}),
    "fsdp": (2, {"dp_shard": 2}),
    "fsdp 3": (3, {"dp_shard": 3}),
    "fsdp never": (2, {"dp_shard": 2, "reshard_after_forward": "never"}),
    "fsdp 2 of 4": (4, {"dp_shard": 4, "reshard_after_forward": 2}),
    "fsdp offload": (2, {"dp_shard": 2, "cpu_offload": True}),
    "hsdp": (4, {"dp_shard": 2, "dp_replicate": 2}),
    "tp": (2, {"tp": 2}),
    "tp 4": (4, {"tp": 4}),
    "ddp x tp": (4, {"tp": 2}),
    "fsdp x tp": (4, {"dp_shard": 2, "tp": 2}),
    "hsdp x tp": (8, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}),
    "cp": (2, {"cp": 2}),
    "ulysses": (2, {"cp": 2, "cp_method": "ulysses"}),
    "cp x fsdp": (4, {"cp": 2, "dp_shard": 2}),
    "cp x tp x fsdp": (8, {"cp": 2, "tp": 2, "dp_shard": 2}),
    "gpipe": (2, {"pp": 2, "pp_schedule": "gpipe"}),
    "1f1b": (4, {"pp": 4}),
    "interleaved": (2, {"pp": 2, "pp_schedule": "interleaved_1f1b"}),
    "zbv": (2, {"pp": 2, "pp_schedule": "zbv"}),
    "dualpipev": (2, {"pp": 2, "pp_schedule": "dualpipev"}),
    "pp x ddp": (4, {"pp": 2}),
    "pp x fsdp": (4, {"pp": 2, "dp_shard": 2}),
    "zbv x fsdp": (4, {"pp": 2, "dp_shard": 2, "pp_schedule": "zbv"}),
    "pp x tp x fsdp": (8, {"pp": 2, "tp": 2, "dp_shard": 2}),
    "zbv x tp": (4, {"pp": 2, "tp": 2, "pp_schedule": "zbv"}),
    "pp x cp x tp": (8, {"pp": 2, "tp": 2, "cp": 2}),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Step]]:
    folder = tmp_path_factory.mktemp("layouts")

    @functools.cache
    def of(family: str, **options: Any) -> tuple[Path, Step]:
        return folder, first_step(ALONE, config_of(folder, f"alone-{family}-{len(options)}", family, **options))

    return of


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_step(
    world: Callable[[int], World], alone: Callable[..., tuple[Path, Step]], layout: str, family: str
) -> None:
    folder, expected = alone(family)
    size, parallel = LAYOUTS[layout]
    options = {f"parallel__{k}": v for k, v in parallel.items()}
    steps = world(size).run(first_step, config_of(folder, f"{layout}-{family}", family, **options))
    grads = whole([s.gradients for s in steps])
    wanted = whole([expected.gradients])
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():  # a key's bias has no gradient but noise: softmax does not see it
        assert (grads[name] - grad).norm() <= 3e-6 * grad.norm() + 1e-8 * expected.norm, name
    for step in steps:
        assert step.loss == pytest.approx(expected.loss, rel=1e-6)
        assert step.norm == pytest.approx(expected.norm, rel=1e-6)
