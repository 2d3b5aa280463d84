"""The benchmark beside peers: its workers read the spec, write the answer, and train the same model as shoal."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from scripts.peers import transformers_llama, with_accelerate, with_torch, with_trainer
from scripts.peers.contract import Recorder, Spec
from scripts.peers.inputs import prepare, recipe_of
from scripts.peers.page import Bench, Found, Spread, write_page
from scripts.peers.timings import PRODUCTS, SHOAL, TWO_PROCESSES, Case, Timing, take, turns

from shoal.config.options import Config
from shoal.mesh.mesh import open_mesh
from shoal.plan.estimate import parameter_count
from shoal.run.records import read_metrics
from shoal.system.signals import StopRequest
from shoal.training.loop import take_steps
from shoal.training.run import Run

ROOT = Path(__file__).parents[2]
TINY = {
    "model.dim": "32", "model.num_layers": "2", "model.num_heads": "2", "model.ffn_dim": "64", "model.max_seq_len": "32",
    "data.corpus": "dummy", "data.seq_len": "32", "train.steps": "4", "train.global_batch": "4", "train.micro_batch": "4",
    "train.dtype": "float32", "launch.processes": "1", "launch.threads": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return recipe_of("10m", tmp_path_factory.mktemp("peers"), TINY)


@pytest.fixture(scope="module")
def spec(config: Config) -> Spec:
    return prepare(config, Path(config.launch.runs).parent)


@pytest.fixture(scope="module")
def losses(config: Config) -> list[float]:
    """Shoal's losses."""
    with open_mesh("cpu", 60, config.parallel) as mesh:
        run = Run.open(config, mesh, StopRequest())
        take_steps(run)
        found = [record.loss for record in read_metrics(run.folder.metrics_file).steps]
        run.close()
    return found


