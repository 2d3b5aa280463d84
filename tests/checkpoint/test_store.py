"""Checkpoints: complete or absent; damage is named; no file is a pickle."""

from __future__ import annotations

import gc
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open

from shoal.checkpoint import store as store_module
from shoal.checkpoint.restore import load
from shoal.checkpoint.saved import Saved, damage, listed
from shoal.checkpoint.staging import Staging
from shoal.checkpoint.store import CheckpointStore, Keep
from shoal.errors import CheckpointError
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.mesh.region import Part
from tests.disks import small_disk
from tests.rehearsal import DEVICE, Rehearsal
from tests.world import World

ALONE = Mesh(Place(), torch.device("cpu"))


def tensors(seed: int = 0, width: int = 37) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"model.{n}.weight": torch.randn(101, width, generator=generator) for n in range(5)}


def parts(tensors: dict[str, torch.Tensor]) -> dict[str, Part]:
    return {name: Part.whole(tensor) for name, tensor in tensors.items()}


def state(step: int, val_loss: float | None = None) -> dict[str, object]:
    return {"step": step, "position": 16 * step, "tokens": 0, "val_loss": val_loss, "data_id": "x"}


def store_in(folder: Path, mesh: Mesh = ALONE, keep: int = 2, every: int = 0) -> CheckpointStore:
    return CheckpointStore(folder, mesh, keep=Keep(keep, every))


def saved_in(store: CheckpointStore, seed: int = 0, step: int = 1, val_loss: float | None = None) -> Saved:
    outcome = store.save(parts(tensors(seed)), state(step, val_loss))
    assert outcome.ok, outcome.problem
    return next(s for s in listed(store.folder) if s.step == step)


def is_equal(saved: Saved, seed: int) -> bool:
    """Return whether a checkpoint holds exactly `tensors(seed)`."""
    mine = {name: torch.zeros_like(t) for name, t in tensors(seed).items()}
    load(saved, parts(mine))
    return all(torch.equal(mine[n], t) for n, t in tensors(seed).items())


def save_and_load(mesh: Mesh, folder: Path) -> tuple[bool, dict[str, object]]:
    store = store_in(folder, mesh)
    store.save(parts(tensors(1)), state(3))
    saved, problems = store.newest()
    assert saved is not None
    assert not problems
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
    assert is_equal(listed(tmp_path)[0], 1)  # one process reads what several wrote
    written = [p.stat().st_size for p in listed(tmp_path)[0].folder.glob("*.safetensors")]
    assert len(written) == size
    assert max(written) < 2 * sum(written) / size  # all ranks hold the same tensors, and share the writing


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path: Path) -> None:
    saved = saved_in(store_in(tmp_path))
    kinds = {p.suffix for p in saved.folder.iterdir()}
    assert kinds == {".safetensors", ".json"}
    found: dict[str, Any] = {}
    for path in saved.folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:  # the safetensors library's reader, not shoal's
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert all(torch.equal(found[n], t) for n, t in tensors().items())
    assert (tmp_path / "latest").resolve() == saved.folder


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=2)
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)]:
        saved_in(store, step=step, val_loss=loss)
    assert [s.step for s in listed(tmp_path)] == [2, 4, 5]
    assert os.readlink(tmp_path / "latest") == "step-00000005"
    assert not list(tmp_path.glob(".step*"))


def test_those_of_every_so_many_steps_are_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=1, every=3)
    for step in range(1, 9):
        saved_in(store, step=step)
    assert [s.step for s in listed(tmp_path)] == [3, 6, 8]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), "was cut short"),
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + bytes([p.read_bytes()[-1] ^ 1])), "was altered"),
    ],
)
def test_damage_is_named_and_nothing_is_loaded(tmp_path: Path, change: Callable[[Path], object], words: str) -> None:
    saved = saved_in(store_in(tmp_path))
    change(next(saved.folder.glob("*.safetensors")))
    mine = {name: torch.zeros_like(t) for name, t in tensors().items()}
    with pytest.raises(CheckpointError, match=words) as caught:
        load(saved, parts(mine))
    assert "safetensors" in str(caught.value)
    assert all(not t.any() for t in mine.values())


