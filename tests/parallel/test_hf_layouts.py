"""transformers models in parallel layouts: the gradients of one process, and its exact bits if these are promised."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.checkpoint.convert import to_hugging_face
from shoal.checkpoint.restore import load_model
from shoal.checkpoint.saved import listed
from shoal.config.options import Config
from shoal.mesh.mesh import Mesh
from shoal.models.build import build_model
from shoal.resolve.layout_checks import refusals
from shoal.training.loop import complete
from shoal.training.run import Run
from tests.models import hf_small
from tests.parallel.layouts import ALONE, NeverStop, Step, first_step, mesh_for, whole
from tests.world import World

Take = Callable[..., tuple[Step, dict[str, torch.Tensor]]]
WORST = 2e-6  # relative error of a parameter's gradient, float32


@pytest.fixture(scope="module")
def take(tmp_path_factory: pytest.TempPathFactory, world: Callable[[int], World]) -> Take:
    """Return a function that takes one step of a family in a layout, and returns its `Step` and the whole gradients."""
    root = tmp_path_factory.mktemp("layouts")
    kept: dict[Any, tuple[Step, dict[str, torch.Tensor]]] = {}

    def step(name: str, processes: int = 1, **options: Any) -> tuple[Step, dict[str, torch.Tensor]]:
        key = (name, processes, *sorted(options.items()))
        if key not in kept:
            folder = root / name
            if not folder.is_dir():
                hf_small.save(name, folder, **DROPOUT.get(name, {}))
            config = hf_small.config_of(folder, root, f"run-{len(kept)}", **options)
            assert list(refusals(config, processes)) == []
            steps = world(processes).run(first_step, config) if processes > 1 else [first_step(ALONE, config)]
            assert len({(s.loss, s.norm) for s in steps}) == 1
            kept[key] = steps[0], whole([s.gradients for s in steps])
        return kept[key]

    return step


DROPOUT: dict[str, dict[str, Any]] = {}


def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return each gradient's relative error, beyond 1e-8 of the whole gradient's norm (a key's bias has only rounding)."""
    assert found.keys() == wanted.keys()
    norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    return {n: float(((found[n] - w).norm() - 1e-8 * norm).clamp(min=0) / w.norm()) for n, w in wanted.items()}


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp 2": (2, {}),
    "fsdp 2": (2, {"parallel__dp_shard": 2}),
    "tp 2": (2, {"parallel__tp": 2}),
    "fsdp 2 x tp 2": (4, {"parallel__dp_shard": 2, "parallel__tp": 2}),
    "hsdp 2x2": (4, {"parallel__dp_replicate": 2, "parallel__dp_shard": 2}),
    "fsdp 2, offload": (2, {"parallel__dp_shard": 2, "parallel__cpu_offload": True}),
}
CASES = [
    *[(name, layout) for name in ("gemma2", "gpt_neox") for layout in LAYOUTS],
    *[(name, layout) for name in ("qwen3", "olmo2", "phi") for layout in ("tp 2", "fsdp 2 x tp 2")],
    ("cohere", "tp 2"), ("gpt2", "fsdp 2"), ("stablelm", "ddp 2"),
]  # fmt: skip


BY_SIZE = sorted(CASES, key=lambda case: LAYOUTS[case[1]][0])


@pytest.mark.parametrize(("name", "layout"), BY_SIZE)
def test_gradients_are_those_of_one_process(take: Take, name: str, layout: str) -> None:
    processes, options = LAYOUTS[layout]
    alone, wanted = take(name)
    step, found = take(name, processes, **options)
    worst = max((error, parameter) for parameter, error in errors(found, wanted).items())
    assert worst[0] <= WORST, worst
    assert step.loss == pytest.approx(alone.loss, rel=1e-6)
    assert step.norm == pytest.approx(alone.norm, rel=1e-6)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("layout", ["fsdp 2", "tp 2"])
def test_computed_again_they_are_the_same(take: Take, layout: str, mode: str) -> None:
    processes, options = LAYOUTS[layout]
    _, wanted = take("gemma2", processes, **options)
    _, found = take("gemma2", processes, **options, train__activation_checkpointing=mode)
    assert max(errors(found, wanted).values()) <= WORST