def test_a_worker_answers_as_the_contract_says(spec: Spec, config: Config, tmp_path: Path) -> None:
    spec.write(tmp_path / "spec.json")
    command = [
        sys.executable,
        "-m",
        "scripts.peers.with_torch",
        str(tmp_path / "spec.json"),
        str(tmp_path / "answer.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert answer["parameters"] == parameter_count(config.model)
    assert len(answer["seconds"]) == len(answer["losses"]) == spec.steps
    assert answer["losses"][0] == pytest.approx(math.log(spec.vocab_size), rel=0.02)
    assert answer["memory_bytes"] > 0
    assert answer["versions"]["torch"]


@pytest.mark.parametrize("worker", [with_torch, with_accelerate, with_trainer], ids=lambda worker: worker.__name__)
def test_a_peer_does_the_same_work_as_shoal(worker: object, spec: Spec, losses: list[float]) -> None:
    recorder = Recorder()
    worker.train(spec, recorder)  # type: ignore[attr-defined]
    assert recorder.losses == pytest.approx(losses, abs=2e-5)


def test_the_head_is_tied_where_the_spec_says_so(config: Config, tmp_path: Path) -> None:
    tied = prepare(config.replace("model", tie_embeddings=True), tmp_path)
    counts = {
        sum(p.numel() for p in build(tied).parameters()) for build in (with_torch.model_of, transformers_llama.llama)
    }
    assert counts == {parameter_count(config.model) - tied.vocab_size * tied.dim}


@pytest.mark.ci
def test_contenders_take_their_steps_in_turns(config: Config, spec: Spec, losses: list[float], tmp_path: Path) -> None:
    halves = config.replace("launch", processes=2).replace("train", micro_batch=config.train.global_batch // 2)
    [turn] = turns([Case("10m", "float32", spec, Path(spec.tokens).parent, config, halves)], [], repeats=1)
    (tmp_path / "litgpt" / "bin").mkdir(parents=True)
    (tmp_path / "litgpt" / "bin" / "python").symlink_to(sys.executable)  # outside an environment: it has no litgpt
    products, alone, two, broken = take(dataclasses.replace(turn, contenders=(*turn.contenders, "litgpt")), tmp_path)
    assert "No module named" in broken.error
    assert products.error == alone.error == two.error == ""
    assert len(products.answer["seconds"]) == spec.steps
    for shoal in (alone, two):
        assert len(shoal.answer["seconds"]) == spec.steps
        assert shoal.answer["losses"] == pytest.approx(losses, abs=2e-5)


SECONDS = {SHOAL: 2.0, TWO_PROCESSES: 1.0, "trainer": 3.0, "torch": 2.5, "litgpt": 1.5}


def bench_of(config: Config, spec: Spec, folder: Path, others: float = 0.0) -> Bench:
    """
    Return a benchmark of three rounds on a machine that is twice as slow in the second and three times in the third.

    others: share of the cores that other programs used.
    """
    case = Case("10m", "float32", spec, folder, config, config)
    planned = turns([case], ["trainer", "litgpt", "torch"], repeats=3)
    timings = []
    for turn in planned:
        for name in turn.contenders:
            losses = [5.5, 5.0, 4.5, 4.2 + 0.1 * (name == "litgpt")]
            answer = {"losses": losses, "parameters": 37_088, "memory_bytes": 2**30, "versions": {"torch": "2"}}
            answer |= {"seconds": [9.0, 9.0] + [SECONDS.get(name, 0.0) * (1 + turn.repeat)] * 2}
            if name == PRODUCTS:
                answer |= {"seconds": [1.5 * (1 + turn.repeat)] * 4, "product_flops": 10**9}
            timings.append(Timing(turn.key(), "10m", "float32", turn.repeat, name, others, answer))
    return Bench("command", planned, timings, {"fabric": "no matching distribution"})


def test_ratios_are_those_of_neighboring_steps(config: Config, spec: Spec, tmp_path: Path) -> None:
    bench = bench_of(config, spec, tmp_path)
    assert all(SHOAL in turn.contenders for turn in bench.planned)
    found = Found(bench, bench.cases[0])
    assert found.ratio("trainer") == Spread(1.5, 1.5, 1.5)
    assert found.ratio(SHOAL, TWO_PROCESSES) == Spread(2.0, 2.0, 2.0)
    speed = found.speed("torch")  # 1, 1/2 and 1/3 of the fastest, each twice
    assert speed.upper / speed.lower == pytest.approx(0.875 / 0.375)
    assert found.same_work("trainer") == []
    assert found.same_work("litgpt") == ["loss differs by up to 1.0e-01"]


def test_the_page_says_what_is_not_reached(config: Config, spec: Spec, tmp_path: Path) -> None:
    write_page(bench_of(config, spec, tmp_path), tmp_path)
    page = (tmp_path / "peers.md").read_text(encoding="utf-8")
    assert "10M, float32: not slower than any peer | 0.75 x litgpt | **no** |" in page
    assert "lightning-fabric | does not install: `no matching distribution`" in page
    assert (tmp_path / "peers-loss.svg").is_file()
    assert (tmp_path / "peers-speed.svg").is_file()


def test_a_disturbed_benchmark_decides_nothing(config: Config, spec: Spec, tmp_path: Path) -> None:
    write_page(bench_of(config, spec, tmp_path, others=0.4), tmp_path)
    page = (tmp_path / "peers.md").read_text(encoding="utf-8")
    assert "not slower than any peer | 0.75 x litgpt | undecided |" in page
    assert "| yes |\n" not in page.split("## The same work")[0]


def test_a_turn_is_known_again_until_what_it_depends_on_changes(config: Config, spec: Spec, tmp_path: Path) -> None:
    [first, *_], [again, *_] = (bench_of(config, spec, folder).planned for folder in (tmp_path, tmp_path / "other"))
    longer = bench_of(config, dataclasses.replace(spec, steps=9), tmp_path).planned[0]
    assert first.key() == again.key() != longer.key()
