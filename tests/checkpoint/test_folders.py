"""Checkpoints in several folders, one per machine: used only if every machine has them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from shoal.checkpoint.memory_tier import FolderGroup, MemoryTier
from shoal.checkpoint.saved import Saved, SaveId, damage, listed
from shoal.checkpoint.store import CheckpointStore, Keep
from shoal.errors import CheckpointError
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Part, Region
from tests.checkpoint.test_store import flip, is_equal, state, tensors
from tests.disks import small_disk
from tests.world import World

FIRSTS = (0, 0, 2, 2)  # the first rank on each rank's machine: two machines with two processes each
ALL: Mapping[str, int | None] = {"a": None, "b": None}
RANKS_OF = {"copies": 1, "shards on each machine": 2, "shards over all": 4}


def machine(rank: int) -> str:
    return f"machine-{FIRSTS[rank] // 2}"


def held(holds: str, rank: int, seed: int) -> dict[str, Part]:
    """Return a rank's parts of `tensors(seed)`, sharded by rows over neighboring ranks."""
    count = RANKS_OF[holds]
    found = {}
    for name, whole in tensors(seed).items():
        region = Region.whole(whole.shape).chunk(0, rank % count, count)
        found[name] = Part(region, whole[region.slices].clone())
    return found


def store_of(
    mesh: Mesh,
    folder: Path,
    holds: str = "copies",
    generation: str = "a",
    generations: Mapping[str, int | None] = ALL,
    at: Callable[[str], None] = lambda phase: None,
) -> CheckpointStore:
    memory = MemoryTier(FolderGroup(mesh.place.rank, FIRSTS), holds, generations, generation)
    return CheckpointStore(folder / machine(mesh.place.rank), mesh, keep=Keep(2, best=False), memory=memory, at=at)


def save(mesh: Mesh, folder: Path, holds: str, steps: list[int], generation: str = "a") -> list[str]:
    store = store_of(mesh, folder, holds, generation)
    return [store.save(held(holds, mesh.place.rank, seed=step), state(step)).problem for step in steps]


def load(
    mesh: Mesh, folder: Path, holds: str, wrote: str | None = None, generations: Mapping[str, int | None] = ALL
) -> tuple[int | None, list[str]]:
    """Load the newest checkpoint and check that its bits are right. Return its step, and the problems of newer ones."""
    store = store_of(mesh, folder, wrote or holds, generations=generations)
    saved, problems = store.newest()
    if saved is None:
        return None, problems
    assert saved.folder.parent == folder / machine(mesh.place.rank)
    mine = {name: part._replace(tensor=torch.zeros_like(part.tensor)) for name, part in held(holds, mesh.place.rank, 0).items()}  # fmt: skip
    assert store.load(saved, mine)["step"] == saved.step
    expected = held(holds, mesh.place.rank, saved.step)
    assert all(torch.equal(part.tensor, expected[name].tensor) for name, part in mine.items())
    return saved.step, problems


def saved_by(generation: str, step: int) -> Saved:
    return Saved(Path("step"), step, None, SaveId(generation, 1, ""))


def test_each_life_leads_to_the_next_up_to_the_step_from_which_it_went_on() -> None:
    memory = MemoryTier(FolderGroup.shared_by_all(0, 1), "", {})
    memory.begin_generation("a", None)
    assert memory.generations == {"a": None}
    memory.begin_generation("b", saved_by("a", 6))
    memory.begin_generation("c", saved_by("b", 9))
    assert memory.generations == {"a": 6, "b": 9, "c": None}
    assert [memory.is_current(saved_by(*each)) for each in (("a", 6), ("a", 7), ("b", 9), ("c", 99))] == [
        True, False, True, True
    ]  # fmt: skip
    memory.begin_generation("d", saved_by("a", 5))  # the newer checkpoints of a and b were damaged
    assert memory.generations == {"a": 5, "d": None}
    memory.begin_generation("e", Saved(Path("step"), 4, None))  # from a checkpoint on disk
    assert memory.generations == {"e": None}
    for generation in range(20):
        memory.begin_generation(str(generation), saved_by(str(generation - 1), generation) if generation else None)
    assert list(memory.generations)[-2:] == ["18", "19"]
    assert len(memory.generations) < 12


