"""Weights imported, trained in a layout and exported, each compared with transformers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Optim, Parallel, Train
from shoal.config.run_options import Launch, Metrics
from shoal.infer.export import export_run
from shoal.mesh.mesh import Mesh
from shoal.models.build import build_model, materialize
from shoal.models.family import LanguageModel
from shoal.resolve.resolve import resolve
from shoal.training.assemble import folder_weights
from shoal.training.loop import take_step
from shoal.training.run import Run
from shoal.training.step import train_step
from tests.hub import small
from tests.parallel.layouts import ALONE, NeverStop, mesh_for
from tests.world import World

STEPS = 20
PROBE = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: small.save(kind, root / kind) for kind in small.TYPES}


def config_of(folder: Path, work: Path, name: str, **parallel: Any) -> Config:
    """Resolve a typical config: `model.from`, a small corpus, and options of a short run."""
    config = resolve(
        None,
        [
            ("model.from", str(folder), "here"), ("data.corpus", "dummy", "here"), ("data.dummy_documents", "200", "here"),
            ("data.seq_len", "48", "here"), ("data.folder", str(work / "data"), "here"), ("train.steps", str(STEPS), "here"),
            ("train.global_batch", "4", "here"), ("train.micro_batch", "2", "here"), ("train.dtype", "float32", "here"),
            ("optim.lr", "1e-3", "here"), ("optim.schedule", "constant", "here"), ("metrics.peak_tflops", "1", "here"),
            ("launch.runs", str(work / "runs"), "here"), ("launch.name", name, "here"),
        ],
    ).config  # fmt: skip
    return config.replace("parallel", **parallel)


def ours(folder: Path, config: Config, dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = build_model(config.model, compute_dtype=dtype)
    materialize(model, folder_weights(model, str(folder)), "cpu")
    return model.eval()


@pytest.mark.parametrize("kind", small.TYPES)
def test_logits_are_those_of_transformers(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = folders[kind]
    config = config_of(folder, tmp_path, "x")
    tokens = torch.randint(0, small.VOCAB, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = small.load(folder)(tokens).logits
        model = ours(folder, config)
        found = model.logits(model(tokens))
        assert (found - expected).abs().max() < 1e-5  # the logits are about 2
        # In bfloat16 both models round: shoal's logits are as close to the float32 logits as those of transformers.
        theirs16 = small.load(folder, torch.bfloat16)(tokens).logits.float()
        model16 = ours(folder, config, torch.bfloat16)
        ours16 = model16.logits(model16(tokens)).float()
    noise = (theirs16 - expected).pow(2).mean().sqrt()
    assert (ours16 - expected).pow(2).mean().sqrt() < 1.2 * noise


def batches_and_losses(mesh: Mesh, config: Config) -> list[tuple[list[tuple[torch.Tensor, torch.Tensor]], float]]:
    """Train a run and save at its end. Return, for each step, (tokens, labels) of this rank's micro-batches and the mean loss."""
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    seen = []
    for _ in range(STEPS):
        batches = run.loader.next_step()
        stats = train_step(run.runnable, run.state, batches, step=run.state.step + 1, lr=config.optim.lr, clip_norm=1.0)
        run.state.step += 1
        loss, tokens, *_ = stats.read()
        seen.append(([(b.tokens, b.labels) for b in batches], loss / tokens))
    assert run.saving.finish(run.state, None).ok
    run.close()
    return seen


