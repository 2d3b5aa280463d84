"""NaN and Inf, spikes, differing replicas: what is skipped and reported, and the result of the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.config.options import Config, Optim
from shoal.data.order.order import sample_at
from shoal.errors import DivergedError
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Region, Shard
from shoal.optim.build import build_optimizer
from shoal.parallel.replicas import compare
from shoal.run.folder import RunFolder
from shoal.run.records import read_metrics, read_ranks
from shoal.training.guard import FEW, RECENT, Guard, limit, score
from shoal.training.loop import complete, record, take_step
from shoal.training.run import Run
from tests.parallel.layouts import ALONE, NeverStop, config_of, mesh_for, whole
from tests.training.faulty import events, train_with
from tests.world import World

Parts = dict[str, tuple[Region, torch.Tensor]]


def fault(kind: str, step: int, phase: str = "forward", rank: int = 0) -> dict[str, Any]:
    return {"step": step, "phase": phase, "rank": rank, "fault": kind}


def trained(mesh: Mesh, config: Config, faults: list[dict[str, Any]]) -> Parts:
    """Train to the end with these planned faults; return the weights."""
    run = train_with(mesh, config, faults)
    return {s.name: (s.region, s.tensor.detach().clone()) for s in run.runnable.shards}


def steps_of(config: Config) -> list[int]:
    return [r.step for r in read_metrics(RunFolder.of(config).metrics_file).steps]


def equal(one: list[Parts], other: list[Parts]) -> bool:
    a, b = whole(one), whole(other)
    return all(torch.equal(a[name], b[name]) for name in a)


OPTIONS: dict[str, Any] = {
    "train__steps": 8,
    "checkpoint__every": 2,
    "checkpoint__background": False,
    "fault__max_skipped": 1,
    "train__eval_every": 0,
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({}, id="ddp"),
        pytest.param({"dp_shard": 2}, id="fsdp"),
        pytest.param({"tp": 2}, id="tp", marks=pytest.mark.ci),
        pytest.param({"pp": 2}, id="pp"),
    ],
)
def test_no_number_on_one_rank_is_a_step_that_all_leave_out(
    world: Callable[[int], World], tmp_path: Path, layout: dict[str, Any]
) -> None:
    options = OPTIONS | {f"parallel__{key}": value for key, value in layout.items()}
    config = config_of(tmp_path, "poisoned", **options)
    parts = world(2).run(trained, config, [fault("nan", 5, rank=1)])
    [event] = events(config, "left out")
    assert (event["step"], event["loss"], event["norm"]) == (5, "nan", "nan")
    batch, rows = config.train.global_batch, Run.open(config_of(tmp_path, "rows"), ALONE, NeverStop()).loader.rows
    places = range(4 * batch, 5 * batch)
    assert event["samples"] == sample_at(config.train.seed, list(places), len(rows)).tolist()
    assert event["origin"].startswith("the output of ")
    assert event["origin"].endswith("on rank 1")
    assert steps_of(config) == [1, 2, 3, 4, 6, 7, 8]
    assert all(torch.isfinite(t).all() for t in whole(parts).values())


def test_a_step_that_is_left_out_changes_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, "one", **OPTIONS | {"train__steps": 4, "optim__schedule": "constant"})
    run = Run.open(config, ALONE, NeverStop())
    record(run, take_step(run))
    before = {n: p.tensor.clone() for n, p in run.state.tensors().items()}
    run.guard._limit.fill_(0.0)  # every loss is a spike
    record(run, take_step(run))
    assert all(torch.equal(before[n], p.tensor) for n, p in run.state.tensors().items())
    assert (run.state.step, run.state.skipped) == (2, 1)
    run.close()


def test_too_many_in_a_row_and_the_run_goes_back_and_passes_them_over(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    """A run that skips these samples from the start has the same weights."""
    config = config_of(tmp_path, "back", **OPTIONS)
    found = world(2).run(trained, config, [fault("nan", 4), fault("nan", 5, rank=1)])
    [event] = events(config, "went back")
    batch = config.train.global_batch
    assert (event["step"], event["to"], event["passed_over"]) == (5, 2, [3 * batch, 5 * batch])
    assert steps_of(config) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [each.step for each in read_ranks(RunFolder.of(config).ranks_file)] == [2]  # not again after the rollback
    clean = world(2).run(passing_over, config_of(tmp_path, "clean", **OPTIONS), (3 * batch, 5 * batch))
    assert equal(found, clean)


def passing_over(mesh: Mesh, config: Config, window: tuple[int, int]) -> Parts:
    from shoal.training.assemble import open_loader

    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    run.loader.close()
    run.loader = open_loader(config, run.mesh, run.rows, 0, [window])
    complete(run)
    run.close()
    return {s.name: (s.region, s.tensor.detach().clone()) for s in run.runnable.shards}


def test_where_going_back_does_not_help_the_run_ends_in_words(tmp_path: Path) -> None:
    faults = [fault("nan", step) for step in range(4, 7)] * 200  # at every attempt
    config = config_of(tmp_path, "lost", **OPTIONS | {"fault__max_rollbacks": 1})
    with pytest.raises(DivergedError, match="1 rollbacks did not help"):
        trained(ALONE, config, faults)
    config = config_of(tmp_path, "early", **OPTIONS)
    with pytest.raises(DivergedError, match=r"step 2: 2 steps in a row were skipped, and there is no checkpoint"):
        trained(ALONE, config, [fault("nan", 1), fault("nan", 2)])


@pytest.mark.parametrize(("size", "ranks"), [pytest.param(2, [0, 1], marks=pytest.mark.ci), (3, [1])])
def test_a_bit_that_flips_is_found_named_and_undone(
    world: Callable[[int], World], tmp_path: Path, size: int, ranks: list[int]
) -> None:
    options = OPTIONS | {"fault__check_replicas_every": 3, "checkpoint__every": 4, "train__global_batch": 24}
    config = config_of(tmp_path, "flipped", **options)
    found = world(size).run(trained, config, [fault("flip", 5, "optimizer", rank=1)])
    [event] = events(config, "corrupted")
    assert (event["step"], event["ranks"]) == (6, ranks)
    assert [e["to"] for e in events(config, "went back")] == [4]
    assert equal(found, world(size).run(trained, config_of(tmp_path, "sound", **options), []))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"dp_replicate": 2}, id="ddp"),
        pytest.param({"dp_replicate": 2, "dp_shard": 2}, id="hsdp", marks=pytest.mark.ci),
    ],
)
def test_where_there_is_no_checkpoint_yet_a_flipped_bit_starts_the_run_anew(
    world: Callable[[int], World], tmp_path: Path, layout: dict[str, Any]
) -> None:
    options = OPTIONS | {"fault__check_replicas_every": 1, "checkpoint__every": 6}
    config = config_of(tmp_path, "flipped early", **options | {f"parallel__{k}": v for k, v in layout.items()})
    size = math.prod(layout.values())
    found = world(size).run(trained, config, [fault("flip", 3, "optimizer", rank=1)])
    [event] = events(config, "went back")
    assert (event["step"], event["to"]) == (3, 0)
    sound = config.replace("launch", name="sound")
    assert equal(found, world(size).run(trained, sound, []))


def some_differ(mesh: Mesh) -> list[Any]:
    from shoal.mesh.region import Part

    tensors = {name: torch.arange(12.0).view(3, 4) for name in ("a", "b")}
    if mesh.place.rank == 2:
        tensors["b"].view(torch.int32)[1, 1] ^= 1
    return compare({name: Part.whole(t) for name, t in tensors.items()}, mesh)


def test_the_rank_that_is_outvoted_is_named(world: Callable[[int], World]) -> None:
    for [difference] in world(4).run(some_differ):
        assert (difference.name, difference.ranks) == ("b", (2,))


def test_the_limit_of_a_spike_is_by_median_and_deviation() -> None:
    losses = [3.0 + 0.1 * (-1) ** n for n in range(FEW)]
    assert limit(losses, 6.0) == pytest.approx(3.0 + 6.0 * 1.4826 * 0.1)
    assert limit(losses[1:], 6.0) == math.inf
    assert limit([2.0] * FEW, 6.0) == pytest.approx(2.0 + 6.0 * 0.02)


def test_a_spike_score_is_that_of_numpy_also_after_a_resume_and_where_losses_are_read_late() -> None:
    """The losses that a score uses are known on a GPU too, where a step's loss is read after the next step has begun."""
    random = np.random.default_rng(5)
    losses = {step: float(loss) for step, loss in enumerate(4.0 + 0.2 * random.standard_normal(400), start=1)}
    losses[300] = 9.0

    def scores(*, resumed_at: int | None = None) -> dict[int, float | None]:
        guard, found = Guard(torch.device("cpu"), None), {}
        for step, loss in losses.items():
            found[step] = guard.score(step, loss)
            guard.learn(step, loss)
            if step == resumed_at:
                kept = json.loads(json.dumps(list(guard.losses)))
                guard = Guard(torch.device("cpu"), None)
                guard.losses.extend((number, value) for number, value in kept)
        return found

    found = scores()
    assert [found[step] for step in range(1, FEW + 2)] == [None] * (FEW + 1)
    for step in range(FEW + 2, 401):
        before = np.array([losses[each] for each in range(max(1, step - 1 - RECENT), step - 1)])
        spread = max(1.4826 * np.median(np.abs(before - np.median(before))), 0.01 * np.median(before))
        assert found[step] == pytest.approx((losses[step] - np.median(before)) / spread, rel=1e-12, abs=1e-12)
    assert (found[300] or 0.0) > 15 > max(score for step, score in found.items() if score is not None and step != 300)
    assert all(scores(resumed_at=at) == found for at in (1, 20, FEW, 150, 299, 300))
    guard, late = Guard(torch.device("cpu"), 6.0), {}
    for step, loss in losses.items():  # the limit of the next step is set before this one's loss is read
        guard.prepare(step + 1)
        bound = float(guard._limit)
        late[step] = guard.score(step, loss)
        guard.learn(step, loss)
        following = found.get(step + 1)
        assert (bound == math.inf) == (following is None) or step == 400
        if following is not None:
            assert (losses[step + 1] > bound) == (following > 6.0)
    assert late == found


