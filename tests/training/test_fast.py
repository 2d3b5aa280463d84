"""In-memory checkpoints: steps lost when a worker dies, damaged checkpoints, and files left behind."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.checkpoint.memory_folder import GENERATIONS_FILE, folder_in_memory
from shoal.checkpoint.saved import listed
from shoal.checkpoint.store import CheckpointStore
from shoal.config.options import Config
from shoal.errors import RunError
from shoal.fault.inject import PLAN
from shoal.mesh.mesh import Mesh
from shoal.training.loop import complete, take_steps
from shoal.training.run import Run
from tests.cli.commands import Place
from tests.disks import small_disk
from tests.parallel.layouts import ALONE, NeverStop, config_of, mesh_for
from tests.training.faulty import events
from tests.world import World

OPTIONS = {"train__steps": 7, "train__eval_every": 0, "checkpoint__every": 4, "fault__check_replicas_every": 0}


def fast_of(config: Config) -> Path:
    assert config.checkpoint.fast is not None
    return folder_in_memory(config.checkpoint.fast, Path(config.launch.runs) / str(config.launch.name))


def config_in(folder: Path, name: str, **options: Any) -> Config:
    return config_of(folder, name, checkpoint__fast=str(folder / "fast"), **OPTIONS | options)


@contextlib.contextmanager
def opened(config: Config, mesh: Mesh = ALONE) -> Iterator[Run]:
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    try:
        yield run
    finally:
        run.close()


def cut_short(config: Config, mesh: Mesh = ALONE) -> None:
    """Take all steps of a run and wait for its saves, without the final save and report."""
    with opened(config, mesh) as run:
        take_steps(run)
        run.saving.wait_for_all(run.state.step)


def damaged(folder: Path, step: int) -> None:
    [file] = (folder / f"step-{step:08d}").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(("device", "prepared"), [("cuda", ["checkpoints"]), ("cpu", [])])
def test_on_a_gpu_memory_for_saves_on_disk_is_asked_for_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, prepared: list[str]
) -> None:
    """Memory of the fast tier is not allocated up front: its free space is checked at its first save."""
    asked: list[tuple[str, bool]] = []
    with opened(config_in(tmp_path, "prepared")) as run:
        monkeypatch.setattr(
            CheckpointStore,
            "prepare",
            lambda store, parts: asked.append((store.folder.name, list(parts) == list(run.state.tensors()))),
        )
        monkeypatch.setattr(run.saving, "mesh", Mesh(ALONE.place, torch.device(device)))
        run.saving.prepare(run.state)
    assert asked == [(name, True) for name in prepared]


@pytest.mark.parametrize("phase", [pytest.param("data", marks=pytest.mark.ci), "optimizer"])
def test_a_killed_worker_takes_one_step_with_it_at_most(tmp_path: Path, phase: str) -> None:
    place, died = Place(tmp_path), 12
    plan = json.dumps([{"step": died, "phase": phase, "rank": 1, "fault": "kill"}])
    fast = [
        f"--checkpoint.fast={tmp_path / 'fast'}",
        "--checkpoint.every=0",
        "--train.eval_every=0",
        "--train.steps=16",
    ]
    code, output = place.run("train", "recipe.yaml", "--name", "killed", *fast, **{PLAN: plan})
    assert code == 0, output
    crashed, started = ([e for e in place.event_lines("killed") if e["event"] == k] for k in ("crashed", "started"))
    assert crashed[0]["step"] == died
    taken = died - 1  # steps completed when it died
    assert taken - started[1]["step"] <= 1
    assert f"resumed from {tmp_path / 'fast'}" in output
    lost = json.loads(place.good("goodput", "killed", "--json"))
    assert lost["lives"] == 2
    assert not (tmp_path / "fast").exists()
    assert listed(tmp_path / "runs" / "killed" / "checkpoints")[-1].step == 16


def test_what_is_damaged_is_passed_over_for_the_next_older_fast_or_lasting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path, "damaged")
    cut_short(config)
    assert [s.step for s in listed(fast_of(config))] == [5, 6]
    for step, found, where in ((6, 5, fast_of(config)), (5, 4, tmp_path / "runs" / "damaged" / "checkpoints")):
        damaged(fast_of(config), step)
        capsys.readouterr()
        with opened(config) as run:
            assert run.state.step == found
            assert run.start.restored is not None
            assert run.start.restored.folder.parent == where
        assert f"{step:08d}/shard-00000.safetensors was altered" in capsys.readouterr().out
    assert len(events(config, "damaged")) == 2
    with opened(config) as run:
        complete(run)
    assert not (tmp_path / "fast").exists()  # including the damaged checkpoint


def test_one_that_lasts_is_taken_where_the_memory_of_the_machine_is_gone(tmp_path: Path) -> None:
    config = config_in(tmp_path, "gone")
    cut_short(config)
    for path in sorted(fast_of(config).glob("**/*"), reverse=True):
        path.unlink() if path.is_file() or path.is_symlink() else path.rmdir()
    with opened(config) as run:
        assert run.state.step == 4


def test_a_new_run_of_the_same_name_does_not_go_on_from_the_old_ones(tmp_path: Path) -> None:
    config = config_in(tmp_path, "again")
    cut_short(config)
    (tmp_path / "runs" / "again").rename(tmp_path / "runs" / "before")
    with opened(config) as run:
        assert run.state.step == 0
    elsewhere = config.replace("launch", runs=str(tmp_path / "other"))
    assert fast_of(elsewhere) != fast_of(config)


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "small", "2m") as folder:
        yield folder


def test_a_machine_without_room_says_so_once_and_trains_on(
    tmp_path: Path, small_memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path, "small").replace("checkpoint", fast=str(small_memory / "fast"))
    with opened(config) as run:
        complete(run)
    [event] = events(config, "no fast place")
    assert event["step"] == 1
    assert "has room for" in event["why"]
    assert capsys.readouterr().out.count("checkpoint.fast is not used") == 1
    assert listed(run.folder.checkpoints)[-1].step == 7
    assert not list(small_memory.iterdir())


def apart(config: Config, rank: int) -> Config:
    """Return `config` with a fast folder of this rank alone, as on a node of its own."""
    return config.replace("checkpoint", fast=f"{config.checkpoint.fast}-{rank}")


def cut_short_apart(mesh: Mesh, config: Config) -> None:
    cut_short(apart(config, mesh.place.rank), mesh)


def resumed(config: Config, mesh: Mesh = ALONE) -> tuple[int, bool]:
    """Return the step from which a run resumes, and whether from its own memory."""
    with opened(config, mesh) as run:
        found = run.saving.find()
        assert found is not None
        assert found.step == run.state.step
        return run.state.step, found.folder.parent == fast_of(config)


def resumed_apart(mesh: Mesh, config: Config) -> tuple[int, bool]:
    return resumed(apart(config, mesh.place.rank), mesh)


@pytest.mark.parametrize(("layout", "alone"), [({}, (6, True)), ({"parallel__dp_shard": 2}, (4, False))])
def test_each_machine_has_memory_of_its_own(
    world: Callable[[int], World], tmp_path: Path, layout: dict[str, int], alone: tuple[int, bool]
) -> None:
    """Replicas survive the loss of a node; shards resume from memory in the same layout, else from disk."""
    config = config_in(tmp_path, "apart", **layout)
    world(2).run(cut_short_apart, config)
    assert world(2).run(resumed_apart, config) == [(6, True)] * 2
    smaller = config.replace("parallel", dp_shard=1)
    assert resumed(apart(smaller, 0)) == alone  # the other node is lost
    with opened(apart(smaller, 0)) as run:
        complete(run)
    assert [p.name for p in tmp_path.glob("fast*")] == ["fast-1"]  # the folder of the lost node


def test_what_one_machine_still_has_is_for_all_where_another_takes_the_place_of_the_lost_one(
    world: Callable[[int], World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path, "replaced")
    world(2).run(cut_short_apart, config)
    shutil.rmtree(fast_of(apart(config, 0)))
    assert world(2).run(resumed_apart, config) == [(6, False)] * 2
    assert [s.step for s in listed(tmp_path / "runs" / "replaced" / "checkpoints")] == [4, 6]
    [event] = events(config, "lent")
    assert event["step"] == 6
    damaged(fast_of(apart(config, 1)), 6)  # no longer needed, and not read
    assert world(2).run(resumed_apart, config) == [(6, False)] * 2


def test_what_one_machine_still_has_is_not_lost_where_another_cannot_write(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    config = config_in(tmp_path, "barred")
    world(2).run(cut_short_apart, config)
    shutil.rmtree(fast_of(apart(config, 0)).parent)
    fast_of(apart(config, 0)).parent.touch()
    assert world(2).run(resumed_apart, config) == [(6, False)] * 2
    [event] = events(config, "no fast place")
    assert "cannot be written" in event["why"]


def on_one_alone(mesh: Mesh, config: Config) -> str:
    own = config if mesh.is_first else config.replace("checkpoint", fast=None)
    with pytest.raises(RunError) as caught, opened(own, mesh):
        pass
    return str(caught.value)


def test_a_place_on_some_machines_alone_is_refused(world: Callable[[int], World], tmp_path: Path) -> None:
    for said in world(2).run(on_one_alone, config_in(tmp_path, "some")):
        assert "checkpoint.fast is set on rank 0 and not on rank 1" in said


def test_what_a_machine_that_was_away_has_of_another_history_is_not_taken(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    """Checkpoints of an earlier run of that name, and of steps that were repeated, are not used."""
    config = config_in(tmp_path, "again")
    world(2).run(cut_short_apart, config)
    shutil.rmtree(tmp_path / "runs" / "again")
    cut_short(apart(config, 0))
    assert [s.step for s in listed(fast_of(apart(config, 1)))] == [5, 6]
    assert resumed(apart(config, 1)) == (4, False)

    longer = config.replace("train", steps=20)
    world(2).run(cut_short_apart, longer)
    assert [s.step for s in listed(fast_of(apart(longer, 1)))] == [18, 19]
    with opened(longer.replace("checkpoint", fast=None)) as run:
        assert run.state.step == 16
    assert resumed(apart(longer, 1)) == (16, False)


def finished_apart(mesh: Mesh, config: Config) -> int:
    with opened(apart(config, mesh.place.rank), mesh) as run:
        complete(run)
        return run.state.step


def test_nothing_is_left_in_the_memory_of_any_machine(world: Callable[[int], World], tmp_path: Path) -> None:
    assert world(2).run(finished_apart, config_in(tmp_path, "done", train__steps=4)) == [4, 4]
    assert not list(tmp_path.glob("fast*"))


def test_memory_that_nobody_could_tell_from_anothers_is_done_without(tmp_path: Path) -> None:
    config = config_in(tmp_path, "mute", train__steps=4)
    (tmp_path / "runs" / "mute" / "checkpoints" / GENERATIONS_FILE).mkdir(parents=True)  # nothing can be written there
    with opened(config) as run:
        complete(run)
    [event] = events(config, "no fast place")
    assert event["why"].endswith("checkpoints cannot be written: Is a directory")
    assert not (tmp_path / "fast").exists()


def test_a_place_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "fast").touch()  # a file where the folder should be
    config = config_in(tmp_path, "file", train__steps=4)
    with opened(config) as run:
        complete(run)
    [event] = events(config, "no fast place")
    assert event["why"].endswith("cannot be written: Not a directory")
    assert listed(run.folder.checkpoints)[-1].step == 4