def test_who_shares_a_folder_is_who_sees_it() -> None:
    shared = FolderGroup.from_visible(1, [[0, 1, 2]] * 3)
    assert shared == FolderGroup.shared_by_all(1, 3)
    assert (shared.ranks, shared.index, shared.is_leader, shared.count) == ([0, 1, 2], 1, False, 1)
    apart = FolderGroup.from_visible(3, [[0, 2], [1, 3], [0, 2], [1, 3]])
    assert apart is not None
    assert (apart.ranks, apart.index, apart.is_leader, apart.count) == ([1, 3], 1, False, 2)
    assert FolderGroup.from_visible(0, [[0], [0, 1]]) is None  # rank 0 does not see yet what rank 1 wrote
    assert FolderGroup.from_visible(0, [[0], []]) is None  # rank 1 cannot write


@pytest.mark.parametrize("holds", RANKS_OF)
def test_each_process_finds_what_it_held_in_the_folder_it_sees(
    world: Callable[[int], World], tmp_path: Path, holds: str
) -> None:
    assert world(4).run(save, tmp_path, holds, [1, 2, 3]) == [[""] * 3] * 4
    assert world(4).run(load, tmp_path, holds) == [(3, [])] * 4
    for name in ("machine-0", "machine-1"):
        assert [s.step for s in listed(tmp_path / name)] == [2, 3]
        newest = listed(tmp_path / name)[-1]
        assert damage(newest.folder) == ""
        if holds != "shards over all":  # each machine holds all tensors, and writes each once
            assert is_equal(newest, 3)
            data = sum(t.nbytes for t in tensors().values())
            assert data < sum(f.stat().st_size for f in newest.folder.glob("*.safetensors")) < data + 5000


def test_shards_over_all_machines_are_of_use_where_nothing_was_cut_otherwise(
    world: Callable[[int], World], tmp_path: Path
) -> None:
    world(4).run(save, tmp_path, "shards over all", [1])
    assert world(4).run(load, tmp_path, "shards on each machine") == [(None, [])] * 4
    assert world(4).run(load, tmp_path, "shards over all") == [(1, [])] * 4  # the skipped checkpoint is kept


def test_what_was_cut_otherwise_is_not_taken_for_ones_own(world: Callable[[int], World], tmp_path: Path) -> None:
    world(4).run(save, tmp_path, "shards over all", [1])
    with pytest.raises(AssertionError, match="holds another region of the tensor") as caught:
        world(4).run(load, tmp_path, "shards on each machine", "shards over all")
    assert CheckpointError.__name__ in str(caught.value)


def saves_of_two_lives(folder: Path, world: World) -> None:
    """Give both machines a checkpoint of step 3, of different generations."""
    world.run(save, folder, "copies", [1, 3], "b")
    (folder / "machine-1").rename(folder / "before")
    shutil.rmtree(folder / "machine-0")
    world.run(save, folder, "copies", [1, 3])
    shutil.rmtree(folder / "machine-1" / "step-00000003")
    (folder / "before" / "step-00000003").rename(folder / "machine-1" / "step-00000003")


