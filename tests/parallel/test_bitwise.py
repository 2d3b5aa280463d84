"""`repro: bitwise`: the same bits at any data-parallel degree, even if it does not divide the micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config.options import Model
from shoal.parallel.tree import Leaves, TreeSum
from tests.parallel.layouts import ALONE, Step, config_of, first_step, whole
from tests.parallel.matrix import step_of
from tests.world import World

ODD = Model(dim=37, num_layers=2, num_heads=1, head_dim=32, ffn_dim=101, max_seq_len=64, qk_norm=True, init_std=0.1)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp 2": (2, {}),
    "ddp 3": (3, {}),
    "ddp 4": (4, {}),
    "fsdp 2": (2, {"dp_shard": 2}),
    "fsdp 3": (3, {"dp_shard": 3}),
    "fsdp 4": (4, {"dp_shard": 4, "reshard_after_forward": "never"}),
    "hsdp 2x2": (4, {"dp_shard": 2, "dp_replicate": 2}),
    "pp 2": (2, {"pp": 2}),
    "gpipe 2 x ddp 2": (4, {"pp": 2, "pp_schedule": "gpipe"}),
}


def bitwise_config(folder: Path, name: str, dtype: str, micro_batches: int, **options: Any) -> Any:
    more: dict[str, Any] = {
        "train__repro": "bitwise",
        "optim__clip_norm": 0.1,
        "train__dtype": dtype,
        "train__global_batch": micro_batches,
    }
    config = config_of(folder, name, **more, **options)
    return config.replace("model", **{f: getattr(ODD, f) for f in ODD.__dataclass_fields__})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, Step]]:
    folder = tmp_path_factory.mktemp("bitwise")

    @functools.cache
    def of(dtype: str, micro_batches: int) -> tuple[Path, Step]:
        return folder, first_step(ALONE, bitwise_config(folder, f"alone {dtype}", dtype, micro_batches), 4)

    return of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro_batches", [4, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits(
    world: Callable[[int], World], alone: Callable[..., tuple[Path, Step]], layout: str, micro_batches: int, dtype: str
) -> None:
    folder, expected = alone(dtype, micro_batches)
    size, parallel = LAYOUTS[layout]
    options = {f"parallel__{k}": v for k, v in parallel.items()}
    name = f"{layout} {micro_batches} {dtype}"
    steps = world(size).run(first_step, bitwise_config(folder, name, dtype, micro_batches, **options), 4)
    for kind in ("gradients", "parameters"):
        found, wanted = whole([getattr(s, kind) for s in steps]), whole([getattr(expected, kind)])
        assert [n for n in wanted if not torch.equal(found[n], wanted[n])] == [], kind
    assert {(s.loss, s.norm) for s in steps} == {(expected.loss, expected.norm)}


@pytest.mark.ci
def test_the_same_bits_of_compiled_code(world: Callable[[int], World], tmp_path: Path) -> None:
    """FSDP2 casts weights to bfloat16 before compiled code sees them; one process casts them inside compiled code."""
    alone, steps = (
        world(size).run(step_of, bitwise_config(tmp_path, f"{size}", "bfloat16", 4, train__compile=True, **options))
        for size, options in ((1, {}), (2, {"parallel__dp_shard": 2}))
    )
    wanted, found = (whole([step.gradients for step in each]) for each in (alone, steps))
    assert [n for n in wanted if not torch.equal(found[n], wanted[n])] == []


@pytest.mark.parametrize("leaves", range(1, 18))
def test_any_runs_of_leaves_make_the_tree_that_one_process_makes(leaves: int) -> None:
    values = torch.randn(leaves, 5, generator=torch.Generator().manual_seed(leaves))

    def recursive(start: int, span: int) -> torch.Tensor | None:
        """Sum the tree by its definition: halve `span`, a power of two. Return None beyond the last leaf."""
        if start >= leaves:
            return None
        if span == 1:
            return values[start]
        left, right = recursive(start, span // 2), recursive(start + span // 2, span // 2)
        assert left is not None
        return left if right is None else left + right

    wanted = recursive(0, 1 << (leaves - 1).bit_length())
    assert wanted is not None
    for first in range(1, leaves + 1):
        for second in range(first, leaves + 1):
            runs = tuple(r for r in (range(first), range(first, second), range(second, leaves)) if len(r))
            plan = Leaves(leaves, runs)
            sent = []
            for run in runs:
                tree = TreeSum(leaves)
                for leaf in run:
                    tree.push(leaf, values[leaf])
                sent.append(torch.stack([node for _, _, node in tree.nodes]))
            assert torch.equal(plan.sum(sent), wanted), runs
