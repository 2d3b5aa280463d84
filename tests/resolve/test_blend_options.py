"""A blend in recipes and flags: keys of any source, their types, and incompatible values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.config.keys import changed_options
from shoal.errors import ConfigError
from shoal.resolve.resolve import read_back, resolve, to_yaml

SOURCES: dict[str, Any] = {
    "web": {"corpus": "dummy", "weight": 0.7},
    "my.code": {"corpus": "stdlib", "weight": 0.3, "max_epochs": 2},
}


def write(folder: Path, sources: Any = SOURCES, **data: Any) -> Path:
    path = folder / "recipe.yaml"
    data = {"folder": str(folder), "sources": sources, **data}
    path.write_text(yaml.safe_dump({"data": data, "train": {"steps": 9}}, sort_keys=False))
    return path


def test_sources_are_options_of_recipes_and_flags(tmp_path: Path) -> None:
    recipe = write(tmp_path, stages={"1000 steps": {"web": 1}, "2e6 tokens": {"my.code": 1}})
    resolved = resolve(recipe, [("data.sources.web.weight", "2", "--web"), ("data.sources.new.corpus", "dummy", "--new"),
                                ("data.sources.new.weight", "1e-1", "--new")])  # fmt: skip
    sources = resolved.config.data.sources or {}
    assert {name: (s.corpus, s.weight, s.max_epochs) for name, s in sources.items()} == {
        "web": ("dummy", 2.0, None), "my.code": ("stdlib", 0.3, 2.0), "new": ("dummy", 0.1, None),
    }  # fmt: skip
    assert resolved.sources["data.sources.web.weight"] == "--web"
    assert resolved.sources["data.sources.my.code.max_epochs"].endswith("recipe.yaml:10")
    (tmp_path / "saved.yaml").write_text(to_yaml(resolved.config, resolved.sources))
    assert read_back(tmp_path / "saved.yaml") == resolved.config
    assert resolve(tmp_path / "saved.yaml").config == resolved.config


def test_a_resume_may_change_weights_and_stages_alone(tmp_path: Path) -> None:
    before = resolve(write(tmp_path)).config
    after = resolve(
        write(
            tmp_path,
            {**SOURCES, "web": {"corpus": "dummy", "weight": 1, "shortest_document": 3}},
            stages={"5 steps": {"web": 1}},
        )
    ).config
    assert {c.key: (c.before, c.after, c.past) for c in changed_options(before, after)} == {
        "data.stages": (None, {"5 steps": {"web": 1.0}}, False),
        "data.sources.web.weight": (0.7, 1.0, False),
        "data.sources.web.shortest_document": (0, 3, True),
    }
    removed = changed_options(before, resolve(write(tmp_path, {"web": SOURCES["web"]})).config)
    assert any(c.key == "data.sources.my.code.corpus" and c.past for c in removed)


@pytest.mark.parametrize(
    ("sources", "data", "says"),
    [
        ({"web": {"corpus": "dummy", "weights": 1}}, {}, r"no option data.sources.web.weights; did you mean data.sources.web.weight\?"),
        ({"web": {"corpus": "dummy", "weight": -1}}, {}, "data.sources.web.weight must be a number of at least 0"),
        ({"web": {"corpus": "dummy", "text_key": "t"}}, {}, "data.sources.web.text_key has no effect on a dummy corpus, which has no records"),
        ({"web": 3}, {}, "set data.sources.web.paths, or another of"),
        ({"a": {"corpus": "dummy", "weight": 0}, "b": {"corpus": "dummy", "weight": 0}}, {}, "the weights of all sources are 0"),
        ({"web": {"corpus": "dummy", "weight": 1}, "weeb": {"weight": 1}}, {}, "data.sources.weeb has nothing to read; did you mean data.sources.web"),
        ({"a": {"corpus": "dummy", "weight": 1}, "b": {"corpus": "dummy"}}, {}, "data.sources.b has no weight, but others have one"),
        ({"a": {"corpus": "dummy"}, "b": {"corpus": "dummy"}}, {"stages": {"3 steps": {"a": 1}}}, "the sources have none"),
        ({"a": {"corpus": "dummy", "max_epochs": 2}, "b": {"corpus": "dummy"}}, {}, "max_epochs needs weights"),
        ({"a": {"corpus": "text", "weight": 1}}, {}, "a text corpus needs files or folders; set data.sources.a.paths"),
        ({"a": {"paths": ["nowhere.txt"], "weight": 1}}, {}, "data.sources.a.paths does not exist: nowhere.txt"),
        (SOURCES, {"corpus": "dummy"}, "data.corpus has no effect beside data.sources"),
        (SOURCES, {"paths": ["a.txt"]}, r"a problem in the config\n.*data.paths has no effect beside data.sources"),
        (SOURCES, {"stages": {"3 hours": {"web": 1}}}, "'3 hours': it is not a place of the run, such as 1000 steps"),
        (SOURCES, {"stages": {"3 steps": {"wob": 1}}}, "there is no source wob; the sources are web, my.code"),
        (SOURCES, {"stages": {"3 steps": {"web": 0}}}, "at least one must be above 0"),
        (SOURCES, {"stages": {"3 steps": {"web": "much"}}}, "data.stages must be weights by source for each place, such as {20 steps: "),
    ],
)  # fmt: skip
def test_what_cannot_be_a_blend(tmp_path: Path, sources: Any, data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve(write(tmp_path, sources, **data))


def test_stages_need_a_blend(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("data: {corpus: dummy, stages: {3 steps: {a: 1}}}\ntrain: {steps: 3}\n")
    with pytest.raises(ConfigError, match=r"data\.stages needs a blend"):
        resolve(path)


def test_conversations_in_a_source_mask_documents(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").touch()
    chats = {"paths": [str(tmp_path / "chats.jsonl")], "format": "messages", "weight": 1}
    resolved = resolve(write(tmp_path, {**SOURCES, "chats": chats}))
    assert resolved.config.data.document_mask
    assert "data.sources.chats.format" in resolved.sources["data.document_mask"]