def test_a_loss_that_is_no_number_or_a_constant_loss_has_no_score() -> None:
    assert score(math.nan, [3.0] * FEW) is score(math.inf, [3.0] * FEW) is None
    assert score(1.0, [0.0] * FEW) is None
    assert score(3.3, [3.0] * FEW) == pytest.approx(10.0)


def test_a_spike_is_left_out_and_not_learnt_from() -> None:
    guard = Guard(torch.device("cpu"), 6.0)
    for step in range(1, FEW + 2):
        guard.learn(step, 3.0)
    guard.prepare(FEW + 2)
    one = torch.ones(())
    assert bool(guard.judge(torch.tensor(3.5, dtype=torch.float64), one))
    assert not bool(guard.judge(torch.tensor(3.1, dtype=torch.float64), one))
    assert bool(guard.judge(torch.tensor(2.0, dtype=torch.float64), torch.tensor(math.inf)))


def test_muon_leaves_all_as_it_was_without_asking_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the host does not wait to learn whether a step is skipped; the test runs the same arithmetic on a CPU."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4))
    shard = Shard("blocks.0.w", Region.whole(weight.shape), weight, weight)
    optimizer = build_optimizer([shard], Optim(name="muon", lr=0.1, weight_decay=0.1), ALONE.axis("stage"))
    [muon] = optimizer.parts
    weight.grad = torch.randn(6, 4)
    optimizer.step()
    before = (weight.detach().clone(), optimizer.moments(shard)["momentum_buffer"].clone())
    weight.grad = torch.full((6, 4), torch.nan)
    muon.found_inf = torch.ones(())  # type: ignore[attr-defined]
    muon.step()
    assert torch.equal(weight, before[0])
    assert torch.equal(optimizer.moments(shard)["momentum_buffer"], before[1])
