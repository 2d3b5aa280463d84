"""Bisecting real bitwise runs: a planned fault in one weight, and configs that differ, are named by step and tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.checkpoint.restore import whole_tensors
from shoal.checkpoint.saved import listed
from shoal.errors import RunError
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.report.compare.bisect import Bisection, bisect
from shoal.report.compare.series import Series
from shoal.report.runs.facts import RunFacts
from shoal.run.folder import RunFolder
from tests.parallel.layouts import config_of
from tests.training.faulty import train_with


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Restore the number of threads, which a replay sets to one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(folder: Path, name: str, *faults: dict[str, Any], **options: Any) -> Series:
    """Train a small bitwise run that saves every second step."""
    chosen: dict[str, Any] = {
        "train__repro": "bitwise",
        "train__steps": 5,
        "train__global_batch": 2,
        "checkpoint__every": 2,
        "checkpoint__keep_every": 1,
        "checkpoint__background": False,
    }
    config = config_of(folder, name, **(chosen | options))
    train_with(Mesh(Place(), torch.device("cpu")), config, list(faults))
    return Series.read(RunFacts.read(RunFolder.of(config)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the runs of all tests, which share their data."""
    return tmp_path_factory.mktemp("bisected")


@pytest.fixture(scope="module")
def good(folder: Path) -> Series:
    """Return a run without a fault."""
    return trained(folder, "good")


def flip(step: int, phase: str) -> dict[str, Any]:
    return {"step": step, "phase": phase, "rank": 0, "fault": "flip"}


def flipped(folder: Path, name: str, step: int) -> str:
    """Return the parameter that differs most between a run's checkpoint and that of the run "good"."""
    good, bad = (
        next(whole_tensors(s) for s in listed(folder / "runs" / run / "checkpoints") if s.step == step)
        for run in ("good", name)
    )
    apart = {n: float((good[n] - bad[n]).abs().max()) for n in good if n.startswith("model.")}
    return max(apart, key=lambda n: apart[n]).removeprefix("model.")


def test_a_weight_that_flips_is_named_with_its_step(folder: Path, good: Series) -> None:
    bad = trained(folder, "bad", flip(4, "optimizer"))  # after the gradients of step 4: step 5 has the first other loss
    found = bisect(good, bad)
    assert (found.recorded.step, found.after, found.step) == (5, 2, 4)
    [tensor] = found.tensors
    assert (tensor.what, tensor.name, tensor.elements) == ("parameter", flipped(folder, "bad", 4), 1)
    assert found.sides == ("the repetition", "bad")


@pytest.mark.ci
def test_a_weight_that_flips_before_the_forward_has_the_largest_difference(folder: Path, good: Series) -> None:
    bad = trained(folder, "before", flip(4, "forward"))
    found = bisect(good, bad)
    assert (found.recorded.step, found.after, found.step, found.sides[1]) == (4, 2, 4, "before")
    assert bisect(bad, good).sides[1] == "before"  # whatever the order of the runs
    assert any("gives the loss and gradient norm of good and not those of before" in line for line in found.said)
    assert f"the largest difference of a parameter is in the parameter {flipped(folder, 'before', 4)}" in found.said[-1]


@pytest.mark.ci
def test_configs_that_differ_part_at_the_first_activation_or_update(folder: Path, good: Series) -> None:
    def against(**options: Any) -> Bisection:
        return bisect(good, trained(folder, "-".join(options), **options))

    clipped = against(optim__clip_norm=0.1)
    assert (clipped.recorded.step, clipped.step) == (2, 1)  # the first step's loss and norm are before clipping
    assert clipped.tensors[0].what in ("moment", "parameter")
    eps = against(model__norm_eps=2e-5)
    assert eps.step == 1
    assert (eps.tensors[0].what, eps.tensors[0].name) == ("activation", "blocks.0.attention_norm, micro-batch 1")


@pytest.mark.ci
def test_equal_runs_have_no_difference_and_fast_runs_are_refused(folder: Path, good: Series) -> None:
    same = bisect(good, trained(folder, "more", metrics__every=2))
    assert (same.recorded.step, same.tensors) == (None, ())
    fast = trained(folder, "fast", train__repro="fast", train__seed=1)
    with pytest.raises(RunError, match="bitwise"):
        bisect(good, fast)
