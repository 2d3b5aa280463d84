"""The Python interface: `from shoal import Config, generate, load, read_config, train`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import shoal
from shoal.config.data_options import Data
from shoal.config.options import Model, Train
from shoal.config.run_options import Launch
from shoal.errors import ConfigError, GenerateError, LaunchError, ModelError, RunError, ShoalError
from tests.cli.commands import Place, clean_environment

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "first_run.ipynb"
TRAIN = """
import signal
from shoal import Config, read_config, train
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
options = {"name": "python", "processes": 1, "steps": 6, "train.eval_every": 0}
config = read_config("recipe.yaml", **options)
assert isinstance(config, Config)
stopped = train(config.replace("launch", time_limit_minutes=1e-9))
done = train(config)
assert stopped.folder == done.folder
assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
print(stopped.finished, done.finished, done.folder)
"""


def interpreter(folder: Path, code: str) -> str:
    """Run `code` in a fresh interpreter; return the last line it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=clean_environment(), capture_output=True, text=True, timeout=250,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1] if done.stdout else ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a folder with a run trained from Python: stopped after its first step, then resumed."""
    place = Place(tmp_path_factory.mktemp("python"))
    assert interpreter(place.folder, TRAIN) == "False True runs/python"
    return place


def test_importing_shoal_imports_next_to_nothing(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import shoal; print(*(set(sys.modules) - before))"
    imported = set(interpreter(tmp_path, code).split())
    assert {m for m in imported if m.partition(".")[0] not in sys.stdlib_module_names} == {"shoal"}
    assert len(imported) <= 40  # `typing` and its imports


def test_reading_a_config_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, shoal; shoal.read_config('quickstart', steps=2); print('torch' in sys.modules)"
    assert interpreter(tmp_path, code) == "False"


def test_every_public_name_is_there() -> None:
    assert shoal.Config is type(shoal.Config())
    assert all(callable(getattr(shoal, name)) and name in dir(shoal) for name in shoal.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = shoal.nothing


def test_options_are_named_as_flags_are(trained: Place) -> None:
    recipe = trained.folder / "recipe.yaml"
    config = shoal.read_config(recipe, lr=0.5, name="7", **{"data.paths": (trained.folder,), "data.corpus": "text"})
    assert (config.optim.lr, config.launch.name, config.data.paths) == (0.5, "7", (str(trained.folder),))
    assert shoal.read_config(recipe).launch.name == "recipe"
    assert shoal.read_config().launch.name is None
    with pytest.raises(ConfigError) as raised:
        shoal.read_config(recipe, steps="many", block_size=3, color="red")
    assert sorted(p.where for p in raised.value.problems) == ["block_size", "color", "steps"]


def test_a_run_is_the_one_that_the_command_trains(trained: Place) -> None:
    trained.good("train", "recipe.yaml", "--name", "command", "--processes", "1", "--steps", "6", "--eval_every", "0")
    assert trained.losses("python") == trained.losses("command")
    files = [trained.folder / "runs" / n / "checkpoints/step-00000006/shard-00000.safetensors" for n in ("python", "command")]  # fmt: skip
    assert files[0].read_bytes() == files[1].read_bytes()


def test_load_opens_runs_checkpoints_and_folders(trained: Place) -> None:
    run = trained.folder / "runs" / "python"
    trained.good("export", "python", "--out", "exported")
    paths = (run, str(run), run / "checkpoints" / "step-00000006", trained.folder / "exported")
    models = [shoal.load(path, device="cpu") for path in paths]
    texts = {shoal.generate(model, "ab", max_new_tokens=20, seed=3) for model in models}
    assert len(texts) == 1
    greedy = shoal.generate(models[0], "ab", max_new_tokens=8, temperature=0)
    assert trained.good("generate", "python", "--prompt", "ab", "--tokens", "8", "--temperature", "0").endswith(
        f"ab{greedy}\n"
    )
    assert shoal.generate(models[0], "ab", max_new_tokens=0) == ""
    for prompt, top_p in (("", None), ("ab", 2.0), ("x" * 80, None), ("\ud800", None)):
        with pytest.raises(GenerateError):
            shoal.generate(models[0], prompt, top_p=top_p)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        shoal.load(tmp_path / "nowhere")
    (tmp_path / "empty" / "config.yaml").parent.mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("")
    with pytest.raises(ShoalError):
        shoal.load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        (lambda c: c.replace("launch", processes=2), LaunchError, "launch.processes"),
        (lambda c: c.replace("launch", nodes=2, rendezvous="a:1"), LaunchError, "launch.nodes"),
        (lambda c: c.replace("train", steps=None), ConfigError, "train.steps"),
        (lambda c: c.replace("model", num_kv_heads=3), ConfigError, "model.num_kv_heads"),
        (lambda c: c.replace("model", dim=64), RunError, "model.dim"),
    ],
)  # fmt: skip
def test_train_rejects(
    trained: Place,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Callable[[shoal.Config], shoal.Config],
    error: type[ShoalError],
    named: str,
) -> None:
    monkeypatch.chdir(trained.folder)
    with pytest.raises(error, match=named):
        shoal.train(wrong(shoal.read_config("recipe.yaml", name="python", processes=1)))


def test_a_config_made_by_hand_is_checked_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = shoal.Config(
        model=Model(dim=32, num_layers=1, num_heads=2, max_seq_len=64),
        data=Data(corpus="dummy", dummy_documents=60, tokenizer="bytes", seq_len=32),
        train=Train(steps=1, global_batch=2, micro_batch=2, device="cpu"),
        launch=Launch(threads=1),
    )
    assert shoal.train(config).finished


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its cells run in order in one fresh interpreter, which needs no Jupyter kernel."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    interpreter(tmp_path, "\n".join("".join(cell["source"]) for cell in cells))
    assert (tmp_path / "runs" / "first-run" / "config.yaml").is_file()
