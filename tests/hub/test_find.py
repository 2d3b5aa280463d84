"""The places where models are found, and the message for one that is missing."""

from __future__ import annotations

import pwd
import re
from pathlib import Path

import pytest

from shoal.data.tokens.tokenize import load_tokenizer
from shoal.errors import ConfigError, DataError, ModelError
from shoal.hub.find import find_model, near_path
from shoal.resolve.resolve import resolve


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def refused(name: str, pattern: str) -> str:
    with pytest.raises(ModelError) as caught:
        find_model(name)
    assert re.search(pattern, str(caught.value)), str(caught.value)
    return str(caught.value)


def test_a_folder_by_its_path_and_by_its_name(home: Path) -> None:
    folder = make(home / "models" / "org" / "tiny")
    assert find_model("org/tiny") == Path("models/org/tiny")
    assert find_model("models/org/tiny") == Path("models/org/tiny")
    assert find_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("variable", "below"),
    [("HF_HUB_CACHE", "."), ("HUGGINGFACE_HUB_CACHE", "."), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")],
)
def test_the_cache_of_hugging_face(home: Path, monkeypatch: pytest.MonkeyPatch, variable: str, below: str) -> None:
    monkeypatch.setenv(variable, str(home / "c"))
    cached = home / "c" / below / "models--org--tiny"
    (cached / "refs").mkdir(parents=True)
    refused("org/tiny", "shoal fetch model org/tiny")
    (cached / "refs" / "main").write_text("abc")
    refused("org/tiny", "shoal fetch model org/tiny")
    snapshot = make(cached / "snapshots" / "abc")
    assert find_model("org/tiny") == snapshot
    refused("org/tinny", "Did you mean org/tiny\\?")
    (snapshot / "model.safetensors").unlink()  # a snapshot of the tokenizer alone
    refused("org/tiny", "shoal fetch model org/tiny")
    (cached / "refs" / "main").write_text("../../../..")
    refused("org/tiny", "shoal fetch model org/tiny")


def test_a_name_that_is_nowhere_says_what_to_do(home: Path) -> None:
    message = refused(
        "org/tiny", "there is no folder org/tiny and no models/org/tiny; shoal fetch model org/tiny fetches it"
    )
    for file in (
        "config.json",
        "*.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "into models/org/tiny",
    ):
        assert file in message
    assert "shoal fetch" not in refused("./no/such/folder", "there is no folder ./no/such/folder")


@pytest.mark.parametrize(
    ("name", "why"), [("~nosuchuser/x", "home directory"), ("x" * 300, "File name too long"), ("locked/x", "no right")]
)
def test_where_nobody_can_tell_whether_there_is_one(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Path.exists

    def exists(path: Path) -> bool:
        if path.parent.name == "locked":  # as in Python 3.11 below a folder without permissions
            raise PermissionError(13, "no right", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "exists", exists)
    refused(name, f"cannot look for {re.escape(name)}: .*{why}")
    with pytest.raises(DataError, match=f"no such tokenizer.*{why}"):
        load_tokenizer(name)
    with pytest.raises(ConfigError, match=f"data.tokenizer (.|\n)*{why}"):
        resolve(None, [("train.steps", "1", ""), ("data.tokenizer", name, "--data.tokenizer")])


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_a_cache_in_the_home_of_nobody(home: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "~nosuchuser/x")
    message = refused("org/tiny", "cannot look for models in ~nosuchuser/x(/[a-z/]*)?: .*home directory")
    assert message.endswith("Set HF_HUB_CACHE to a folder")
    assert find_model(str(make(home / "here"))) == home / "here"


def test_a_user_without_a_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> None:
        raise KeyError

    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    refused("org/tiny", "cannot look for models in ~/.cache/huggingface/hub: .*Set HF_HUB_CACHE to a folder")


def test_a_misspelt_name_is_recognized(home: Path) -> None:
    make(home / "models" / "HuggingFaceTB" / "SmolLM2-135M")
    make(home / "models" / ".half.partial")
    for name in ("SmolLM2-135M", "smollm2-135m", "HuggingFaceTB/SmolLM-135M", "huggingface/SmolLM2-135M"):
        refused(name, "Did you mean HuggingFaceTB/SmolLM2-135M\\?")
    assert "is it" not in refused("gpt2", "shoal fetch model gpt2")
    assert "partial" not in refused("halv", "shoal fetch model halv")
    refused("half", "models/half is not complete yet; shoal fetch model half resumes the fetch")


def test_a_path_that_nobody_may_look_at_has_none_near(monkeypatch: pytest.MonkeyPatch) -> None:
    assert near_path("~nosuchuser/books") == ""

    def refuse(*_: object, **__: object) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "is_dir", refuse)  # as Python 3.11 and 3.12 do in a folder without permissions
    assert near_path("/locked/books") == ""
