"""shoal's recipes for one to 64 GPUs: valid on the GPUs that they name, of the size that they name, and within the GPUs' memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shoal.bench.trace import LiveBytes
from shoal.config.layout import Layout, find_layout
from shoal.config.options import Config
from shoal.config.presets import resolve_shape
from shoal.models import attention, loss
from shoal.models.gpt2 import GPT2
from shoal.models.llama import Llama
from shoal.parallel.recompute import checkpointed
from shoal.plan.estimate import parameter_count
from shoal.plan.fit import held_bytes
from shoal.report.amounts import with_vocab_size
from shoal.resolve.layout_checks import refusals
from shoal.resolve.recipe import PACKAGED, packaged_recipes
from shoal.resolve.resolve import resolve
from tests.cli.commands import Place
from tests.packaged import make_files

# Name -> parameters, and numbers of GPUs.
RECIPES: dict[str, tuple[float, tuple[int, ...]]] = {
    "13m": (13e6, (1, 2, 4, 8, 16)),
    "gpt2-124m-1-gpu": (124e6, (1,)),
    "gpt2-124m-4-gpus": (124e6, (2, 3, 4)),
    "gpt2-124m-8-gpus": (124e6, (8,)),
    "gpt2-355m-fsdp": (355e6, (2, 4, 8, 16)),
    "llama-1b": (1.2e9, (8, 16, 32)),
    "llama-8b-64-gpus": (7.8e9, (64,)),
}
USABLE = 0.9  # of a GPU's memory: the rest is for CUDA, NCCL's buffers and fragments
SMALL_GPU, LARGE_GPU = 24e9, 80e9


@pytest.fixture
def config(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Resolve the recipe in a folder with the files that it reads."""
    monkeypatch.chdir(tmp_path)
    recipe = PACKAGED / "scale" / f"{name}.yaml"
    make_files(recipe, tmp_path)
    return with_vocab_size(resolve(recipe).config)


def test_every_recipe_is_tested() -> None:
    assert {f"scale/{name}" for name in RECIPES} == {name for name in packaged_recipes() if name.startswith("scale/")}


@pytest.mark.parametrize("name", RECIPES)
def test_it_has_the_size_that_it_names_and_runs_on_the_gpus_that_it_names(name: str, config: Config) -> None:
    parameters, gpus = RECIPES[name]
    assert parameter_count(config.model) == pytest.approx(parameters, rel=0.02)
    for count in gpus:
        assert not list(refusals(config, count))
        assert config.launch.processes in (None, min(count, 8))


@pytest.mark.parametrize("name", ["gpt2-124m-8-gpus", "llama-1b"])
def test_fewer_gpus_are_rejected_if_the_layout_needs_all(name: str, config: Config) -> None:
    assert list(refusals(config, 4))


@pytest.mark.parametrize(
    "name", ["13m", *(pytest.param(name, marks=pytest.mark.ci) for name in RECIPES if name != "13m")]
)
def test_a_step_fits_in_a_gpu(name: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SMALL_GPU if config.model.family == "gpt2" else LARGE_GPU
    activations = _activation_bytes(config, monkeypatch)
    for count in RECIPES[name][1]:
        layout = find_layout(config.parallel, count)
        assert isinstance(layout, Layout)
        assert held_bytes(config, layout) + _gathered_bytes(config, layout) + activations < USABLE * memory


@pytest.mark.ci
@pytest.mark.parametrize("name", ["llama-8b-64-gpus"])
def test_full_checkpointing_keeps_the_input_of_each_block(
    name: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement of the test above agrees with arithmetic: bfloat16 tokens x width for each block."""
    shallow, deep = (_peak_bytes(config.replace("model", num_layers=n), monkeypatch) for n in (2, 4))
    tokens = config.train.micro_batch * config.data.seq_len
    assert deep - shallow == pytest.approx(2 * 2 * tokens * config.model.dim, rel=0.02)


def _gathered_bytes(config: Config, layout: Layout) -> float:
    """Return the bytes of whole parameters and gradients that FSDP2 holds in addition to a process's shards."""
    if layout.dp_shard == 1:
        return 0.0
    whole = parameter_count(config.model)
    block = whole - parameter_count(config.replace("model", num_layers=config.model.num_layers - 1).model)
    root = whole - config.model.num_layers * block
    forwards = config.train.global_batch // config.train.micro_batch / layout.dp
    return 8 * (root + 2 * block) + 4 * whole * (forwards > 1)  # whole gradients wait for the step's last backward


def _activation_bytes(config: Config, monkeypatch: pytest.MonkeyPatch) -> float:
    """Measure two small depths: memory grows by the same amount with each block."""
    shallow, deep = (_peak_bytes(config.replace("model", num_layers=n), monkeypatch) for n in (2, 4))
    return shallow + (deep - shallow) / 2 * (config.model.num_layers - 2)


def _peak_bytes(config: Config, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the peak of one micro-batch without parameters and their finished gradients, in bfloat16, as on a GPU."""
    monkeypatch.setattr(attention, "CPU_HAS_TILES", True)  # no float32 copies for attention
    monkeypatch.setattr(loss, "SLICE_BYTES_CPU", loss.CHUNK_BYTES)
    kind = {"llama": Llama, "gpt2": GPT2}[config.model.family]
    with FakeTensorMode():
        model = kind(resolve_shape(config.model), torch.bfloat16)
        if config.train.activation_checkpointing != "none":
            for block in model.blocks.values():
                block.forward = checkpointed(block.forward, config.train.activation_checkpointing)
        tokens = torch.zeros(config.train.micro_batch, config.data.seq_len, dtype=torch.long)
        live = LiveBytes()
        for parameter in model.parameters():
            live.ignore(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: live.ignore(p.grad))
        with live:
            model.loss(model(tokens), tokens, 1.0, None).backward()
    return live.most


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_fifty_steps_of_the_13m_model_learn(tmp_path: Path) -> None:
    """Run the smallest recipe unchanged, on two processes: from the loss of a uniform guess to the bound in its comment."""
    place = Place(tmp_path)
    process = place.start("train", "scale/13m", "--processes", "2")
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    losses = [line[1] for line in place.losses("13m")]
    assert losses[0] == pytest.approx(math.log(6144), abs=0.3)
    assert losses[-1] < 7.5
