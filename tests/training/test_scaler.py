"""float16's loss scale: torch's GradScaler on the same overflows, and a run in float16 in any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from shoal.config.options import Config, Optim
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Region, Shard
from shoal.optim.build import build_optimizer
from shoal.training.clip import clip, gradient_norm
from shoal.training.loop import record, take_step
from shoal.training.run import Run
from shoal.training.scaler import LossScaler
from tests.parallel.layouts import ALONE, NeverStop, Step, config_of, first_step, mesh_for, whole
from tests.world import World


def test_scale_and_weights_are_those_of_torchs_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.training.scaler.GROW_EVERY", 3)
    torch.manual_seed(0)
    start = torch.randn(7, 5)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    shard = Shard("blocks.0.w", Region.whole(ours.shape), ours, ours)
    optimizer = build_optimizer([shard], Optim(lr=0.1, weight_decay=0.1), ALONE.axis("stage"))
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(Optim.beta1, Optim.beta2), eps=Optim.eps, weight_decay=0.1)
    scaler = LossScaler(torch.device("cpu"))
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    for overflows in (False, True, False, False, False, False, True, True, False):
        gradient = torch.randn(7, 5)
        if overflows:
            gradient[3, 2] = float("inf")
        grad_scaler.scale((theirs * gradient.nan_to_num(posinf=0)).sum()).backward()
        if overflows:
            theirs.grad[3, 2] = float("inf")  # type: ignore[index]
        grad_scaler.unscale_(reference)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        grad_scaler.step(reference)
        grad_scaler.update()
        reference.zero_grad()

        ours.grad = gradient * scaler.scale
        norm = scaler.judge(gradient_norm([shard], {shard.name: ours.shape}, ALONE, bitwise=False))
        clip([shard], norm, 1.0, scaler.divisor)
        optimizer.set_learning_rate(0.1)
        optimizer.step(torch.tensor(overflows))
        assert float(scaler.scale) == grad_scaler.get_scale()
        torch.testing.assert_close(ours, theirs)


def in_float16(mesh: Mesh, config: Config, steps: int) -> tuple[Step, list[float]]:
    """Train in float16 on a CPU, without shoal's rejection of slow dtypes; return the first step, and the scale after each step."""
    with patch("shoal.training.finish_config.check_dtype"):
        step = first_step(mesh, config)
        run = Run.open(
            config.replace("launch", name=f"{config.launch.name}-run"), mesh_for(mesh, config.parallel), NeverStop()
        )
        scales = []
        assert run.state.scaler is not None
        for _ in range(steps):
            record(run, take_step(run))
            scales.append(float(run.state.scaler.scale))
        run.close()
    return step, scales


@pytest.mark.parametrize(
    ("processes", "options"),
    [
        pytest.param(2, {"dp_shard": 2}, id="fsdp"),
        pytest.param(2, {}, id="ddp"),
        pytest.param(4, {"tp": 2, "pp": 2}, id="tp pp"),
        pytest.param(4, {"dp_shard": 2, "cp": 2}, id="fsdp cp", marks=pytest.mark.ci),
    ],
)
def test_float16_in_a_layout(
    world: Callable[[int], World], tmp_path: Path, processes: int, options: dict[str, Any]
) -> None:
    options = {f"parallel__{key}": value for key, value in options.items()}
    float32 = first_step(ALONE, config_of(tmp_path, "float32"))
    alone, scales = in_float16(ALONE, config_of(tmp_path, "alone", train__dtype="float16"), 3)
    found = world(processes).run(in_float16, config_of(tmp_path, "float16", train__dtype="float16", **options), 3)
    assert all(other == scales for _, other in found)
    exact, one, grads = (whole([s.gradients for s in steps]) for steps in ([float32], [alone], [s for s, _ in found]))
    norm = sum(g.square().sum() for g in exact.values()).sqrt()  # type: ignore[union-attr]
    error, own = (sum((g[n] - exact[n]).square().sum() for n in exact).sqrt() / norm for g in (grads, one))  # type: ignore[union-attr]
    assert error < 1.5 * own + 1e-4
    assert 1e-5 < own < 1e-2  # only rounding


def test_a_run_goes_on_after_a_step_that_overflowed(tmp_path: Path) -> None:
    """If the first scale is too large, it is halved, the step is skipped, and the run continues."""
    with patch("shoal.training.scaler.START", 2.0**30):
        step, scales = in_float16(ALONE, config_of(tmp_path, "large", train__dtype="float16"), 3)
    assert scales == [2.0**29, 2.0**28, 2.0**27]
    events = [json.loads(line) for line in (tmp_path / "runs" / "large-run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "overflowed"] == [1, 2, 3]
    fresh = first_step(ALONE, config_of(tmp_path, "fresh"))  # float32, one step taken
    assert not torch.equal(fresh.parameters["embed.weight"][1], step.parameters["embed.weight"][1])
    assert torch.isfinite(step.parameters["embed.weight"][1]).all()
