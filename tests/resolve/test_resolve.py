"""Resolved configs: every problem at once, each with its source and a fix."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shoal.config.data_options import BlendSource
from shoal.config.keys import changed_options
from shoal.config.option import option_fields, option_name
from shoal.config.options import Config, Optim, options
from shoal.errors import ConfigError
from shoal.resolve.recipe import nearest
from shoal.resolve.resolve import expectation, read_back, resolve, to_yaml
from shoal.resolve.schema import schema

GOOD = {"model": {"preset": "tiny"}, "train": {"steps": 10}}


def write(folder: Path, content: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def problems(folder: Path, content: object, *overrides: tuple[str, str, str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(write(folder, content), overrides)
    return [str(p) for p in caught.value.problems]


def test_every_problem_is_found_at_once_with_its_line(tmp_path: Path) -> None:
    text = "model:\n  preset: tiny\n  dimm: 3\ntrain:\n  steps: soon\n  learning_rate: 1e-3\nextra: 1\n"
    found = problems(tmp_path, text, ("optim.beta1", "1.5", "--optim.beta1"))
    recipe = tmp_path / "recipe.yaml"
    assert found == [
        f"{recipe}:3: there is no option model.dimm; did you mean model.dim?",
        f"{recipe}:5: train.steps must be an integer of at least 1 (steps), or null, not 'soon'",
        f"{recipe}:6: there is no option train.learning_rate; did you mean optim.lr?",
        f"{recipe}:7: there is no option extra; valid here: the sections model, data, parallel, optim, train, checkpoint, fault, metrics, track, alerts, launch",
        "--optim.beta1: optim.beta1 must be a number of at least 0 and below 1, not 1.5",
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "optim.lr"),
        ("train.learning_rate", "optim.lr"),
        ("n_layer", "model.num_layers"),
        ("gradient_clipping", "optim.clip_norm"),
        ("train.setps", "train.steps"),
        ("train.global-batch", "train.global_batch"),
        ("data.block_size", "data.seq_len"),
        ("model.block_size", "model.max_seq_len"),
        ("model.heads", "model.num_heads"),
        ("optimm", "optim"),
        ("optim.zebra", None),
    ],
)
def test_nearest_knows_other_projects_names_and_typos(key: str, meant: str | None) -> None:
    assert nearest(key) == meant


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    content = {
        "model": {"preset": "gpt2", "num_layers": 3, "max_seq_len": 512},
        "data": {"seq_len": 512},
        "train": {"steps": 10},
        "optim": {"lr": 0.5},
    }
    resolved = resolve(
        write(tmp_path, content),
        [("optim.lr", "3e-4", "--optim.lr"), ("model.vocab_size", "50304", "--model.vocab_size")],
    )
    model = resolved.config.model
    assert (model.family, model.dim, model.num_layers, model.vocab_size) == ("gpt2", 768, 3, 50304)
    assert resolved.config.optim.lr == 3e-4
    sources = resolved.sources
    assert sources["model.dim"] == "preset gpt2"
    assert sources["model.num_layers"].endswith("recipe.yaml:3")
    assert sources["optim.lr"] == "--optim.lr"
    assert sources["optim.beta1"] == "default"
    assert sources["model.head_dim"] == "derived"


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("3E4", 3e4), ("1.5e+2", 150.0), ("0.1", 0.1), ("2", 2.0)])
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    recipe = write(tmp_path, f"model: {{preset: tiny}}\ntrain: {{steps: 10}}\noptim:\n  lr: {text}\n")
    assert resolve(recipe).config.optim.lr == value
    assert resolve(write(tmp_path, GOOD), [("optim.lr", text, "--optim.lr")]).config.optim.lr == value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"train": {"steps": 1}, "model": {"dim": 100, "num_heads": 3}}, "num_heads"),
        ({"train": {"steps": 1}, "model": {"num_heads": 4, "num_kv_heads": 3}}, "num_kv_heads"),
        (
            {"train": {"steps": 1, "global_batch": 10, "micro_batch": 4}},
            "does not divide train.global_batch 10; set train.global_batch to 12",
        ),
        (
            {"train": {"steps": 1, "global_batch": 8, "micro_batch": 8}, "launch": {"processes": 2}},
            "launch.processes to 1, or train.global_batch to 16, or train.micro_batch to 4",
        ),
        (
            {"train": {"steps": 1}, "launch": {"processes": 2}, "parallel": {"dp_replicate": 4}},
            "needs 4 processes, but launch.processes is 2",
        ),
        ({"train": {}}, "the length of the run is not set"),
        ({"train": {"steps": 1, "epochs": 2}}, "train.steps and train.epochs are both set"),
        ({"train": {"steps": 1}, "data": {"seq_len": 4096}}, "exceeds model.max_seq_len"),
        ({"train": {"steps": 1}, "data": {"corpus": "text"}}, "set data.paths"),
        (
            {"train": {"steps": 1}, "data": {"corpus": "text", "paths": ["nowhere.txt"]}},
            "data.paths does not exist: nowhere.txt",
        ),
        ({"train": {"steps": 1}, "data": {"tokenizer": "nowhere.json"}}, "data.tokenizer nowhere.json was not found"),
        ({"train": {"steps": 1}, "model": {"vocab_size": 1000}}, "smaller than the tokenizer's 4096"),
        ({"train": {"steps": True}}, "train.steps must be an integer"),
        ({"train": {"steps": 1}, "optim": {"lr": ".inf"}}, "optim.lr must be a number above 0"),
        (
            {"train": {"steps": 1, "dtype": "fp17"}},
            "train.dtype must be auto | bfloat16 | float16 | float32, not 'fp17'",
        ),
        ({"train": {"steps": 1}, "model": {"preset": "gtp2"}}, "did you mean gpt2?"),
        ({"train": {"steps": 1}, "model": {"preset": ["gpt2"]}}, "there is no preset ['gpt2']"),
        ({"train": {"steps": 1}, "launch": {"name": "../x"}}, "launch.name '../x' cannot name a folder"),
        ({"train": {"steps": 1}, "launch": {"name": ""}}, "launch.name '' cannot name a folder"),
        ({"train": 3}, "train is a section"),
        ("- a\n- b\n", "expected sections"),
        ("train: [1, 2\n", "not YAML"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(tmp_path: Path, content: object, words: str) -> None:
    assert any(words in p for p in problems(tmp_path, content)), problems(tmp_path, content)


def test_a_key_that_stands_twice_is_a_problem(tmp_path: Path) -> None:
    [found] = problems(tmp_path, "train:\n  steps: 1\n  steps: 2\n")
    assert "is here and at" in found


def test_a_saved_config_reads_back_equal(tmp_path: Path) -> None:
    resolved = resolve(write(tmp_path, GOOD | {"data": {"corpus": "text", "paths": [str(tmp_path)]}}))
    (tmp_path / "saved.yaml").write_text(to_yaml(resolved.config), encoding="utf-8")
    assert read_back(tmp_path / "saved.yaml") == resolved.config
    assert yaml.safe_load(to_yaml(resolved.config, resolved.sources))["data"]["paths"] == [str(tmp_path)]


@pytest.mark.parametrize("name", ["1e3", "08", "0x1f", "1:30", "yes", "null", "2026-01-01", ".5", "a: b", "-"])
def test_a_run_keeps_its_name(tmp_path: Path, name: str) -> None:
    config = resolve(write(tmp_path, GOOD)).config.replace("launch", name=name)
    (tmp_path / "saved.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert read_back(tmp_path / "saved.yaml").launch.name == name
    assert yaml.safe_load(to_yaml(config))["launch"]["name"] == name


def test_differences_know_what_would_change_the_past() -> None:
    before = Config()
    after = before.replace("model", dim=512).replace("train", steps=7)
    assert [(d.key, d.before, d.after, d.past) for d in changed_options(before, after)] == [
        ("model.dim", 256, 512, True),
        ("train.steps", None, 7, False),
    ]


def test_every_option_says_what_it_is_and_no_alias_is_ambiguous_within_its_section() -> None:
    for key, f in options().items():
        assert f.metadata["help"], key
        assert expectation(key), key
        siblings = [k for k, o in options().items() if k != key and k.split(".")[0] == key.split(".")[0]]
        for alias in f.metadata["alias"]:
            assert not any(alias == s.split(".")[1] or alias in options()[s].metadata["alias"] for s in siblings), (
                key,
                alias,
            )


def test_sections_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Optim().lr = 1.0  # type: ignore[misc]


def test_the_schema_describes_every_option_and_admits_a_recipe() -> None:
    described = schema()
    sections = {s: ref if "properties" in ref else ref["anyOf"][0] for s, ref in described["properties"].items()}
    keys = {f"{s}.{k}" for s, ref in sections.items() for k in ref["properties"]}
    assert keys == {*options(), "data.sources"}
    source = described["properties"]["data"]["properties"]["sources"]["additionalProperties"]["properties"]
    assert set(source) == {option_name(f) for f in option_fields(BlendSource)}
    assert json.loads(json.dumps(described)) == described
    words = [described["properties"]["parallel"], sections["train"]["properties"]["micro_batch"]]
    assert all(each["anyOf"][1]["const"] == "auto" for each in words)


def test_a_bad_config_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom shoal.cli import main\n"
        f"sys.argv = ['shoal', 'train', {str(write(tmp_path, {'train': {'setps': 3}}))!r}, '--optim.learning_rate', '3']\n"
        "try:\n    main()\nexcept SystemExit as e:\n    print(e.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["2", "False"]
    assert "did you mean train.steps?" in done.stderr
    assert "--optim.learning_rate: there is no option optim.learning_rate; did you mean optim.lr?" in done.stderr
    assert "Traceback" not in done.stderr


def test_conversations_do_not_read_each_other(tmp_path: Path) -> None:
    """data.format sets data.document_mask, unless the user does."""
    path = tmp_path / "chats.jsonl"
    path.write_text("{}\n")
    asked = [("data.paths", str(path), "--data.paths"), ("data.format", "sharegpt", "--data.format")]
    derived = resolve(write(tmp_path, GOOD), asked)
    assert derived.config.data.document_mask
    assert derived.sources["data.document_mask"] == "data.format at --data.format"
    assert not any("document_mask" in note for note in derived.notes)
    asked.append(("data.document_mask", "false", "--data.document_mask"))
    against = resolve(write(tmp_path, GOOD), asked)
    assert not against.config.data.document_mask
    assert any("data.document_mask is false with data.format sharegpt" in note for note in against.notes)
    assert not resolve(write(tmp_path, GOOD)).config.data.document_mask


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"template": "chatml"}, "data.template has no effect on data.format text"),
        ({"learn": "all"}, "data.learn has no effect on data.format text"),
        ({"broken_conversations": "keep"}, "data.broken_conversations has no effect on data.format text"),
        ({"format": "alpaca"}, "a stdlib corpus has no records, which data.format alpaca needs; set data.corpus to jsonl"),
        ({"format": "messages", "corpus": "jsonl", "paths": ["."], "template": "vicuna"}, "data.template vicuna was not found"),
        ({"format": "alpaca", "corpus": "jsonl", "paths": ["."], "text_key": "x"}, "data.text_key has no effect on data.format"),
        ({"format": "chat"}, "data.format must be text | alpaca | messages | sharegpt"),
    ],
)  # fmt: skip
def test_options_of_conversations_that_have_no_effect(tmp_path: Path, data: dict[str, object], says: str) -> None:
    found = problems(tmp_path, {**GOOD, "data": data})
    assert len(found) == 1
    assert says in found[0]
