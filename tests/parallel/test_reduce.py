"""Data parallel: gradients of N ranks against one process with the whole batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import nn

from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.parallel import shared_sum
from shoal.parallel.reduce import GradientReducer
from tests.world import World

ALONE = Mesh(Place(), torch.device("cpu"))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 101), nn.GELU(), nn.Linear(101, 53), nn.GELU(), nn.Linear(53, 7))


def gradients(mesh: Mesh, micro_batches: int, bucket_bytes: int, shared_bytes: int = 2**40) -> list[torch.Tensor]:
    """Return the all-reduced gradients of the second step with the same buckets. micro_batches: number in each step."""
    model = make_model()
    reducer = GradientReducer(model.parameters(), mesh.axis("batch"), None, bucket_bytes, shared_bytes)
    assert (shared_bytes == 0) == (shared_sum.shared_bytes() > 0) or mesh.world_size == 1
    share = micro_batches // mesh.dp_size
    for step in range(2):
        reducer.zero()
        for slot in range(mesh.dp_rank * share, (mesh.dp_rank + 1) * share):
            reducer.before_backward(slot, slot == (mesh.dp_rank + 1) * share - 1)
            inputs = torch.randn(5, 37, generator=torch.Generator().manual_seed(100 * step + slot))
            model(inputs).square().sum().backward()
            reducer.after_backward(slot)
        reducer.finish()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    ("bucket_bytes", "shared_bytes"), [(1, 2**40), (20_000, 2**40), (2**20, 2**40), (20_000, 0)], ids=str
)
def test_n_processes_sum_what_one_process_sums(
    world: Callable[[int], World], size: int, bucket_bytes: int, shared_bytes: int
) -> None:
    alone = gradients(ALONE, 12, bucket_bytes)
    shares = world(size).run(gradients, 12, bucket_bytes, shared_bytes)
    for theirs in shares:
        for mine, other, first in zip(alone, theirs, shares[0], strict=True):
            assert (mine - other).norm() <= 1e-6 * mine.norm()
            assert torch.equal(other, first)  # every rank holds the same bits


def on_machines_apart(mesh: Mesh) -> bool:
    """Return whether memory is shared by ranks that each say they are on another machine."""
    with patch("shoal.parallel.shared_sum._machine", lambda: f"machine {mesh.place.rank}"):
        return shared_sum.shared_buffers(8, mesh.axis("batch")) is not None


def where_one_cannot(mesh: Mesh) -> bool:
    """Return whether memory is shared if the last rank cannot make any."""
    hinder = patch("os.memfd_create", side_effect=OSError) if mesh.place.rank == 1 else contextlib.nullcontext()
    with hinder:
        return shared_sum.shared_buffers(8, mesh.axis("batch")) is not None


@pytest.mark.parametrize("function", [on_machines_apart, where_one_cannot])
def test_all_ranks_share_memory_or_none(world: Callable[[int], World], function: Callable[[Mesh], bool]) -> None:
    assert world(2).run(function) == [False, False]


def own_storages(mesh: Mesh) -> tuple[int, int, int]:
    """Return the number of buckets, of the gradients' storages, and their bytes."""
    model = make_model()
    reducer = GradientReducer(model.parameters(), mesh.axis("batch"), None, 20_000)
    storages = {
        p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage() for p in model.parameters() if p.grad is not None
    }
    return len(reducer), len(storages), sum(s.nbytes() for s in storages.values())


def test_gradients_are_views_of_the_buckets_and_each_is_there_once(world: Callable[[int], World]) -> None:
    size = 4 * sum(p.numel() for p in make_model().parameters())
    for buckets, storages, held in world(2).run(own_storages):
        assert buckets == storages == 3
        assert size <= held <= size + 4 * buckets  # padded for two ranks


def test_one_process_keeps_the_gradients_that_autograd_makes() -> None:
    assert own_storages(ALONE) == (0, 0, 0)


def forget_one(mesh: Mesh) -> str:
    model = make_model()
    reducer = GradientReducer(model.parameters(), mesh.axis("batch"))
    reducer.zero()
    reducer.before_backward(0, True)
    model[0](torch.ones(1, 37)).sum().backward()
    try:
        reducer.finish()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_parameter_without_a_gradient_is_not_passed_over(world: Callable[[int], World]) -> None:
    assert all("got no gradient" in answer for answer in world(2).run(forget_one))