def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    saved = saved_in(store_in(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"another model: model.0.weight is \[101, 37\] there and \[101, 38\] here"
    ):
        load(saved, parts(tensors(width=38)))
    with pytest.raises(CheckpointError, match=r"it has no model\.other"):
        load(saved, parts({"model.other": torch.zeros(1)}))


def test_a_save_that_was_cut_short_is_not_listed_and_is_cleared_away(tmp_path: Path) -> None:
    saved_in(store_in(tmp_path))
    (tmp_path / ".step-00000002.tmp").mkdir()
    (tmp_path / ".step-00000002.tmp" / "part").write_text("x")
    (tmp_path / "step-00000003").mkdir()  # no manifest: never complete
    assert [s.step for s in listed(tmp_path)] == [1]
    store_in(tmp_path)
    assert not list(tmp_path.glob(".step*"))


def test_a_full_disk_costs_the_checkpoint_and_not_those_before_it(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "200k") as disk:
        saved_in(store_in(disk, keep=5))
        outcome = store_in(disk, keep=5).save(parts(tensors() | {"model.big": torch.zeros(100, 1000)}), state(2))
        assert not outcome.ok
        assert "the disk is full" in outcome.problem
        assert [s.step for s in listed(disk)] == [1]
        assert is_equal(listed(disk)[0], 0)


def test_what_is_trained_on_meanwhile_is_not_what_is_saved(tmp_path: Path) -> None:
    """`begin` returns at once; the votes tell when the checkpoint is complete."""
    store, live = store_in(tmp_path), tensors(1)
    assert store.begin(parts(live), state(4))
    for tensor in live.values():
        tensor.zero_()
    assert store.is_busy
    assert not store.begin(parts(live), state(5))  # only one save at a time
    outcome = None
    while outcome is None:
        outcome = store.advance(store.serial, store.votes())
    assert outcome.ok
    assert outcome.step == 4
    assert is_equal(listed(tmp_path)[0], 1)
    assert store.advance(store.serial, (1.0, 1.0, 0.0)) is None  # late votes are ignored


class Cuda:
    """A fake CUDA runtime that records each call with its thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, locks: bool = True) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._locks = locks
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: self._call("set_device", device))

    def _call(self, *call: Any) -> None:
        self.calls.append((threading.current_thread().name, *call))

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self._call("lock", address, size)
        return 0 if self._locks else 2

    def cudaHostUnregister(self, address: int) -> int:
        self._call("unlock", address)
        return 0

    def event(self, *_: Any, **__: Any) -> mock.Mock:
        event = mock.Mock(spec=["record", "synchronize"])
        event.synchronize.side_effect = lambda: self._call("synchronize")
        return event


@pytest.mark.parametrize("locks", [True, False])
def test_memory_for_a_gpus_saves_is_locked_on_its_device_until_it_goes(
    monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    cuda = Cuda(monkeypatch, locks=locks)
    live = [torch.randn(5, 3), torch.arange(7, dtype=torch.int16), torch.randn(2, 2, dtype=torch.float64)]
    with Rehearsal():
        staging = Staging(live)
    places = staging.buffers()
    assert [(p.shape, p.dtype) for p in places] == [(t.shape, t.dtype) for t in live]
    (_, _, device), (_, _, first, size) = cuda.calls
    assert [call[:2] for call in cuda.calls] == [("staging", "set_device"), ("staging", "lock")]
    assert device == DEVICE
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in places)
    assert first <= spans[0][0]
    assert spans[-1][1] <= first + size
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))
    for place, tensor in zip(places, live, strict=True):
        place.copy_(tensor)
    assert all(torch.equal(place, tensor) for place, tensor in zip(places, live, strict=True))
    del cuda.calls[:], places, place
    gc.collect()
    assert cuda.calls == []  # the next save uses the same memory
    del staging
    gc.collect()
    assert [call[1:] for call in cuda.calls] == [("unlock", first)] * locks


def test_memory_for_a_cpus_saves_is_not_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    assert len(Staging([torch.randn(3), torch.randn(2)]).buffers()) == 2
    assert cuda.calls == []


def test_a_save_from_a_gpu_waits_for_its_copies_in_its_own_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared memory is page-locked once and used by every save; each save's thread first sets the device."""
    cuda, live = Cuda(monkeypatch), tensors(1)
    with Rehearsal():
        monkeypatch.setattr(torch.cuda, "Event", cuda.event)
        store = store_in(tmp_path, Mesh(Place(), DEVICE))
        store.prepare(parts(live))
        for step in (1, 2):
            assert store.save(parts(live), state(step)).ok
    calls = [call[:2] for call in cuda.calls]
    save = [("save", "set_device"), ("save", "synchronize")]
    assert calls == [("staging", "set_device"), ("staging", "lock"), *save, *save]
    assert {call[2] for call in cuda.calls if call[1] == "set_device"} == {DEVICE}
    assert [s.step for s in listed(tmp_path)] == [1, 2]
    assert all(is_equal(saved, 1) for saved in listed(tmp_path))


def test_where_there_is_no_room_yet_a_save_asks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = store_in(tmp_path), []

    def full_at_first(live: Sequence[torch.Tensor]) -> Staging:
        asked.append(len(live))
        if len(asked) == 1:
            raise MemoryError
        return Staging(live)

    monkeypatch.setattr(store_module, "Staging", full_at_first)
    store.prepare(parts(tensors()))
    assert is_equal(saved_in(store), 0)
    assert asked == [5, 5]


def fall_back(mesh: Mesh, folder: Path) -> tuple[int | None, list[str]]:
    saved, problems = store_in(folder, mesh).newest()
    return (None if saved is None else saved.step), problems


def test_all_fall_back_together_to_the_newest_that_is_whole(world: Callable[[int], World], tmp_path: Path) -> None:
    store = store_in(tmp_path, keep=5)
    for step in range(1, 5):
        saved_in(store, seed=step, step=step)
    flip(next(listed(tmp_path)[3].folder.glob("*.safetensors")))
    (listed(tmp_path)[2].folder / "state.json").write_text(
        (tmp_path / "step-00000001" / "state.json").read_text() + " "
    )
    answers = world(2).run(fall_back, tmp_path)
    assert [step for step, _ in answers] == [2, 2]
    assert answers[0][1] == answers[1][1]
    assert "was altered" in answers[0][1][0]
    assert "grew" in answers[0][1][1]
    assert [s.step for s in listed(tmp_path)] == [1, 2]
    assert sorted(p.name for p in tmp_path.glob("damaged-*")) == ["damaged-step-00000003", "damaged-step-00000004"]


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


def test_a_step_that_was_set_aside_is_saved_again(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for step in (1, 2):
        saved_in(store, step=step)
    flip(next(listed(tmp_path)[1].folder.glob("*.safetensors")))
    found, [problem] = store.newest()
    assert found is not None
    assert (found.step, "was altered" in problem) == (1, True)
    saved_in(store, seed=7, step=2)
    assert is_equal(listed(tmp_path)[1], 7)


@pytest.mark.parametrize("shares", [1, 2, 3])
def test_several_who_share_the_reading_miss_nothing(tmp_path: Path, shares: int) -> None:
    saved = saved_in(store_in(tmp_path))
    for path in sorted(saved.folder.glob("*")):
        whole = path.read_bytes()
        if path.name == "manifest.json":
            continue
        flip(path)
        assert sum(bool(damage(saved.folder, share, shares)) for share in range(shares)) == 1
        path.write_bytes(whole)


def fail_on_one(mesh: Mesh, folder: Path) -> str:
    def at(phase: str) -> None:
        if phase == "write" and mesh.place.rank == 1:
            raise OSError(5, "Input/output error")

    store = CheckpointStore(folder, mesh, at=at)
    return store.save(parts(tensors()), state(2)).problem


def test_what_one_process_could_not_write_is_there_for_none_and_all_know_why(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    saved_in(store_in(tmp_path))
    for problem in world(2).run(fail_on_one, tmp_path):
        assert problem == f"{tmp_path}: rank 1: [Errno 5] Input/output error"
    assert [s.step for s in listed(tmp_path)] == [1]


def test_a_disk_that_says_written_is_not_taken_at_its_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (sync(fd), os.pwrite(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY), b"x", 99))
    )
    store = store_in(tmp_path)
    store.begin(parts(tensors()), state(1))
    outcome = store.finish()
    assert outcome is not None
    problem = outcome.problem
    assert "differs from what was written" in problem


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.checkpoint.test_store import parts, store_in, tensors, state
store = store_in(Path({folder!r}), keep=3)
saved = store.save(parts(tensors(0)), state(1))
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
    while seen < 4:  # by then the process is inside some save, at a different point each time
        seen = max((s.step for s in listed(tmp_path)), default=0)
    process.kill()
    process.wait()
    assert listed(tmp_path)
    for saved in listed(tmp_path):
        assert is_equal(saved, 0 if saved.step == 1 else saved.step)
    assert json.loads((tmp_path / "latest" / "state.json").read_text())["step"] <= listed(tmp_path)[-1].step
