"""Fetches from a local hub: complete or not at all, once, and resumed after every interruption."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import ModelError
from shoal.hub.fetch import fetch_model
from shoal.hub.find import find_model
from shoal.hub.folder import ModelFolder
from shoal.hub.record import RECORD, load_record
from tests.hub.conftest import INDEX, NAME, SHARDS, Scene, one_file, two_shards, weights


def test_what_is_wanted_comes_and_nothing_else(scene: Scene) -> None:
    said: list[str] = []
    assert fetch_model(NAME, tell=said.append) == Path("models/org/tiny")
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE", "README.md"}
    assert scene.there() == {name: content for name, content in one_file().items() if name in wanted}
    assert said == [
        "fetching org/tiny at c0ffee000000: 6 files, 0.3 MB to models/org/tiny",
        "models/org/tiny is complete: org/tiny at c0ffee000000",
    ]
    assert find_model(NAME) == Path("models/org/tiny")
    assert ModelFolder.open(scene.folder).tensors.keys() == {"a"}
    assert [p.name for p in scene.folder.parent.iterdir() if p.name != "tiny"] == [".tiny.lock"]


def test_the_record_says_what_came_from_where(scene: Scene) -> None:
    fetch_model(NAME)
    record = load_record(scene.folder)
    assert record is not None
    assert (record.name, record.revision, record.commit) == (NAME, "main", scene.repository.commit)
    assert {n: (f.bytes, f.sha256) for n, f in record.files.items()} == {
        n: (len(c), hashlib.sha256(c).hexdigest()) for n, c in scene.there().items()
    }


def test_of_shards_those_that_the_index_names(scene: Scene) -> None:
    scene.repository.files = two_shards()
    progress: list[tuple[str, int, int]] = []
    fetch_model(NAME, progress=lambda *report: progress.append(report))
    assert scene.there().keys() == {"config.json", INDEX, *SHARDS}
    assert len(ModelFolder.open(scene.folder).files) == 2
    total = sum(len(c) for c in scene.there().values())
    assert progress[-1][1:] == (total, total)
    assert [done for _, done, _ in progress] == sorted(done for _, done, _ in progress)


def test_what_is_there_is_not_asked_for_again(scene: Scene) -> None:
    fetch_model(NAME)
    asked = len(scene.hub.asked)
    scene.hub.repositories.clear()
    said: list[str] = []
    fetch_model(NAME, tell=said.append)
    fetch_model(NAME, verify=True, revision="main")
    fetch_model(NAME, revision=scene.repository.commit)
    assert len(scene.hub.asked) == asked
    assert said == ["models/org/tiny is complete: org/tiny at c0ffee000000"]


def test_what_is_gone_or_altered_comes_again_and_only_that(scene: Scene) -> None:
    fetch_model(NAME)
    path = scene.folder / "model.safetensors"
    damages: list[tuple[Callable[[], Any], dict[str, Any]]] = [
        (lambda: path.unlink(), {}),
        (lambda: path.write_bytes(path.read_bytes()[:-1]), {}),
        (lambda: path.write_bytes(weights("a", 300_000, 9)), {"verify": True}),
    ]
    for damage, options in damages:
        scene.hub.asked.clear()
        damage()
        if not options:
            with pytest.raises(ModelError, match="shoal fetch model org/tiny fetches it again"):
                find_model(NAME)
        fetch_model(NAME, **options)
        assert scene.hub.asked == ["model.safetensors from 0"]
        assert path.read_bytes() == scene.repository.files["model.safetensors"]


def test_force_brings_what_is_new_while_the_old_one_is_read(scene: Scene) -> None:
    fetch_model(NAME)
    old = scene.repository.files["model.safetensors"]
    scene.repository.files["model.safetensors"] = new = weights("a", 300_000, 7)
    scene.repository.commit = "f" * 40
    seen = []
    scene.repository.on_body = lambda file: seen.append((scene.folder / file).read_bytes() == old)
    with (scene.folder / "model.safetensors").open("rb") as reader:
        start = reader.read(1000)
        fetch_model(NAME, force=True)
        assert start + reader.read() == old
    assert seen == [True]  # the old file stays until the new one is complete
    assert (scene.folder / "model.safetensors").read_bytes() == new
    record = load_record(scene.folder)
    assert record is not None
    assert record.commit == "f" * 40
    assert [p.name for p in scene.folder.parent.iterdir() if p.name != "tiny"] == [".tiny.lock"]


def test_a_force_that_fails_leaves_the_old_one(scene: Scene) -> None:
    fetch_model(NAME)
    before = scene.there()
    scene.repository.altered["model.safetensors"] = weights("a", 300_000, 9)
    scene.repository.files["model.safetensors"] = weights("a", 300_000, 8)
    refused(r"the hash of .* differs", force=True)
    assert scene.there() == before
    fetch_model(NAME)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_gone_on_with(scene: Scene, ranges: bool) -> None:
    scene.repository.ranges = ranges
    scene.repository.cut_after = 200_000
    if ranges:
        fetch_model(NAME)
        assert "model.safetensors from 200000" in scene.hub.asked
    else:
        refused("cannot reach .* the same command resumes the fetch")
        scene.repository.cut_after = None
        fetch_model(NAME)
    assert scene.there()["model.safetensors"] == scene.repository.files["model.safetensors"]


def test_a_hub_that_sends_nothing_ends_it_and_the_next_try_goes_on(scene: Scene) -> None:
    scene.repository.cut_after = 150_000

    def send_no_more(file: str) -> None:
        if file == "model.safetensors":
            scene.repository.cut_after = 0

    scene.repository.on_body = send_no_more
    refused("cannot reach")
    assert not scene.folder.exists()
    scene.repository.cut_after, scene.repository.on_body = None, lambda file: None
    scene.hub.asked.clear()
    fetch_model(NAME)
    assert "model.safetensors from 150000" in scene.hub.asked


def test_a_full_disk_and_then_more_room(scene: Scene) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused("cannot read or write .*free some space or set --to .*resumes the fetch")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not scene.folder.exists()
    fetch_model(NAME)
    assert "model.safetensors from 100000" in scene.hub.asked


def test_after_a_new_commit_no_file_is_of_both(scene: Scene) -> None:
    scene.repository.cut_after = 0
    refused("cannot reach")
    scene.repository.cut_after = None
    scene.repository.altered = {"model.safetensors": b"x" * len(scene.repository.files["model.safetensors"])}
    refused(r"the hash of .* differs")
    scene.repository.altered = {}
    scene.repository.files |= {"model.safetensors": weights("a", 300_000, 5), "LICENSE": b"BSD", "NOTICE": b""}
    del scene.repository.files["README.md"]
    fetch_model(NAME)
    assert {n: c for n, c in scene.repository.files.items() if n in scene.there()} == scene.there()
    assert "README.md" not in scene.there()


def test_only_one_of_several_fetches(scene: Scene) -> None:
    """Start a second fetch in the middle of the first; it reports that it waits."""
    waits = threading.Event()
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        waits.set()

    second = threading.Thread(target=lambda: fetch_model(NAME, force=True, tell=tell))

    def start_second(file: str) -> None:
        if file == "model.safetensors":
            second.start()
            assert waits.wait(60)

    scene.repository.on_body = start_second
    fetch_model(NAME, force=True)
    second.join(60)
    assert said == [
        "waiting for another process, which fetches org/tiny",
        "models/org/tiny is complete: org/tiny at c0ffee000000",
    ]
    assert len(scene.hub.asked) == 6


def test_a_swap_that_was_killed_in_the_middle_is_finished_without_the_hub(scene: Scene) -> None:
    fetch_model(NAME)
    scene.folder.rename(scene.partial)
    (scene.folder.with_name(".tiny.old") / "x").mkdir(parents=True)
    scene.hub.repositories.clear()
    fetch_model(NAME)
    assert find_model(NAME) == Path("models/org/tiny")
    assert sorted(p.name for p in scene.folder.parent.iterdir()) == [".tiny.lock", "tiny"]


def test_a_revision_is_taken_and_another_one_is_not_put_over_it(scene: Scene) -> None:
    scene.repository.branches = ("main", "refs/pr/1", "v2")
    fetch_model(NAME, revision="refs/pr/1")
    fetch_model(NAME)
    refused("holds its revision refs/pr/1, not v2; .*--force replaces it", revision="v2")
    fetch_model(NAME, revision="v2", force=True)
    record = load_record(scene.folder)
    assert record is not None
    assert record.revision == "v2"
    refused("has no revision v3", revision="v3", to=Path("elsewhere"))


def test_to_another_folder(scene: Scene, tmp_path: Path) -> None:
    real = tmp_path / "disk" / "tiny"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    assert fetch_model(NAME, to=Path("link")) == Path("link")
    assert (tmp_path / "link").is_symlink()
    assert load_record(real) is not None
    scene.hub.repositories["org/other"] = scene.repository
    refused("holds org/tiny, not org/other", name="org/other", to=Path("link"))


def test_what_shoal_did_not_fetch_is_not_replaced(scene: Scene, tmp_path: Path) -> None:
    scene.folder.mkdir(parents=True)
    (scene.folder / "diary.txt").write_text("dear")
    refused("holds something else: it has no config.json")
    refused("was not fetched by shoal, so --force does not replace it", force=True)
    (scene.folder / "config.json").write_text("{}")
    refused("has no \\*.safetensors")
    (scene.folder / "model.safetensors").write_bytes(weights("a", 10))
    said: list[str] = []
    fetch_model(NAME, tell=said.append)
    assert said == ["models/org/tiny exists; shoal did not fetch it, so only its form is checked"]
    assert scene.hub.asked == []


def test_what_a_person_put_beside_a_fetched_model_is_not_lost(scene: Scene) -> None:
    fetch_model(NAME)
    (scene.folder / "notes.txt").write_text("dear")
    fetch_model(NAME)
    refused("notes.txt was not fetched by shoal and would be lost", force=True)
    record = (scene.folder / RECORD).read_bytes()
    (scene.folder / RECORD).write_bytes(record[: len(record) // 2])
    for force in (False, True):
        refused("fetched.json is damaged, so shoal cannot tell which files it fetched", force=force)
    (scene.folder / RECORD).write_bytes(record)
    (scene.folder / "notes.txt").unlink()
    fetch_model(NAME, force=True)


# --- rejected -------------------------------------------------------------------------------------


def refused(pattern: str, name: str = NAME, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        fetch_model(name, **options)
    assert re.search(pattern, str(caught.value)), str(caught.value)
    return str(caught.value)


def test_a_name_that_is_nowhere(scene: Scene) -> None:
    refused("the hub has no model org/tony, or it is private", name="org/tony")
    fetch_model(NAME)
    refused("is it org/tiny, which is on this machine\\?", name="org/tony")
    for name in ("../etc", "a/b/c", "/etc", "", "..", "a/..", "a b", "a//b"):
        refused("is not a model's name", name=name)
    refused("is not a model's name", name="a--b")


def test_what_needs_a_token_says_so_and_no_token_is_shown(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.repository.token = "hf_right"
    assert "HF_TOKEN" in refused("or it is private \\(401\\)")
    for wrong in ("hf_wrong", "hf_wrong\nline", "hf_wröng"):
        monkeypatch.setenv("HF_TOKEN", wrong)
        assert "hf_" not in refused("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    fetch_model(NAME)
    hub, elsewhere = (url.removeprefix("http://") for url in (scene.hub.url, scene.hub.elsewhere))
    assert scene.hub.tokens == {hub: "Bearer hf_right", elsewhere: ""}  # the other host gets no token


def test_a_gated_model_says_where_its_terms_are(scene: Scene) -> None:
    scene.repository.gated = True
    message = refused("only for users who accepted its terms \\(403\\)")
    assert f"{scene.hub.url}/{NAME}" in message
    assert "HF_TOKEN" in message


@pytest.mark.parametrize(
    ("status", "pattern"),
    [
        (401, "HF_TOKEN"),
        (403, "HF_TOKEN"),
        (429, "too many requests"),
        (418, "rejects the request for org/tiny"),
        (500, "has an error of its own"),
    ],
)
def test_answers_that_are_no_model(scene: Scene, status: int, pattern: str) -> None:
    scene.hub.status = status
    assert str(status) in refused(pattern)


def test_a_page_that_is_no_hub(scene: Scene) -> None:
    for page in (b"<html>log in</html>", b"{}", b"[]", b'{"id": "org/tiny", "sha": "main"}'):
        scene.hub.page = page
        refused("does not answer for org/tiny as a hub does|states no commit of org/tiny")


def test_only_pickles(scene: Scene) -> None:
    del scene.repository.files["model.safetensors"], scene.repository.files["consolidated.safetensors"]
    refused("only pickled weights \\(pytorch_model.bin\\): .*can run code.*--revision refs/pr/N")
    del scene.repository.files["pytorch_model.bin"]
    refused("has no \\*.safetensors")
    assert scene.hub.asked == []


def test_a_repository_that_is_no_model(scene: Scene) -> None:
    scene.repository.files = one_file()
    del scene.repository.files["config.json"]
    refused("has no config.json")
    scene.repository.files = two_shards()
    del scene.repository.files[SHARDS[1]]
    refused(f"lacks {SHARDS[1]}, which its .*index.json names")
    scene.repository.files = two_shards() | {SHARDS[1]: weights("c", 10)}
    refused("is broken on the hub: .* lacks b")
    scene.repository.files = two_shards()
    del scene.repository.files[INDEX]
    refused("has 3 \\*.safetensors and no")
    assert not scene.folder.exists()


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json"])
def test_a_file_that_leads_out_of_the_folder(scene: Scene, tmp_path: Path, name: str) -> None:
    scene.repository.files[name] = b"{}"
    refused("outside its folder")
    assert not list(tmp_path.rglob("evil*"))


def test_an_index_that_leads_out_of_the_folder(scene: Scene) -> None:
    scene.repository.files = two_shards() | {INDEX: b'{"weight_map": {"a": "../evil.safetensors"}}'}
    refused("is not a \\*.safetensors beside it")


def test_a_disk_too_small_is_seen_before(scene: Scene) -> None:
    scene.repository.stated_bytes["model.safetensors"] = 10**16
    refused("needs 10,000,000.0 GB more, but the disk of models/org/tiny has .* free")
    assert scene.hub.asked == []


def test_more_or_less_than_was_stated(scene: Scene) -> None:
    size = len(scene.repository.files["model.safetensors"])
    scene.repository.stated_bytes["model.safetensors"] = size - 1
    refused("sends more of org/tiny's model.safetensors than")
    scene.repository.stated_bytes["model.safetensors"] = size + 1
    refused("cannot reach|sends no data of org/tiny's model.safetensors|no longer has|has an error of its own")


def test_a_folder_that_cannot_be_written(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    refused("cannot read or write .*models.*; set --to to a writable folder")
    refused("cannot read or write .*; set --to", to=Path("/proc/nowhere/tiny"))


def test_no_network(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.hub.server_close()
    assert "model.safetensors.index.json" in refused(
        "cannot reach .* put org/tiny's config.json.* into models/org/tiny"
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set")
    cache = Path(os.environ["HF_HOME"]) / "hub" / "models--org--tiny"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    for file in ("config.json", "model.safetensors"):
        (snapshot / file).write_bytes(one_file()[file])
    refused(f"shoal reads it from {snapshot}")
