"""`shoal fetch data` from a local hub: the files of a catalog's name or of a whole dataset, and every fault on the way."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import DataError
from shoal.hub.catalog import CATALOG, fetched_by
from shoal.hub.fetch import fetch_data
from shoal.hub.record import load_record
from tests.cli.commands import Place, wait_for
from tests.hub.conftest import Scene
from tests.hub.server import Repository

STORIES = "roneneldan/TinyStories"
TRAIN = tuple(f"data/train-0000{n}-of-00002-abc.parquet" for n in range(2))
HELD_OUT = "data/validation-00000-of-00001-def.parquet"
TEXTS = ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt")


def stories() -> dict[str, bytes]:
    """Return files like those of TinyStories, with others that are not wanted."""
    return {
        "README.md": b"---\nlicense: cdla-sharing-1.0\n---\n",
        TRAIN[0]: b"PAR1" + b"a" * 200_000,
        TRAIN[1]: b"PAR1" + b"b" * 100_000,
        HELD_OUT: b"PAR1" + b"c" * 1_000,
        TEXTS[0]: b"Once upon a time\n<|endoftext|>\n" * 100,
        TEXTS[1]: b"The end\n",
        "TinyStories_all_data.tar.gz": b"\x1f\x8b",
        ".gitattributes": b"*.parquet filter=lfs\n",
        "TinyStories.py": b"print()",
        "dataset_infos.json": b"{}",
    }


class DataScene:
    """A hub with TinyStories, and the folder that it is fetched to."""

    def __init__(self, scene: Scene) -> None:
        self.scene, self.hub = scene, scene.hub
        self.repository = Repository(stories(), "datasets", {"license": "cdla-sharing-1.0"})
        self.hub.repositories[STORIES] = self.repository
        self.folder = scene.folder.parents[2] / "datasets" / STORIES

    def there(self) -> dict[str, bytes]:
        """Return the fetched files, without shoal's record."""
        files = {p.relative_to(self.folder).as_posix(): p for p in self.folder.rglob("*") if p.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if name != ".fetched.json"}


@pytest.fixture
def data(scene: Scene) -> DataScene:
    return DataScene(scene)


