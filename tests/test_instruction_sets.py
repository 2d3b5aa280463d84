"""
The same checks in fresh interpreters, with this machine's instruction sets and with those of an AVX2 CPU. Each check asserts
which instruction sets are used.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from shoal.parallel.recompute import CACHE, separate_cache
from tests.cli.commands import Place, clean_environment

ROOT = Path(__file__).parents[1]
CPU = "--train.device=cpu"  # train on the CPU, also on a machine with a GPU
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
INFO = Path("/proc/cpuinfo")
SLOW = "no bfloat16 instructions"
CAPABILITY = torch.backends.cpu.get_cpu_capability()
KINDS = pytest.mark.parametrize(
    ("told", "capability"),
    [
        pytest.param(
            {}, CAPABILITY, id="native",
            marks=[pytest.mark.ci, pytest.mark.skipif(CAPABILITY == "AVX2", reason="this CPU's instructions are those of AVX2")],
        ),
        pytest.param(
            AVX2, "AVX2", id="AVX2",
            marks=pytest.mark.skipif(not CAPABILITY.startswith("AVX"), reason="only a CPU with AVX2 can play one"),
        ),
    ],
)  # fmt: skip

ASK = """
import json, torch
from shoal.system.cpu import multiplies_bfloat16
from shoal.mesh.place import Place
from shoal.metrics.machine import instruction_sets
from shoal.mesh.mesh import Mesh
from shoal.training.finish_config import describe_slow_bfloat16, choose_dtype
cpu = torch.device("cpu")
print(json.dumps({
    "capability": torch.backends.cpu.get_cpu_capability(), "sets": instruction_sets(), "quick": multiplies_bfloat16(),
    "torch": getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: None)(), "auto": choose_dtype("auto", Mesh(Place(), cpu)),
    "slow": describe_slow_bfloat16(cpu),
}))
"""


@KINDS
def test_auto_is_settled_by_the_instructions(told: dict[str, str], capability: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=clean_environment() | told, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["capability"] == capability
    assert found["sets"].split(", ")[0] == capability
    if found["torch"] is not None:  # None in a build without oneDNN
        assert found["torch"] or not found["quick"]  # torch's own check agrees
    assert found["quick"] or found["auto"] == "float32"
    if told:
        assert not found["quick"]
        assert "train.dtype" in found["slow"]
        [times] = re.findall(r"takes (\d+) times as long", found["slow"])
        assert int(times) >= 5  # typically several tens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the quickstart's prepared data."""
    folder = tmp_path_factory.mktemp("quickstart")
    shoal(folder, "prepare", str(ROOT / "recipes" / "quickstart.yaml"))
    return folder


def shoal(folder: Path, *arguments: str, **told: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *arguments],
        cwd=folder, env=clean_environment() | told, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.ci
@KINDS
def test_the_quickstart_begins(told: dict[str, str], capability: str, folder: Path) -> None:
    """The loss falls in the first 20 steps, in the chosen dtype, and the run records the instruction sets."""
    name = capability if told else "native"
    options = (CPU, "--train.steps=20", "--optim.warmup_steps=5", "--train.sample_tokens=1", "--metrics.every=1")
    shoal(folder, "train", str(ROOT / "recipes" / "quickstart.yaml"), "--name", name, *options, **told)
    run = folder / "runs" / name
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1
    assert {r["mfu"] for r in records if "loss" in r} == {None}
    machine = json.loads((run / "events.jsonl").read_text().splitlines()[0])["machine"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert machine["instructions"].split(", ")[0] == capability
    assert machine["threads"] == config["launch"]["threads"]
    assert config["train"]["dtype"] in ({"float32"} if told else {"float32", "bfloat16"})


@pytest.mark.ci
@KINDS
def test_speed_is_measured(told: dict[str, str], capability: str, folder: Path) -> None:
    """A step is slower than the matrix products in it; no MFU, since the peak is unknown."""
    recipe = str(ROOT / "recipes" / "quickstart.yaml")
    options = (CPU, "--repeats=1", "--train.steps=6", "--optim.warmup_steps=0", "--json")
    found = json.loads(shoal(folder, "bench", "speed", recipe, *options, **told))
    said = re.search(r"^cpu features +(.*)$", shoal(folder, "env", **told), re.MULTILINE)
    assert said
    assert said[1].split(", ")[0] == capability  # under the same variables
    assert found["instructions"].split(", ")[0] == capability
    assert found["recipe"]["model"].startswith("llama")
    [ours] = found["rows"]
    assert "mfu" not in ours["figures"]
    assert 0 < ours["figures"]["of_product"][0] < ours["figures"]["of_product_full"][0]


@pytest.mark.ci
@KINDS
def test_bfloat16_trains_where_it_is_slow_and_that_is_said_once(
    told: dict[str, str], capability: str, tmp_path: Path
) -> None:
    """The first loss equals float32's up to rounding; /proc/cpuinfo lists whether this CPU has the instructions."""
    place = Place(tmp_path)
    first = {}
    for dtype in ("float32", "bfloat16"):
        options = (CPU, f"--train.dtype={dtype}", "--train.steps=3", "--processes=1")
        output = place.good("train", "recipe.yaml", "--name", dtype, *options, **told)
        losses = [loss for _, loss, _ in place.losses(dtype)]
        assert len(losses) == 3
        assert all(map(math.isfinite, losses))
        first[dtype] = losses[0]
        assert place.event_lines(dtype)[0]["machine"]["instructions"].split(", ")[0] == capability
        if dtype == "float32":
            assert SLOW not in output
        elif told:
            assert output.count(SLOW) == 1
        elif INFO.is_file():
            natively = re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", INFO.read_text())
            assert output.count(SLOW) == (0 if natively else 1)
    # bfloat16 has 8 significant bits: each rounding is up to 1/256, and averages out over 512 tokens
    assert first["bfloat16"] == pytest.approx(first["float32"], rel=1 / 256)


COMPILED = """
import torch
from torch import nn
from shoal.parallel.recompute import compile_forward
class Widens(nn.Module):
    def forward(self, x):
        return x.float() * 2
module, x = Widens(), torch.arange(2304).bfloat16()
compile_forward(module, whole=True, bitwise=False, again=True)
assert torch.equal(module(x), x.float() * 2)
print(torch.backends.cpu.get_cpu_capability())
"""


def test_the_compilers_cache_is_of_this_kind_of_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    separate_cache()
    separate_cache()  # a run calls it once for each compiled module
    found = Path(os.environ[CACHE])
    assert found.parent == tmp_path
    assert found.name.split("-")[0] == CAPABILITY


@pytest.mark.slow
def test_compiled_code_is_not_taken_from_another_kind_of_cpu(tmp_path: Path) -> None:
    if not CAPABILITY.startswith("AVX512"):
        pytest.skip("needs vectors of two widths")
    for told, capability in (({}, CAPABILITY), (AVX2, "AVX2")):
        environment = clean_environment() | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)} | told
        done = subprocess.run(
            [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout.strip()) == (0, capability), done.stderr
    assert len([folder for folder in tmp_path.iterdir() if folder.is_dir()]) == 2
