"""Muon against its paper and torch's implementation; bitwise identical in every layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal.config.owners import SMALL, assign_owners
from shoal.mesh.mesh import Axis, Mesh
from shoal.mesh.region import Region, Shard
from shoal.optim import muon
from shoal.optim.muon import Muon, orthogonalize
from tests.world import World, laid_out

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [(37, 101), (64, 64), (101, 37), (8, 3), (64, 64), (2, 5), (64, 64)]
STEPS = 3


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shard(name: str, region: Region, whole: Tensor) -> Shard:
    tensor = whole[region.slices].clone()
    return Shard(name, region, tensor, nn.Parameter(tensor))


def weights() -> list[Tensor]:
    return [drawn(i, *shape) for i, shape in enumerate(SHAPES)]


def gradients(step: int) -> list[Tensor]:
    return [drawn(100 * step + i, *shape) for i, shape in enumerate(SHAPES, 1)]


def trained(regions: Sequence[Region], team: Axis, dtype: torch.dtype | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return this rank's shards and their momentum after a few steps at changing learning rates."""
    shards = [shard(f"w{i}", region, w) for i, (region, w) in enumerate(zip(regions, weights(), strict=True))]
    optimizer = Muon(shards, team, lr=0.1, momentum=0.9, weight_decay=0.3, dtype=dtype)
    for step in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = 0.1 / step
        for each, gradient in zip(shards, gradients(step), strict=True):
            each.tensor.grad = gradient[each.region.slices].clone()
        optimizer.step()
    return [(each.tensor, optimizer.state[each.tensor]["momentum_buffer"]) for each in shards]


