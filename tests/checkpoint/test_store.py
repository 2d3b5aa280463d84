"""Checkpoints: complete or not there; what was damaged is named; nothing is a pickle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from shoal.checkpoint.store import CheckpointStore, listed, load
from shoal.errors import CheckpointError
from shoal.launch.place import Place
from shoal.parallel.mesh import Mesh
from shoal.parallel.region import Part
from tests.world import World

ALONE = Mesh(Place(), torch.device("cpu"))


def tensors(seed: int = 0, width: int = 37) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"model.{n}.weight": torch.randn(101, width, generator=generator) for n in range(5)}


def parts(tensors: dict[str, torch.Tensor]) -> dict[str, Part]:
    return {name: Part.whole(tensor) for name, tensor in tensors.items()}


def state(step: int, val_loss: float | None = None) -> dict[str, object]:
    return {"step": step, "position": 16 * step, "tokens": 0, "val_loss": val_loss, "data_id": "x"}


def store_in(folder: Path, mesh: Mesh = ALONE, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, mesh, keep=keep, keep_best=True)


def save_and_load(mesh: Mesh, folder: Path) -> tuple[bool, dict[str, object]]:
    store = store_in(folder, mesh)
    saved = store.save(parts(tensors(1)), state(3))
    mine = {name: torch.zeros_like(t) for name, t in tensors(1).items()}
    read = store.load(saved, parts(mine))
    return all(torch.equal(mine[n], t) for n, t in tensors(1).items()), read


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_share_the_writing_and_load_the_same_bits(
    world: Callable[[int], World], size: int, tmp_path: Path
) -> None:
    for equal, read in world(size).run(save_and_load, tmp_path):
        assert equal
        assert (read["step"], read["position"]) == (3, 48)
    alone = {name: torch.zeros_like(t) for name, t in tensors(1).items()}
    load(listed(tmp_path)[0], parts(alone))  # and one process reads what several wrote
    assert all(torch.equal(alone[n], t) for n, t in tensors(1).items())


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path: Path) -> None:
    saved = store_in(tmp_path).save(parts(tensors()), state(1))
    kinds = {p.suffix for p in saved.folder.iterdir()}
    assert kinds == {".safetensors", ".json"}
    found = {}
    for path in saved.folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:  # the library's own reader, not ours
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(torch.equal(found[n], t) for n, t in tensors().items())
    assert (tmp_path / "latest").resolve() == saved.folder


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=2)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)]:
        store.save(parts(tensors()), state(step, loss))
    assert [s.step for s in listed(tmp_path)] == [2, 4, 5]
    assert os.readlink(tmp_path / "latest") == "step-00000005"
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "was cut short"),
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])), "was altered"),
    ],
)
def test_damage_is_named_and_nothing_is_loaded(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    saved = store_in(tmp_path).save(parts(tensors()), state(1))
    damage(next(saved.folder.glob("*.safetensors")))
    mine = {name: torch.zeros_like(t) for name, t in tensors().items()}
    with pytest.raises(CheckpointError, match=words) as caught:
        load(saved, parts(mine))
    assert "safetensors" in str(caught.value)
    assert all(not t.any() for t in mine.values())


def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    saved = store_in(tmp_path).save(parts(tensors()), state(1))
    with pytest.raises(
        CheckpointError, match=r"another model: model.0.weight is \[101, 37\] there and \[101, 38\] here"
    ):
        load(saved, parts(tensors(width=38)))
    with pytest.raises(CheckpointError, match=r"it has no model\.other"):
        load(saved, parts({"model.other": torch.zeros(1)}))


def test_a_save_that_was_cut_short_is_not_listed_and_is_cleared_away(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.save(parts(tensors()), state(1))
    (tmp_path / ".step-00000002.tmp").mkdir()
    (tmp_path / ".step-00000002.tmp" / "part").write_text("x")
    (tmp_path / "step-00000003").mkdir()  # no manifest: never complete
    assert [s.step for s in listed(tmp_path)] == [1]
    store_in(tmp_path)
    assert not list(tmp_path.glob(".step*"))


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/shm").exists(), reason="needs to mount a small disk")
def test_a_full_disk_costs_the_checkpoint_and_not_those_before_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        store = store_in(disk, keep=5)
        store.save(parts(tensors()), state(1))
        with pytest.raises(CheckpointError, match="disk is full"):
            store.save(parts(tensors() | {"model.big": torch.zeros(100, 1000)}), state(2))
        assert [s.step for s in listed(disk)] == [1]
        mine = {name: torch.zeros_like(t) for name, t in tensors().items()}
        load(listed(disk)[0], parts(mine))
        assert torch.equal(mine["model.0.weight"], tensors()["model.0.weight"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.checkpoint.test_store import parts, store_in, tensors, state
store = store_in(Path({folder!r}), keep=3)
store.save(parts(tensors(0)), state(1))
print("ready", flush=True)
step = 2
while True:
    store.save(parts(tensors(step)), state(step))
    step += 1
"""


def test_killed_at_any_moment_every_listed_checkpoint_is_whole(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(root=root, folder=str(tmp_path))], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    seen = 0
    while seen < 4:  # it is in the middle of some save by then; which part differs from run to run
        seen = max((s.step for s in listed(tmp_path)), default=0)
    process.kill()
    process.wait()
    assert listed(tmp_path)
    for saved in listed(tmp_path):
        mine = {name: torch.zeros_like(t) for name, t in tensors().items()}
        load(saved, parts(mine))
        expected = tensors(0 if saved.step == 1 else saved.step)
        assert all(torch.equal(mine[n], t) for n, t in expected.items())
    assert json.loads((tmp_path / "latest" / "state.json").read_text())["step"] <= listed(tmp_path)[-1].step