@pytest.mark.parametrize("layout", ["ddp 2", "fsdp 2", "tp 2"])
def test_bfloat16_rounds_as_one_process_does(take: Take, layout: str) -> None:
    processes, options = LAYOUTS[layout]
    exact = take("gemma2")[1]
    own, found = (
        take("gemma2", n, **o, train__dtype="bfloat16")[1] for n, o in ((1, {}), (processes, options))
    )  # fmt: skip
    off, noise = (torch.stack([(g[n] - w).norm() for n, w in exact.items()]).norm() for g in (found, own))
    assert off <= 1.5 * noise


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["ddp 2", "fsdp 2", "hsdp 2x2"])
def test_bitwise_gives_the_bits_of_one_process(take: Take, layout: str, dtype: str) -> None:
    processes, options = LAYOUTS[layout]
    alone, wanted = take("gemma2", train__repro="bitwise", train__dtype=dtype)
    step, found = take("gemma2", processes, **options, train__repro="bitwise", train__dtype=dtype)
    assert (step.loss, step.norm) == (alone.loss, alone.norm)
    assert all(torch.equal(found[name], w) for name, w in wanted.items())


DROPOUT["dropping"] = {"resid_pdrop": 0.2, "embd_pdrop": 0.2}
hf_small.CONFIGS["dropping"] = hf_small.CONFIGS["phi"]


@pytest.mark.parametrize("layout", ["ddp 2", "fsdp 2"])
def test_dropout_is_the_same_in_a_layout(take: Take, layout: str) -> None:
    processes, options = LAYOUTS[layout]
    alone, wanted = take("dropping")
    assert alone.loss != take("dropping", model__dropout=0.0)[0].loss
    _, found = take("dropping", processes, **options, train__activation_checkpointing="full")
    assert max(errors(found, wanted).values()) <= WORST


def test_a_native_family_through_transformers_is_the_same_model(take: Take, tmp_path: Path) -> None:
    _, found = take("llama")
    folder = hf_small.save("llama", tmp_path / "llama")
    native = hf_small.config_of(folder, tmp_path, "native", model__family="llama", model__norm_eps=1e-6)
    wanted = whole([first_step(ALONE, native).gradients])
    assert max(errors(found, to_hugging_face("llama", wanted)).values()) <= WORST


def test_a_family_without_a_plan_is_refused(take: Take) -> None:
    with pytest.raises(
        AssertionError, match=r"the config of a stablelm has no tensor-parallel plan; set parallel\.tp to 1"
    ):
        take("stablelm", 2, parallel__tp=2)


def holds(mesh: Mesh, config: Config) -> tuple[int, int]:
    """Return (elements on this rank, elements of the model)."""
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    run.close()
    return sum(s.tensor.numel() for s in run.runnable.shards), sum(s.numel() for s in run.runnable.shapes.values())


def test_nobody_holds_the_whole_model(tmp_path: Path, world: Callable[[int], World]) -> None:
    folder = hf_small.save("gemma2", tmp_path / "gemma2")
    config = hf_small.config_of(folder, tmp_path, "held", parallel__dp_shard=2)
    for held, total in world(2).run(holds, config):
        assert held <= total / 2 * 1.02


def without_weights(mesh: Mesh, config: Config) -> float:
    """Return the loss of the first batch after setting all weights of the built model to 0."""
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    with torch.no_grad():
        for shard in run.runnable.shards:
            shard.tensor.zero_()
    [batch, *_] = run.loader.next_step()
    run.close()
    return float(run.runnable.evaluate([batch])) / batch.valid_tokens


def test_what_was_tried_out_before_is_not_kept(tmp_path: Path, world: Callable[[int], World]) -> None:
    """FSDP2 keeps gathered parameters after a forward; weights that are loaded later must be used."""
    folder = hf_small.save("gemma2", tmp_path / "gemma2")
    config = hf_small.config_of(folder, tmp_path, "later", parallel__dp_shard=2)
    for loss in world(2).run(without_weights, config):
        assert loss == pytest.approx(math.log(hf_small.VOCAB), rel=1e-6)


def train(mesh: Mesh, config: Config) -> None:
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    complete(run)
    run.close()


def test_a_run_ends_and_another_layout_goes_on(tmp_path: Path, world: Callable[[int], World]) -> None:
    """Train sharded on two ranks, save, and open it on one, and with transformers' own class."""
    folder = hf_small.save("gemma2", tmp_path / "gemma2")
    config = hf_small.config_of(folder, tmp_path, "whole", parallel__dp_shard=2, train__sample_prompt="def ")
    world(2).run(train, config)
    more = config.replace("parallel", dp_shard=1).replace("train", steps=6)
    train(ALONE, more)
    [*_, last] = listed(Path(config.launch.runs) / "whole" / "checkpoints")
    assert last.step == 6
    model = build_model(more.model, compute_dtype=torch.float32)
    load_model(last, model, torch.device("cpu"))
    other = hf_small.theirs(folder)
    other.load_state_dict(dict(model.named_parameters()), strict=False)
    other.tie_weights()
    tokens = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().logits(model(tokens)), other(tokens).logits, atol=1e-5, rtol=0)
