"""AdamW and schedules against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shoal.config.options import Optim
from shoal.mesh.mesh import Axis, Mesh
from shoal.mesh.place import Place
from shoal.mesh.region import Region, Shard
from shoal.optim.build import build_optimizer
from shoal.optim.optimizer import Optimizer
from shoal.optim.schedule import learning_rate, replanned
from shoal.training.clip import clip, gradient_norm


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 100, 1.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("linear", 100, 0.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.5),
        ("cosine", 40, 0.5 * (1 + math.cos(math.pi / 3))),
        ("cosine", 100, 0.0),
        ("wsd", 82, 1.0),
        ("wsd", 91, 0.5),
        ("wsd", 100, 0.0),
        ("cosine", 5, 0.5),
        ("wsd", 1, 0.1),
    ],
)
def test_schedules(schedule: str, step: int, expected: float) -> None:
    optim = Optim(lr=2.0, schedule=schedule, warmup_steps=10, decay_fraction=0.2)  # type: ignore[arg-type]
    assert learning_rate(optim, step, 100) == pytest.approx(2.0 * expected, abs=1e-12)


def test_the_floor_is_a_share_of_the_peak() -> None:
    optim = Optim(lr=2.0, schedule="linear", final_lr_fraction=0.1)
    assert learning_rate(optim, 100, 100) == pytest.approx(0.2)
    assert learning_rate(optim, 1000, 100) == pytest.approx(0.2)  # constant after the last planned step


def test_a_longer_plan_says_what_it_does_to_the_rate() -> None:
    text = replanned(Optim(lr=1.0, schedule="linear"), 100, 100, 200)
    assert text is not None
    assert "goes from 0 to 0.5" in text
    text = replanned(Optim(lr=1.0, schedule="constant"), 100, 100, 200)
    assert text is not None
    assert "stays" in text
    assert replanned(Optim(), 100, 100, 100) is None


def shards_of(model: nn.Module) -> list[Shard]:
    return [Shard(name, Region.whole(p.shape), p, p) for name, p in model.named_parameters()]


def optimizer_of(model: nn.Module, optim: Optim, *, bitwise: bool = False) -> Optimizer:
    return build_optimizer(shards_of(model), optim, Axis(), bitwise=bitwise)


@pytest.mark.parametrize("bitwise", [False, True])
def test_adamw_against_its_paper_in_float64(bitwise: bool) -> None:
    """AdamW equals algorithm 2 of Loshchilov and Hutter 2019, written out."""
    torch.manual_seed(0)
    model = nn.Linear(7, 5)
    optim = Optim(lr=0.01, weight_decay=0.3, beta1=0.9, beta2=0.95, eps=1e-8)
    optimizer = optimizer_of(model, optim, bitwise=bitwise)
    expected = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    m = {n: torch.zeros_like(p) for n, p in expected.items()}
    v = {n: torch.zeros_like(p) for n, p in expected.items()}
    for t in range(1, 6):
        optimizer.set_learning_rate(0.01 * t)
        for name, p in model.named_parameters():
            g = torch.randn(p.shape)
            p.grad = g
            g64, decay = g.double(), 0.3 if p.ndim >= 2 else 0.0
            m[name] = 0.9 * m[name] + 0.1 * g64
            v[name] = 0.95 * v[name] + 0.05 * g64**2
            step = (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            expected[name] = expected[name] - 0.01 * t * (step + decay * expected[name])
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), expected[name], atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_owned_once_and_only_matrices_decay(name: str) -> None:
    model = nn.ModuleDict({"embed": nn.Linear(3, 4), "blocks": nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))})
    optimizer = optimizer_of(model, Optim(name=name))  # type: ignore[arg-type]
    groups = [group for part in optimizer.parts for group in part.param_groups]
    owned = [p for group in groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))
    assert {p.ndim for group in groups if group["weight_decay"] > 0 for p in group["params"]} == {2}
    by_muon = [
        p for part in optimizer.parts if "Muon" in type(part).__name__ for g in part.param_groups for p in g["params"]
    ]
    assert len(by_muon) == (1 if name == "muon" else 0)


@pytest.mark.parametrize("bitwise", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
def test_clipping_agrees_with_torchs(max_norm: float, bitwise: bool) -> None:
    grads = {"a": torch.randn(11, 3), "b": torch.randn(7), "c": torch.randn(1, 101)}
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    shards = []
    for (name, grad), p in zip(grads.items(), parameters, strict=True):
        p.grad = grad.clone()
        held = torch.zeros_like(p)
        held.grad = grad.clone()
        shards.append(Shard(name, Region.whole(grad.shape), held, p))
    mesh = Mesh(Place(), torch.device("cpu"))
    norm = gradient_norm(shards, {n: g.shape for n, g in grads.items()}, mesh, bitwise=bitwise)
    clip(shards, norm, max_norm)
    assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)), rel=1e-6)
    for shard, p in zip(shards, parameters, strict=True):
        assert p.grad is not None
        assert shard.tensor.grad is not None
        assert torch.allclose(shard.tensor.grad, p.grad, rtol=1e-6)
