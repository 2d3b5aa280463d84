"""Every shape that a config allows opens in transformers after export, and computes the same logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from shoal.checkpoint.convert import to_hugging_face
from shoal.config.options import Model
from shoal.config.presets import resolve_shape, shape_problems
from shoal.errors import ModelError
from shoal.hub.shape import read_shape, write_shape
from shoal.infer import export
from shoal.infer.export import export_run
from shoal.infer.load import load_run
from shoal.models.build import build_model
from shoal.resolve.resolve import resolve
from shoal.run.console import Console
from shoal.training.loop import complete
from shoal.training.run import Run
from tests.cli.commands import RECIPE
from tests.hub import small
from tests.parallel.layouts import ALONE, NeverStop

UNEVEN = {"model.dim": "64", "model.num_heads": "3", "model.head_dim": "48"}
LLAMA3: dict[str, Any] = {"rope_factor": 8.0, "rope_original_seq_len": 16}
SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_kv_heads": 1}),
    ("llama", {"dim": 63, "num_heads": 3, "head_dim": 22, "ffn_dim": 1}),
    ("llama", {"head_dim": 2, "norm_eps": 0.1, "rope_theta": 0.5}),
    ("llama", {"vocab_size": 1, "max_seq_len": 1, "tie_embeddings": True}),
    ("mistral", {"num_heads": 3, "head_dim": 48}),
    ("mistral", {"dim": 65, "num_kv_heads": 2, "head_dim": 16, "tie_embeddings": True, **LLAMA3}),
    ("qwen2", {"num_heads": 3, "head_dim": 48, "qkv_bias": True, **LLAMA3}),
    ("qwen2", {"dim": 65, "head_dim": 16, "qkv_bias": True, "tie_embeddings": True}),
    ("qwen3", {"num_heads": 5, "head_dim": 16, "qk_norm": True, **LLAMA3}),
    ("gpt2", {"family": "gpt2", "dim": 63, "num_heads": 3, "ffn_dim": 7}),
    ("gpt2", {"family": "gpt2", "num_kv_heads": 4, "head_dim": 16, "qkv_bias": True, "tie_embeddings": True}),
]


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = small.load(folder)(tokens).logits
    return logits


@pytest.mark.parametrize(("kind", "given"), SHAPES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_legal_shape_computes_the_same_there(kind: str, given: dict[str, Any], tmp_path: Path) -> None:
    shape = resolve_shape(Model(**{"vocab_size": 97, "dim": 64, "num_layers": 2, "max_seq_len": 64, **given}))
    assert shape_problems(shape) == []
    model = build_model(shape, compute_dtype=torch.float32).to_empty(device="cpu").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    config = write_shape(shape)
    assert config["model_type"] == kind
    (tmp_path / "config.json").write_text(json.dumps(config | {"bos_token_id": None, "eos_token_id": 0}))
    weights = to_hugging_face(shape.family, dict(model.named_parameters())) | model.constants()
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(0, 97, (1, min(40, shape.max_seq_len))) % (shape.vocab_size or 1)
    theirs = logits_of(tmp_path, tokens)
    with torch.no_grad():
        ours = model.logits(model(tokens))
    assert (ours - theirs).abs().max() <= 2e-6 * max(1.0, float(theirs.abs().max()))
    again = read_shape(config, "here")
    assert not again.notes
    assert write_shape(resolve_shape(Model(**again.values))) == config


def test_what_has_no_type_there_is_rejected_when_the_config_is_read() -> None:
    [(key, why)] = shape_problems(Model(qk_norm=True, qkv_bias=True))
    assert key == "qkv_bias"
    assert "model.qk_norm" in why


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run whose head width differs from that of transformers' Llama."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "recipe.yaml").write_text(RECIPE)
    given = {**UNEVEN, "launch.name": "uneven", "launch.runs": folder / "runs", "data.folder": folder / "data", "train.steps": 3, "launch.processes": 1}  # fmt: skip
    config = resolve(folder / "recipe.yaml", [(key, str(value), "the test") for key, value in given.items()]).config
    run = Run.open(config, ALONE, NeverStop())
    complete(run)
    run.close()
    return folder / "runs"


def test_a_run_of_uneven_heads_goes_out_and_comes_in_again(runs: Path, tmp_path: Path) -> None:
    out = export_run(runs, "uneven", step=None, out=tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["sliding_window"] is None
    tokens = torch.randint(0, 257, (1, 60))
    model = load_run(runs, "uneven", step=None, device="cpu", dtype="float32").model
    with torch.no_grad():
        ours = model.logits(model(tokens))
    assert (logits_of(out, tokens) - ours).abs().max() < 1e-6
    given = [("model.from", str(out), "here"), ("train.steps", "1", "here"), ("data.seq_len", "32", "here")]
    assert resolve(None, given).config.model.head_dim == 48


def test_what_transformers_refuses_is_no_export(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = write_shape
    for changed, words in [
        ({"num_attention_heads": 5}, "cannot open this export"),
        ({"hidden_size": 66}, "expects lm_head.weight of shape"),
    ]:
        monkeypatch.setattr(
            export, "write_shape", lambda *given, changed=changed: write(*given) | {"model_type": "llama"} | changed
        )
        with pytest.raises(ModelError, match=words) as error:
            export_run(runs, "uneven", step=None, out=tmp_path / "out")
        assert f"transformers {transformers.__version__}" in str(error.value)
        assert [*tmp_path.iterdir()] == []
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    export_run(runs, "uneven", step=None, out=tmp_path / "out", console=Console())
    assert "transformers is not installed" in capsys.readouterr().out
