"""Data that cannot be read while a run trains: the same losses in every layout and after a resume, and a ledger that says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.config.data_options import BlendSource, Data
from shoal.config.options import Config
from shoal.data.dataset import prepare_dataset
from shoal.data.order.audit import Audit, audit, describe
from shoal.errors import DataError
from shoal.mesh.mesh import Mesh
from shoal.run.folder import RunFolder
from shoal.run.records import read_metrics
from shoal.training.loop import take_steps
from shoal.training.run import Run
from tests.parallel.layouts import ALONE, NeverStop, config_of, mesh_for
from tests.training.faulty import events, planned
from tests.world import World

OPTIONS: dict[str, Any] = {
    "train__steps": 6,
    "train__repro": "bitwise",
    "train__eval_every": 0,
    "optim__schedule": "constant",
    "checkpoint__every": 3,
    "checkpoint__background": False,
    "data__max_quarantined": 100,
}
DATA = Data(
    sources={name: BlendSource(corpus="dummy", dummy_documents=count, weight=1.0) for name, count in (("a", 60), ("b", 61))},
    tokenizer="bytes", seq_len=48, document_mask=True, shard_tokens=1024,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with prepared tokens of a blend, two shards of its second source altered by a bit, and an intact copy."""
    folder = tmp_path_factory.mktemp("tokens") / "altered"
    dataset = prepare_dataset(data_in(folder))
    shutil.copytree(folder, folder.with_name("intact"))
    for number in (3, 7, 11, 15):
        alter(dataset.parts["b"].folder / f"train-{number:05}.safetensors")
    return folder


def data_in(folder: Path) -> Data:
    return Data(**{**DATA.__dict__, "folder": str(folder)})


def alter(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)


def config_for(runs: Path, tokens: Path, name: str, **options: Any) -> Config:
    config = config_of(runs, name, **{k: v for k, v in (OPTIONS | options).items() if not k.startswith("data__")})
    own = {k.removeprefix("data__"): v for k, v in (OPTIONS | options).items() if k.startswith("data__")}
    return Config(**{**config.__dict__, "data": Data(**{**data_in(tokens).__dict__, **own})})


def steps(mesh: Mesh, config: Config, faults: list[dict[str, Any]], other: Path | None = None) -> dict[int, int]:
    """Take the steps of a run, without its end; return the rows replaced. other: the folder of the last rank's tokens."""
    if other is not None and mesh.place.rank == mesh.world_size - 1:
        config = config.replace("data", folder=str(other))
    with planned(faults):
        run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
        try:
            take_steps(run)
            assert run.state.step == run.total_steps
            return dict(run.state.quarantined)
        finally:
            run.close()


def losses(config: Config) -> dict[int, float]:
    return {record.step: record.loss for record in read_metrics(RunFolder.of(config).metrics_file).steps}


def proof(config: Config) -> Audit:
    found = audit(RunFolder.of(config).ledger_file)
    assert found.passed, found.problems
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Config:
    """Return the config of a run that one process has trained."""
    config = config_for(tmp_path_factory.mktemp("alone"), tokens, "alone")
    steps(ALONE, config, [])
    return config


def test_two_processes_replace_the_same_rows_also_after_a_resume(
    world: Callable[[int], World], tmp_path: Path, tokens: Path, alone: Config
) -> None:
    pair = config_for(tmp_path, tokens, "pair")
    one, other = world(2).run(steps, pair, [])
    assert one == other
    assert losses(pair) == losses(alone)
    found = proof(pair)
    assert found.quarantined == proof(alone).quarantined
    assert set(found.quarantined) == {"b"}
    assert len(found.quarantined["b"]) == len(one) == sum(e.replaced for e in found.sources["b"].values()) >= 3
    row, instead = found.quarantined["b"][0]
    assert f"quarantined: row {row} of b, replaced by row {instead}" in describe(found)
    lines = events(pair, "quarantined")
    assert {(line["source"], line["row"], line["substitute"]) for line in lines} == {
        ("b", *each) for each in found.quarantined["b"]
    }
    assert all(".safetensors was altered" in line["why"] for line in lines)
    # back to step 3, in one process; the checkpoint has the rows replaced so far
    (RunFolder.of(pair).checkpoints / "latest").unlink(missing_ok=True)
    assert steps(ALONE, pair, []) == one
    assert losses(pair) == losses(alone)
    again = proof(pair)
    assert (again.lives, again.taken_again, again.quarantined) == (2, 3, found.quarantined)
    assert len(events(pair, "quarantined")) > len(lines)  # those of steps 4 to 6 were found again


def test_a_budget_of_all_ranks_together(
    world: Callable[[int], World], tmp_path: Path, tokens: Path, alone: Config
) -> None:
    first, *rest = [line["step"] for line in events(alone, "quarantined")]
    budget = sum(step == first for step in (first, *rest))  # enough for the first step that has any
    config = config_for(tmp_path, tokens, "pair", data__max_quarantined=budget)
    over = next(step for step in rest if step > first)
    said = world(2).run(refused, config)
    assert said[0] == said[1]
    assert f"more than {budget} row" in said[0]
    assert ".safetensors was altered" in said[0]
    assert "`shoal prepare RECIPE --data.rebuild true`" in said[0]
    assert [record.step for record in read_metrics(RunFolder.of(config).metrics_file).steps] == list(range(1, over))
    assert proof(config).steps == over - 1
    assert "was altered" in refused(ALONE, config.replace("data", max_quarantined=0))  # the first one
    more = config.replace("data", max_quarantined=100)
    steps(ALONE, more, [])  # resumes
    assert losses(more) == losses(alone)
    proof(more)


def refused(mesh: Mesh, config: Config) -> str:
    with pytest.raises(DataError) as caught:
        steps(mesh, config, [])
    return str(caught.value)


def test_ranks_that_share_rows_but_not_disks_go_back(
    world: Callable[[int], World], tmp_path: Path, tokens: Path
) -> None:
    """Only the second tensor-parallel rank has the altered shard, so the two trained a step on different rows."""
    altered = tmp_path / "altered"
    shutil.copytree(tokens.with_name("intact"), altered)
    for path in altered.glob("dummy-*/train-00003.safetensors"):
        alter(path)
    config = config_for(tmp_path, tokens.with_name("intact"), "tp", parallel__tp=2, train__repro="fast", train__steps=3)
    one, other = world(2).run(steps, config, [], altered)
    assert one == other
    assert one
    went = events(config, "went back")
    assert len(went) == len(one)
    assert all("could be read on some ranks only" in line["why"] for line in went)
    assert sum(map(len, proof(config).quarantined.values())) == len(one)


def test_a_reading_thread_that_fails_or_hangs_is_replaced(
    world: Callable[[int], World], tmp_path: Path, tokens: Path, alone: Config
) -> None:
    config = config_for(tmp_path, tokens, "pair", data__stuck_seconds=1.0)
    faults = [
        {"step": 1, "phase": "read", "rank": 1, "fault": "exception"},
        {"step": 2, "phase": "read", "rank": 0, "fault": "hang"},
    ]
    world(2).run(steps, config, faults)
    assert losses(config) == losses(alone)
    found = proof(config)
    assert (found.lives, found.taken_again, found.quarantined) == (1, 0, proof(alone).quarantined)
    why = {line["rank"]: line["why"] for line in events(config, "loader restarted")}
    assert why[1] == "PlannedError: a planned fault"
    assert why[0].startswith("no step was read for ")