def refused(pattern: str, name: str = "tinystories", **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        fetch_data(name, **options)
    assert re.search(pattern, str(caught.value)), str(caught.value)
    return str(caught.value)


def only(*names: str) -> dict[str, bytes]:
    return {name: content for name, content in stories().items() if name in (*names, "README.md")}


def test_the_files_of_a_name_come_and_their_license_and_size_are_said_first(data: DataScene) -> None:
    said: list[str] = []
    assert fetch_data("tinystories", tell=said.append) == Path("datasets") / STORIES
    assert data.there() == only(*TRAIN, HELD_OUT)
    assert said == [
        f"fetching {STORIES} at c0ffee000000: 4 files, 0.3 MB to datasets/{STORIES}; license: cdla-sharing-1.0",
        f"datasets/{STORIES} is complete: {STORIES} at c0ffee000000",
    ]
    assert sorted(p.name for p in data.folder.parent.iterdir()) == [".TinyStories.lock", "TinyStories"]


def test_what_is_there_is_not_asked_for_again(data: DataScene) -> None:
    fetch_data("tinystories")
    asked = len(data.hub.asked)
    data.hub.repositories.clear()
    said: list[str] = []
    fetch_data("tinystories", tell=said.append)
    fetch_data("tinystories", verify=True)
    assert len(data.hub.asked) == asked
    assert said == [f"datasets/{STORIES} is complete: {STORIES} at c0ffee000000"]


def test_two_names_of_one_repository_lie_side_by_side(data: DataScene) -> None:
    """The second name adds its files at the first one's commit; the first files are not fetched again."""
    fetch_data("tinystories")
    data.hub.asked.clear()
    data.repository.branches = ()  # main has moved on, the commit is still there
    fetch_data("tinystories-text")
    assert data.there() == only(*TRAIN, HELD_OUT, *TEXTS)
    assert data.hub.asked == [f"{text} from 0" for text in TEXTS]
    for name in ("tinystories", "tinystories-text"):
        fetch_data(name)
    assert len(data.hub.asked) == 2


def test_force_refreshes_every_file_of_the_folder_and_the_old_one_stays_until_then(data: DataScene) -> None:
    fetch_data("tinystories")
    fetch_data("tinystories-text")
    new = b"PAR1" + b"z" * 200_000
    data.repository.files[TRAIN[0]], data.repository.commit = new, "f" * 40
    del data.repository.files[HELD_OUT]
    data.repository.files["data/validation-new.parquet"] = b"PAR1"
    seen: list[bytes] = []
    data.repository.on_body = lambda file: seen.append((data.folder / TRAIN[0]).read_bytes())
    data.hub.asked.clear()
    fetch_data("tinystories", force=True)
    assert set(data.there()) == {*TRAIN, *TEXTS, "data/validation-new.parquet", "README.md"}
    assert data.there()[TRAIN[0]] == new
    assert set(seen) == {stories()[TRAIN[0]]}
    assert data.hub.asked == [f"{TRAIN[0]} from 0", "data/validation-new.parquet from 0"]
    record = load_record(data.folder)
    assert record is not None
    assert record.commit == "f" * 40


def test_any_dataset_with_all_of_its_data_files(data: DataScene) -> None:
    fetch_data(f"hf:{STORIES}")
    assert set(data.there()) == {*TRAIN, HELD_OUT, *TEXTS, "README.md"}


def test_a_cut_connection_is_gone_on_with(data: DataScene) -> None:
    data.repository.cut_after = 150_000
    fetch_data("tinystories")
    assert f"{TRAIN[0]} from 150000" in data.hub.asked
    assert data.there() == only(*TRAIN, HELD_OUT)


def test_what_is_gone_or_cut_short_comes_again_and_only_that(data: DataScene) -> None:
    fetch_data("tinystories")
    data.hub.asked.clear()
    (data.folder / TRAIN[1]).write_bytes(b"PAR1")
    (data.folder / HELD_OUT).unlink()
    fetch_data("tinystories")
    assert data.hub.asked == [f"{TRAIN[1]} from 0", f"{HELD_OUT} from 0"]
    assert data.there() == only(*TRAIN, HELD_OUT)


def test_a_wrong_hash_is_not_taken_and_the_next_try_repairs_it(data: DataScene) -> None:
    data.repository.altered[TRAIN[1]] = b"PAR1" + b"x" * 100_000
    refused(f"the hash of {STORIES}'s {TRAIN[1]} differs")
    assert not data.folder.exists()
    data.repository.altered.clear()
    data.hub.asked.clear()
    fetch_data("tinystories")
    assert data.hub.asked == [f"{TRAIN[1]} from 0", f"{HELD_OUT} from 0"]


def test_a_name_that_does_not_exist(data: DataScene) -> None:
    refused("there is no dataset 'tinystorys'; did you mean tinystories or .*Known: tinystories", "tinystorys")
    refused("did you mean hf:roneneldan/TinyStories or tinystories", STORIES)
    refused("hf:OWNER/NAME", "hf:../etc")
    refused("hf:OWNER/NAME", "hf:imdb")
    refused("is not a dataset's name", "hf:a/b--c")
    refused("the hub has no dataset org/none", "hf:org/none")
    refused("is it tinystories.*, which shoal knows", "hf:roneneldan/TinyStory")


def test_no_network_says_what_to_put_where(data: DataScene, monkeypatch: pytest.MonkeyPatch) -> None:
    data.hub.server_close()
    put = f"put data/train-\\*.parquet and data/validation-\\*.parquet of the dataset {STORIES}, .* into datasets/{STORIES}"
    refused(f"cannot reach .* {put}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(f"HF_HUB_OFFLINE is set.* {put}")
    refused("put the data files of the dataset org/x", "hf:org/x")
    (data.folder / "data").mkdir(parents=True)
    (data.folder / TRAIN[0]).write_bytes(b"PAR1")
    refused("has no data/validation-\\*.parquet")
    (data.folder / HELD_OUT).write_bytes(b"PAR1")
    said: list[str] = []
    fetch_data("tinystories", tell=said.append)
    assert said == [f"datasets/{STORIES} exists; shoal did not fetch it, so only its form is checked"]


def test_no_rights(data: DataScene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    data.repository.token = "hf_right"
    assert "hf_wrong" not in refused("no dataset .* or it is private \\(401\\): .*set HF_TOKEN to a token")
    data.repository.token, data.repository.gated = "", True
    assert f"{data.hub.url}/datasets/{STORIES}" in refused("only for users who accepted its terms \\(403\\)")
    data.hub.status = 403
    refused("denies access .* set HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    data.hub.status, data.repository.gated, data.repository.token = 200, False, "hf_right"
    fetch_data("tinystories")
    assert data.hub.tokens[data.hub.elsewhere.removeprefix("http://")] == ""  # the other host gets no token


def test_a_disk_too_small_is_seen_before(data: DataScene) -> None:
    data.repository.stated_bytes[TRAIN[0]] = 10**16
    refused("needs 10,000,000.0 GB more, but the disk of datasets/.* has .* free")
    assert data.hub.asked == []


def test_a_dataset_without_data(data: DataScene) -> None:
    data.repository.files = {"README.md": b"", "TinyStories.py": b"print()"}
    refused("only a loading script .*does not run.*--revision refs/convert/parquet", f"hf:{STORIES}")
    data.repository.files = {"README.md": b"", "pictures.zip": b""}
    refused("has no data files", f"hf:{STORIES}")
    data.repository.files = {TRAIN[0]: b"PAR1"}
    refused("has no data/validation-\\*.parquet any more; hf:roneneldan/TinyStories fetches all", "tinystories")
    for name in ("../../evil.parquet", "/etc/evil.parquet"):
        data.repository.files = stories() | {name: b"PAR1"}
        refused("outside its folder")


def test_what_shoal_did_not_fetch_is_not_replaced(data: DataScene) -> None:
    fetch_data("tinystories")
    (data.folder / "data" / "mine.txt").write_text("dear")
    fetch_data("tinystories")
    refused("data/mine.txt was not fetched by shoal and would be lost", force=True)
    refused("data/mine.txt was not fetched by shoal and would be lost", "tinystories-text")
    (data.folder / "data" / "mine.txt").unlink()
    refused(f"holds {STORIES}, not tatsu-lab/alpaca", "alpaca", to=data.folder)


def test_the_command_that_fetches_a_missing_path() -> None:
    assert fetched_by(f"datasets/{STORIES}/data/train-*.parquet") == "shoal fetch data tinystories"
    assert fetched_by(f"datasets/{STORIES}/data") == "shoal fetch data tinystories"
    assert fetched_by(f"datasets/{STORIES}/{TEXTS[0]}") == "shoal fetch data tinystories-text"
    assert fetched_by(f"datasets/{STORIES}/other/*.parquet") == f"shoal fetch data hf:{STORIES}"
    assert fetched_by("books/a.txt") == fetched_by("datasets/x") == ""
    for name, dataset in CATALOG.items():
        assert all(fetched_by(str(dataset.folder / p)) == f"shoal fetch data {name}" for p in dataset.patterns)
        assert dataset.bytes > 0
        assert dataset.license


# --- processes -----------------------------------------------------------------------------------------


def test_of_two_processes_one_fetches(data: DataScene, tmp_path: Path) -> None:
    place = Place(tmp_path)
    environment = data.scene.environment()
    others: list[subprocess.Popen[str]] = []

    def start_another(file: str) -> None:
        if file == TRAIN[0]:
            others.append(place.start("fetch", "data", "tinystories", **environment))
            wait_for(others[0], f"waiting for another process, which fetches {STORIES}")
            assert not data.folder.exists()  # never half seen

    data.repository.on_body = start_another
    output = place.good("fetch", "data", "tinystories", **environment)
    assert "license: cdla-sharing-1.0" in output
    assert "is complete" in others[0].communicate(timeout=60)[0]
    assert others[0].returncode == 0
    assert len(data.hub.asked) == 4
    assert data.there() == only(*TRAIN, HELD_OUT)


def test_one_message_and_no_traceback(data: DataScene, tmp_path: Path) -> None:
    place = Place(tmp_path)
    environment = data.scene.environment() | {"HF_TOKEN": "hf_secret"}
    data.repository.gated = True
    message = place.refused("fetch", "data", "tinystories", **environment)
    assert "HF_TOKEN" in message
    assert "hf_secret" not in message