@pytest.mark.parametrize("what", ["is missing", "is of another generation", "was not committed"])
def test_what_one_machine_has_not_is_passed_over_by_all(
    world: Callable[[int], World], tmp_path: Path, what: str
) -> None:
    if what == "is of another generation":
        saves_of_two_lives(tmp_path, world(4))
    else:
        world(4).run(save, tmp_path, "copies", [1, 3])
        newest = tmp_path / "machine-1" / "step-00000003"
        shutil.rmtree(newest) if what == "is missing" else (newest / "manifest.json").unlink()
    assert world(4).run(load, tmp_path, "copies") == [(1, [])] * 4
    assert [s.step for s in listed(tmp_path / "machine-0")] == [1, 3]  # loading removes nothing
    assert world(4).run(save, tmp_path, "copies", [2], "b") == [[""]] * 4
    for name in ("machine-0", "machine-1"):
        assert [s.step for s in listed(tmp_path / name)] == [1, 2]  # step 3 is removed: it belongs to another history


@pytest.mark.parametrize(
    ("generations", "found"), [({"a": None}, 3), ({"a": 2, "b": None}, 1), ({"b": None}, None), ({}, None)]
)
def test_what_is_of_another_history_is_not_taken(
    world: Callable[[int], World], tmp_path: Path, generations: dict[str, int | None], found: int | None
) -> None:
    world(4).run(save, tmp_path, "copies", [1, 3])
    assert world(4).run(load, tmp_path, "copies", None, generations) == [(found, [])] * 4


def test_what_is_damaged_on_one_machine_is_passed_over_by_all(world: Callable[[int], World], tmp_path: Path) -> None:
    world(4).run(save, tmp_path, "copies", [1, 3])
    file = sorted((tmp_path / "machine-1" / "step-00000003").glob("*.safetensors"))[1]
    flip(file)
    problem = f"{file} was altered: its SHA-256 differs from the manifest"
    assert world(4).run(load, tmp_path, "copies") == [(1, [problem])] * 4
    assert [s.step for s in listed(tmp_path / "machine-0")] == [1, 3]  # machine 0 keeps its undamaged copy
    assert sorted(p.name for p in (tmp_path / "machine-1").iterdir() if p.is_dir()) == ["step-00000001"]


def test_a_machine_that_has_nothing_has_nothing_in_common(world: Callable[[int], World], tmp_path: Path) -> None:
    world(4).run(save, tmp_path, "copies", [1])
    shutil.rmtree(tmp_path / "machine-0")
    assert world(4).run(load, tmp_path, "copies") == [(None, [])] * 4


def lent(
    mesh: Mesh, folder: Path, after: int, generations: Mapping[str, int | None] = ALL
) -> tuple[int | None, list[str]]:
    """Replicate a checkpoint and check that this rank can load it. Return its step, and the problems of damaged ones."""
    store = store_of(mesh, folder, generations=generations)
    saved, problems = store.replicate(after, folder / "disk")
    if saved is not None:
        mine = {name: Part.whole(torch.zeros_like(t)) for name, t in tensors(0).items()}
        store.load(saved, mine)
        assert all(torch.equal(mine[name].tensor, t) for name, t in tensors(saved.step).items())
    return saved.step if saved else None, problems


@pytest.mark.parametrize("holds", ["copies", "shards on each machine"])
def test_what_one_machine_has_all_of_is_lent_to_all(world: Callable[[int], World], tmp_path: Path, holds: str) -> None:
    (tmp_path / "disk").mkdir()
    world(4).run(save, tmp_path, holds, [1, 3])
    shutil.rmtree(tmp_path / "machine-0")
    for after, generations in ((3, ALL), (0, {"b": None})):
        assert world(4).run(lent, tmp_path, after, generations) == [(None, [])] * 4
    assert not list((tmp_path / "disk").iterdir())
    assert world(4).run(lent, tmp_path, 1) == [(3, [])] * 4
    [found] = listed(tmp_path / "disk")
    assert is_equal(found, 3)
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["latest", "step-00000003"]