def plain_loop(model: Any, steps: list[Any], config: Config) -> Iterator[float]:
    """Train as in transformers' documentation, on the same batches; yield each step's loss."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optim = config.optim
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    for batches in steps:
        tokens, labels = (torch.cat(x) for x in zip(*batches, strict=True))
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize("kind", [k if k == "llama" else pytest.param(k, marks=pytest.mark.ci) for k in small.TYPES])
def test_twenty_steps_in_fsdp_and_tp_out_again_and_the_same_text(
    world: Callable[[int], World], folders: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = folders[kind]
    trained = {}
    for name, parallel in {"fsdp": {"dp_shard": 2}, "tp": {"tp": 2}}.items():
        config = config_of(folder, tmp_path, name, **parallel)
        seen = world(2).run(batches_and_losses, config)
        if name == "fsdp":  # each process has its half of the batches
            steps = [a[0] + b[0] for a, b in zip(*seen, strict=True)]
        losses = [loss for _, loss in seen[0]]
        theirs = small.load(folder).train()
        assert losses == pytest.approx(list(plain_loop(theirs, steps, config)), rel=1e-5), name
        out = export_run(tmp_path / "runs", name, step=None, out=tmp_path / name)
        trained[name] = small.load(out)
        with torch.no_grad():
            assert (trained[name](PROBE).logits - theirs.eval()(PROBE).logits).abs().max() < 1e-4, name
    texts = [m.generate(PROBE[:, :4], max_new_tokens=20, do_sample=False)[0].tolist() for m in trained.values()]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", small.TYPES)
def test_what_was_not_trained_comes_out_bit_for_bit(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    folder = small.save(kind, tmp_path / "in", dtype=dtype, shard="5GB")
    run = Run.open(config_of(folder, tmp_path, "still"), ALONE, NeverStop())
    assert run.saving.finish(run.state, None).ok
    run.close()
    out = export_run(tmp_path / "runs", "still", step=0, out=tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    before.pop("lm_head.weight", None) if "lm_head.weight" not in after else None
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype
        assert torch.equal(tensor, after[name]), name
    said, says = (json.loads((f / "config.json").read_text()) for f in (folder, out))
    assert {k: says[k] for k in said} == said
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / name).read_text() == (out / name).read_text()
    again = resolve(
        None,
        [
            ("model.from", str(out), "here"),
            ("train.steps", "1", "here"),
            ("data.seq_len", "48", ""),
        ],
    ).config.model
    assert dataclasses.replace(again, from_=None) == dataclasses.replace(
        config_of(folder, tmp_path, "x").model, from_=None
    )


def test_each_tensor_keeps_the_dtype_it_had(tmp_path: Path) -> None:
    """Export norms in float32 beside matrices in bfloat16, whatever config.json says."""
    folder = small.save("llama", tmp_path / "in", dtype=torch.bfloat16, shard="5GB")
    tensors = load_file(folder / "model.safetensors")
    mixed = {n: torch.randn(t.shape) if "norm" in n else t for n, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    run = Run.open(config_of(folder, tmp_path, "mixed"), ALONE, NeverStop())
    assert run.saving.finish(run.state, None).ok
    run.close()
    out = export_run(tmp_path / "runs", "mixed", step=0, out=tmp_path / "out")
    after = load_file(out / "model.safetensors")
    assert {n: (t.dtype, t.sum()) for n, t in after.items()} == {n: (t.dtype, t.sum()) for n, t in mixed.items()}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_that_came_from_nowhere_opens_too(tmp_path: Path) -> None:
    """Export our own shapes, with our own tokenizer, in the exact layout of a known model type."""
    for number, shape in enumerate(
        (
            Model(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, tie_embeddings=True, rope_factor=4.0),
            Model(dim=32, num_layers=2, num_heads=2, qk_norm=True, head_dim=24),
            Model(dim=32, num_layers=2, num_heads=2, qkv_bias=True),
            Model(family="gpt2", dim=32, num_layers=2, num_heads=2, tie_embeddings=True, max_seq_len=64),
        )
    ):
        config = Config(
            model=shape,
            data=Data(corpus="dummy", dummy_documents=100, tokenizer_vocab_size=300, seq_len=32, folder=str(tmp_path)),
            optim=Optim(), train=Train(steps=1, global_batch=4, micro_batch=2, dtype="float32"), parallel=Parallel(),
            metrics=Metrics(peak_tflops=1.0), launch=Launch(runs=str(tmp_path), name=f"own{number}"),
        )  # fmt: skip
        run = Run.open(config, ALONE, NeverStop())
        take_step(run)
        assert run.saving.finish(run.state, None).ok
        run.close()
        tokens = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            model = run.runnable.parts[0].eval()
            expected = model.logits(model(tokens))
            out = export_run(tmp_path, f"own{number}", step=None, out=tmp_path / f"out{number}")
            assert (small.load(out)(tokens).logits - expected).abs().max() < 1e-5