def regions_of(layout: str, rank: int, size: int) -> list[Region]:
    """Return this rank's region of each matrix."""
    wholes = [Region.whole(shape) for shape in SHAPES]
    match layout:
        case "replicas":
            return wholes
        case "rows":
            return [r.chunk(0, rank, size) for r in wholes]
        case "columns":
            return [r.chunk(1, rank, size) for r in wholes]
        case "column and row parallel":
            return [r.chunk(i % 2, rank, size) for i, r in enumerate(wholes)]
        case "some replicated":
            return [r.chunk(0, rank, size) if i % 2 else r for i, r in enumerate(wholes)]
        case "last holds nothing":
            nothing = [Region(r.shape, (0, 0), (0, 0)) for r in wholes]
            return nothing if rank == size - 1 else [r.chunk(0, rank, size - 1) for r in wholes]
        case "replicas of rows":
            return [r.chunk(0, rank % 2, 2) for r in wholes]
        case "rows of columns":
            return [r.chunk(1, rank % 2, 2).chunk(0, rank // 2, 2) for r in wholes]
        case "rows of rows":
            return [r.chunk(0, rank % 2, 2).chunk(0, rank // 2, 2) for r in wholes]
    raise AssertionError(layout)


def same_bits(mesh: Mesh, layout: str, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """Compare this rank's bits with one process's; return its number of orthogonalized matrices, and of all-to-alls."""
    team = Axis(mesh.world_size, mesh.place.rank, dist.group.WORLD)
    regions = regions_of(layout, team.rank, team.size)
    alone = trained([Region.whole(shape) for shape in SHAPES], Axis(), dtype)
    with (
        mock.patch.object(muon, "orthogonalize", wraps=orthogonalize) as done,
        mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanged,
    ):
        mine = trained(regions, team, dtype)
    for region, (w, b), (part, buffer) in zip(regions, alone, mine, strict=True):
        assert torch.equal(part, w[region.slices])
        assert torch.equal(buffer, b[region.slices])
    return done.call_count, exchanged.call_count


def stages(mesh: Mesh) -> None:
    """Train with two teams at a time, each with the matrices of its stage, and compare with one process."""
    team = laid_out(mesh, pp=2, dp_replicate=1, dp_shard=2).axis("stage")
    alone = trained([Region.whole(shape) for shape in SHAPES], Axis())
    regions = [Region.whole(shape).chunk(0, team.rank, 2) for shape in SHAPES]
    for region, (w, _), (part, _) in zip(regions, alone, trained(regions, team), strict=True):
        assert torch.equal(part, w[region.slices])


def incomplete(mesh: Mesh) -> None:
    team = Axis(mesh.world_size, mesh.place.rank, dist.group.WORLD)
    region = Region.whole((6, 4)).chunk(0, team.rank, team.size + 1)  # no rank holds the last chunk
    with pytest.raises(ValueError, match="w: its shards have 16 elements, but the whole has 24"):
        Muon([shard("w", region, drawn(0, 6, 4))], team, lr=0.1, momentum=0.9, weight_decay=0.0)


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        *((size, layout) for size in (2, 3, 4) for layout in ("replicas", "rows", "columns", "last holds nothing")),
        (3, "column and row parallel"),
        (3, "some replicated"),
        (4, "replicas of rows"),
        (4, "rows of columns"),
        (4, "rows of rows"),
    ],
)
def test_every_layout_gives_the_same_bits(world: Callable[[int], World], size: int, layout: str) -> None:
    orthogonalized, exchanged = zip(*world(size).run(same_bits, layout), strict=True)
    assert sum(orthogonalized) == len(SHAPES) * STEPS  # each matrix once
    if size == 2:
        assert min(orthogonalized) > 0
    rounds = len(assign_owners(SHAPES, size))
    assert set(exchanged) == {
        rounds * STEPS * (1 if layout == "replicas" else 2)
    }  # with replicas the owner already holds the whole matrix: only results are sent


def test_every_layout_gives_the_same_bits_in_bfloat16_as_on_cuda(world: Callable[[int], World]) -> None:
    for layout in ("replicas of rows", "rows of columns"):
        world(4).run(same_bits, layout, torch.bfloat16)


def test_teams_beside_each_other(world: Callable[[int], World]) -> None:
    world(4).run(stages)


def test_parts_that_do_not_make_up_the_whole(world: Callable[[int], World]) -> None:
    world(2).run(incomplete)
    with pytest.raises(ValueError, match="w has shape"):
        Muon([shard("w", Region.whole((2, 2, 2)), drawn(0, 2, 2, 2))], Axis(), lr=1, momentum=0, weight_decay=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nesterov", [True, False])
def test_against_its_paper_in_float64(nesterov: bool, device: str) -> None:
    """
    Newton-Schulz equals its closed form, the polynomial of each singular value (Jordan 2024). The test writes out the update
    (Liu et al. 2025, section 2).
    """
    # relative to the updates' norm; Muon computes in float32 on a CPU, in bfloat16 on CUDA
    tolerance = 2e-5 if device == "cpu" else 2e-2
    for shape in SHAPES:
        start = drawn(0, *shape).to(device)
        mine = shard("w", Region.whole(shape), start)
        optimizer = Muon([mine], Axis(), lr=0.0, momentum=0.9, weight_decay=0.3, nesterov=nesterov)
        expected, total, length = start.double(), torch.zeros_like(start, dtype=torch.float64), 0.0
        for step in range(1, 6):
            optimizer.param_groups[0]["lr"] = lr = 0.02 * step
            gradient = drawn(step, *shape).to(device)
            mine.tensor.grad = gradient
            total = 0.9 * total + gradient.double()
            u, s, vh = torch.linalg.svd(gradient.double() + 0.9 * total if nesterov else total, full_matrices=False)
            s = s / s.norm()
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            update = 0.2 * math.sqrt(max(shape)) * (u * s) @ vh
            expected = expected - lr * (update + 0.3 * expected)
            length += lr * float(update.norm())
            optimizer.step()
        assert float((mine.tensor.double() - expected).norm()) < tolerance * length
        assert torch.allclose(optimizer.state[mine.tensor]["momentum_buffer"].double(), total, atol=1e-5)


def test_against_torchs() -> None:
    """torch's Muon multiplies in bfloat16. Its momentum is an average of gradients: shoal's sum times a constant."""
    for shape in SHAPES:
        start = drawn(0, *shape)
        mine, theirs = shard("w", Region.whole(shape), start), nn.Parameter(start.clone())
        ours = Muon([mine], Axis(), lr=0.02, momentum=0.95, weight_decay=0.1)
        torchs = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        for step in range(1, 5):
            mine.tensor.grad, theirs.grad = drawn(step, *shape), drawn(step, *shape)
            ours.step()
            torchs.step()
        moved = (theirs.detach() - start).norm()
        assert float((mine.tensor - theirs.detach()).norm()) < 0.02 * float(moved)


@pytest.mark.parametrize("shape", [(37, 101), (64, 64), (101, 37), (8, 3)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    u, _, vh = torch.linalg.svd(drawn(0, *shape), full_matrices=False)
    values = torch.linspace(0.1, 1.0, min(shape))
    out = orthogonalize((u * values) @ vh, 5)
    inside = u.t() @ out @ vh.t()
    assert torch.allclose(inside, inside.diag().diag(), atol=1e-5)  # the singular vectors stay the same
    assert float(inside.diag().min()) > 0.68
    assert float(inside.diag().max()) < 1.16


def test_a_transposed_matrix_gives_the_transposed_result_and_zeros_stay() -> None:
    matrix = drawn(0, 37, 101)
    assert torch.equal(orthogonalize(matrix, 5).t(), orthogonalize(matrix.t().contiguous(), 5))
    assert not orthogonalize(torch.zeros(5, 3), 5).any()


def test_state_is_there_before_the_first_step_and_one_process_talks_to_nobody() -> None:
    mine = shard("w", Region.whole((8, 3)), drawn(0, 8, 3))
    with (
        mock.patch.object(dist, "all_to_all_single", side_effect=AssertionError),
        mock.patch.object(dist, "all_gather", side_effect=AssertionError),
    ):
        optimizer = Muon([mine], Axis(), lr=0.1, momentum=0.9, weight_decay=0.5)
        buffer = optimizer.state[mine.tensor]["momentum_buffer"]
        assert buffer.shape == (8, 3)
        assert not buffer.any()
        optimizer.step()  # a missing gradient counts as zeros: weight decay only
    assert torch.allclose(mine.tensor, 0.95 * drawn(0, 8, 3))
    assert optimizer.state[mine.tensor]["momentum_buffer"] is buffer


def test_equal_matrices_are_dealt_evenly() -> None:
    rounds = assign_owners([(768, 768)] * 48, 8)
    assert [sorted(owners.values()) for owners in rounds] == [list(range(8))] * 6
    assert sorted(i for owners in rounds for i in owners) == list(range(48))
    assert [len(owners) for owners in assign_owners([(1024, 1024)] * 5, 2)] == [2, 2, 1]
    (owners,) = assign_owners([(64, 64)] * 5, 2)  # small ones share a round
    assert sorted(owners.values()) == [0, 0, 0, 1, 1]


def test_small_matrices_fill_a_round_that_a_large_one_opens() -> None:
    (owners,) = assign_owners([(16, 16), *[(8, 8)] * 4, (64, 64)], 2)
    assert owners[5] == 0
    assert {owners[i] for i in range(5)} == {1}


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 64])
def test_a_round_is_bounded_by_its_first_matrix(processes: int) -> None:
    """In each round, no rank has more work or memory than the first matrix takes, or small ones do. Shapes: GPT-2's, and odd ones."""
    shapes = [*[(768, 768)] * 48, *[(3072, 768), (768, 3072)] * 12, (8, 500_000), (37, 101), (1, 1)]
    rounds = assign_owners(shapes, processes)
    assert sorted(i for owners in rounds for i in owners) == list(range(len(shapes)))
    for owners in rounds:
        first = shapes[next(iter(owners))]
        for rank in range(processes):
            mine = [shapes[i] for i, owner in owners.items() if owner == rank]
            held = sum(math.prod(s) for s in mine)
            assert held <= max(SMALL, math.prod(first))
            assert held <= SMALL or sum(math.prod(s) * min(s) for s in mine) <= math.prod(first) * min(first)