def test_what_is_damaged_or_cut_over_machines_is_not_lent(world: Callable[[int], World], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    world(4).run(save, tmp_path, "copies", [1, 3])
    shutil.rmtree(tmp_path / "machine-0")
    file = sorted((tmp_path / "machine-1" / "step-00000003").glob("*.safetensors"))[1]
    flip(file)
    problem = f"{file} was altered: its SHA-256 differs from the manifest"
    assert world(4).run(lent, tmp_path, 0) == [(1, [problem])] * 4
    assert is_equal(listed(tmp_path / "disk")[0], 1)
    world(4).run(save, tmp_path, "shards over all", [5])
    shutil.rmtree(tmp_path / "machine-0")
    assert world(4).run(lent, tmp_path, 1) == [(None, [problem])] * 4


def test_what_is_damaged_on_one_machine_is_lent_by_the_next(world: Callable[[int], World], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    world(4).run(save, tmp_path, "copies", [3])
    file = sorted((tmp_path / "machine-0" / "step-00000003").glob("*.safetensors"))[1]
    flip(file)
    problem = f"{file} was altered: its SHA-256 differs from the manifest"
    assert world(4).run(lent, tmp_path, 0) == [(3, [problem])] * 4


def test_a_full_disk_takes_no_loan_and_nobody_goes_on_from_less(world: Callable[[int], World], tmp_path: Path) -> None:
    world(4).run(save, tmp_path, "copies", [1])
    shutil.rmtree(tmp_path / "machine-0")
    with small_disk(tmp_path / "disk", "20k") as disk:
        with pytest.raises(AssertionError, match="No space left on device") as caught:
            world(4).run(lent, tmp_path, 0)
        assert str(caught.value).count("CheckpointError: ") == 4
        assert not listed(disk)
    (tmp_path / "disk").mkdir(exist_ok=True)
    assert world(4).run(lent, tmp_path, 0) == [(1, [])] * 4  # once there is space again


def fail_on_one_machine(mesh: Mesh, folder: Path) -> str:
    def at(phase: str) -> None:
        if phase == "manifest" and mesh.place.rank == 2 and store.serial == 2:
            raise OSError(5, "Input/output error")

    store = store_of(mesh, folder, at=at)
    assert store.save(held("copies", mesh.place.rank, 1), state(1)).ok
    problem = store.save(held("copies", mesh.place.rank, 2), state(2)).problem
    if store._tidying is not None:
        store._tidying.join()
    return problem


def test_what_one_machine_could_not_commit_is_there_for_none(world: Callable[[int], World], tmp_path: Path) -> None:
    problems = world(4).run(fail_on_one_machine, tmp_path)
    assert all(problem.endswith(": rank 2: [Errno 5] Input/output error") for problem in problems)
    for name in ("machine-0", "machine-1"):
        assert [p.name for p in (tmp_path / name).glob("*step*")] == ["step-00000001"]  # no partial checkpoint either
    assert world(4).run(load, tmp_path, "copies") == [(1, [])] * 4


def one_commits_before_the_other(mesh: Mesh, folder: Path) -> list[bool]:
    """Return whether the save was complete when one machine had committed it, and when both had."""
    goes_on = threading.Event()

    def at(phase: str) -> None:
        if phase == "manifest" and mesh.place.rank == 2:
            goes_on.wait(60)

    store = store_of(mesh, folder, at=at)
    store.begin(held("copies", mesh.place.rank, 1), state(1))

    def look() -> bool:
        """Advance the save as a step does, after waiting for every machine but the slow one."""
        save = store._save
        assert save is not None
        assert save.thread is not None
        if mesh.place.rank != 2 or not save.committing:
            save.thread.join()
        votes = mesh.sum(torch.tensor(store.votes(), dtype=torch.float64))
        return store.advance(store.serial, votes.tolist()) is not None

    assert not look()  # all ranks have written
    over = [look()]
    goes_on.set()
    outcome = store.finish()
    return [*over, outcome is not None and outcome.ok]


def test_a_save_is_over_when_all_machines_have_it(world: Callable[[int], World], tmp_path: Path) -> None:
    assert world(4).run(one_commits_before_the_other, tmp_path) == [[False, True]] * 4
