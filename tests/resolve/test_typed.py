"""Flags: they override a recipe, also by related options, and accept other projects' names."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from shoal.bench.trial import DEFAULT
from shoal.commands.flags import read_overrides
from shoal.commands.parser import build_parser
from shoal.config.options import Model, options
from shoal.config.presets import resolve_shape
from shoal.data.prepare import prepare
from shoal.errors import ConfigError
from shoal.plan.length import count_steps
from shoal.report.amounts import amounts
from shoal.resolve.recipe import PACKAGED, START, candidates, find_recipe, packaged_recipes, read_override
from shoal.resolve.resolve import Resolved, resolve

from .test_resolve import GOOD, problems, write

QUICKSTART = PACKAGED / "quickstart.yaml"


def typed(*words: str, recipe: Path = QUICKSTART) -> Resolved:
    """Return what `shoal train RECIPE WORDS` resolves to."""
    args, rest = build_parser("train").parse_known_args(["train", str(recipe), *words])
    overrides, stray = read_overrides(args, rest)
    assert not stray
    return resolve(args.recipe, overrides)


def refused(*words: str, recipe: Path = QUICKSTART) -> str:
    with pytest.raises(ConfigError) as caught:
        typed(*words, recipe=recipe)
    return "\n".join(map(str, caught.value.problems))


# --- overriding a recipe ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [str(QUICKSTART), DEFAULT, "model: {preset: tiny, dim: 64}\ntrain: {steps: 1}\n"])
@pytest.mark.parametrize("preset", ["gpt2", "smollm2-135m"])
def test_a_shape_that_is_typed_is_all_of_the_shape(tmp_path: Path, recipe: str, preset: str) -> None:
    path = Path(recipe) if recipe.endswith(".yaml") else write(tmp_path, recipe)
    (tmp_path / "alone").mkdir()
    alone = resolve(write(tmp_path / "alone", {"model": {"preset": preset}, "train": {"steps": 1}})).config.model
    found = typed("--model.preset", preset, recipe=path)
    assert found.config.model == alone
    assert all(key in found.notes[0] for key in ("--model.preset", "model.dim"))
    assert found.sources["model.dim"] == f"preset {preset}"
    lost = {key for key in found.replaced if key != "model.preset"}
    assert lost == {f"model.{k}" for k in yaml.safe_load(path.read_text())["model"] if k != "preset"}


def test_what_else_is_typed_changes_the_shape_that_is_typed() -> None:
    found = typed("--model.preset", "gpt2", "--model.num_layers", "3")
    assert (found.config.model.num_layers, found.config.model.dim) == (3, 768)


@pytest.mark.parametrize("length", ["steps", "tokens", "epochs"])
def test_a_length_that_is_typed_replaces_the_recipes(tmp_path: Path, length: str) -> None:
    for said in ("steps", "tokens", "epochs"):
        train = typed(f"--train.{length}", "7", recipe=write(tmp_path, {"train": {said: 900}})).config.train
        given = {k: getattr(train, k) for k in ("steps", "tokens", "epochs") if getattr(train, k) is not None}
        assert given == {length: 7}
    assert "both set" in refused("--train.steps", "7", "--train.epochs", "1")


@pytest.mark.parametrize(
    ("said", "words", "lost"),
    [
        ({"data": {"corpus": "text", "paths": ["docs"]}}, ["--data.corpus", "stdlib"], "data.paths"),
        ({"data": {"corpus": "stdlib"}}, ["--data.paths", "docs"], "data.corpus"),
        ({"data": {"corpus": "tokens", "tokenizer": "bytes", "paths": ["docs"], "token_type": "int32"}}, ["--data.corpus", "text"], "data.token_type"),
        ({"data": {"corpus": "datasets", "paths": ["a/b"], "val_split": "test"}}, ["--data.val_fraction", "0.1"], "data.val_split"),
        ({"data": {"paths": ["docs"], "val_fraction": 0.1}}, ["--data.val_paths", "docs"], "data.val_fraction"),
        ({"data": {"paths": ["docs"], "separator": "="}}, ["--data.corpus", "parquet"], "data.separator"),
        ({"data": {"paths": ["docs"], "wikitext": True}}, ["--data.corpus", "dummy"], "data.wikitext"),
        ({"model": {"qk_norm": True}}, ["--model.family", "gpt2"], "model.qk_norm"),
        ({"model": {"family": "gpt2", "dropout": 0.1}}, ["--model.family", "llama"], "model.dropout"),
        ({"optim": {"name": "muon", "muon_momentum": 0.9}}, ["--optim.name", "adamw"], "optim.muon_momentum"),
        ({"parallel": {"dp_shard": 2, "reshard_after_forward": "never"}}, ["--parallel.dp_shard", "1"], "parallel.reshard_after_forward"),
        ({"parallel": {"cp": 2, "cp_method": "ulysses"}}, ["--parallel.cp", "1"], "parallel.cp_method"),
        ({"parallel": {"pp": 2, "pp_schedule": "zbv"}}, ["--parallel.pp", "1"], "parallel.pp_schedule"),
        ({"train": {"compile": True, "activation_checkpointing": "budget", "activation_budget": 0.3}}, ["--train.activation_checkpointing", "full"], "train.activation_budget"),
        ({"launch": {"nodes": 2, "rendezvous": "a:1"}}, ["--launch.nodes", "1"], "launch.rendezvous"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_the_typed_leaves_no_room_for_is_replaced(
    tmp_path: Path, said: dict[str, dict[str, object]], words: list[str], lost: str
) -> None:
    recipe = write(tmp_path, {**said, "train": {"steps": 1, **said.get("train", {})}})
    resolve(recipe)
    found = typed(*words, recipe=recipe)
    assert lost in found.replaced
    assert lost in found.notes[0]
    assert words[0] in found.notes[0]


def test_paths_say_what_kind_of_corpus_it_is(tmp_path: Path) -> None:
    kinds = {
        "a.jsonl": "jsonl", "a.jsonl.gz": "jsonl", "*.jsonl": "jsonl", "a.jsonl a.jsonl.gz": "jsonl",
        "a.txt": "text", "texts": "text", "a.txt.gz": "text", "a.log": "text", "*.txt": "text", "a.txt texts": "text",
        "a.json": "files", "a.JSON.gz": "files", "a.csv": "files", "a.tsv": "files", "a.parquet": "files",
        "a.arrow": "files", "a.jsonl.zst": "files", "a.txt.xz": "files", "*.parquet": "files", "**/*.json": "files",
        "a.jsonl a.txt": "files", "texts a.parquet": "files", "a.bin": "tokens", "a.npy a.ds": "tokens",
    }  # fmt: skip
    (tmp_path / "texts").mkdir()
    for name in " ".join(kinds).split():
        (tmp_path / name.replace("*", "x")).touch() if "**" not in name else None
    for names, corpus in kinds.items():
        recipe = write(
            tmp_path, {**GOOD, "data": {"paths": [str(tmp_path / n) for n in names.split()], "tokenizer": "bytes"}}
        )
        assert resolve(recipe).config.data.corpus == corpus, names


@pytest.mark.parametrize(
    ("files", "kind", "left_out"),
    [
        ("README.md LICENSE.txt .hidden/a.txt data/a.parquet data/b.parquet", "parquet", "LICENSE.txt, README.md"),
        ("README_zh.md a.jsonl", "jsonl", "README_zh.md"),
        ("readme.md a.csv.gz b.tsv", "csv", "readme.md"),
        ("README.md dataset_info.json state.json a.arrow", "arrow", "README.md"),
        ("README.md a.json", "json", "README.md"),
        ("a.parquet b.jsonl", "files", ""),
        ("README.md notes.txt", "text", ""),
        ("a.py README.md settings.json", "text", ""),
        ("a.txt README.md b.parquet", None, r"data files \(parquet \(1\)\) and texts \(.txt \(1\)\); set data.corpus to parquet"),
        ("README.md a.jsonl b.parquet", None, "and texts .README.md.; set data.corpus to jsonl, parquet"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pattern", ["", "/*", "/**"])
def test_a_folder_of_data_files_is_not_a_corpus_of_its_readme(
    files: str, kind: str | None, left_out: str, pattern: str, tmp_path: Path
) -> None:
    for name in files.split():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    recipe = write(tmp_path, {**GOOD, "data": {"paths": [f"{tmp_path}/in{pattern}"], "tokenizer": "bytes"}})
    if kind is None:
        with pytest.raises(ConfigError, match=left_out):
            resolve(recipe)
        return
    found = resolve(recipe)
    assert found.config.data.corpus == kind
    assert [note.endswith(f"not read: {left_out}") for note in found.notes] == [True] * bool(left_out)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"corpus": "parquet"}, "a parquet corpus needs files or folders; set data.paths"),
        ({"corpus": "files"}, "a files corpus needs files or folders; set data.paths"),
        ({"corpus": "dummy", "paths": ["docs"]}, "set data.corpus to files"),
        ({"paths": ["nowhere/*.parquet"]}, r"data.paths does not exist: nowhere/\*.parquet \(no file matches"),
        ({"corpus": "jsonl", "paths": ["docs"], "separator": "===" }, "data.separator has no effect on a jsonl corpus"),
        ({"corpus": "stdlib", "separator": "==="}, "data.separator has no effect on a stdlib corpus"),
        ({"paths": ["docs"], "separator": " "}, "data.separator is blank"),
        ({"paths": ["a.csv", "b.parquet"], "separator": "==="}, "data.separator has no effect on csv and parquet files"),
        ({"paths": ["docs"], "separator": "===", "wikitext": True}, "no effect with data.wikitext"),
        ({"corpus": "dummy", "wikitext": True}, "data.wikitext has no effect on a dummy corpus"),
        ({"corpus": "dummy", "bad_records": 2}, "data.bad_records has no effect on a dummy corpus"),
        ({"bad_records": -1}, "data.bad_records must be an integer of at least 0"),
    ],
)  # fmt: skip
def test_options_of_a_corpus_that_do_not_fit(tmp_path: Path, data: dict[str, object], says: str) -> None:
    folder = {"folder": str(tmp_path)}  # without prepared tokens, whose corpus may be gone
    with pytest.raises(ConfigError, match=says):
        resolve(write(tmp_path, {**GOOD, "data": {**folder, **data}}))


def test_a_warm_up_longer_than_the_run_is_a_remark() -> None:
    found = typed("--train.steps", "10")
    assert found.config.optim.warmup_steps == 20
    assert ["optim.warmup_steps" in note and "train.steps" in note for note in found.notes] == [True]
    assert not typed("--train.steps", "20").notes


# --- by other names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--lr", "3e-4"], "optim.lr", 3e-4),
        (["--max_steps", "50"], "train.steps", 50),
        (["--max-steps", "50"], "train.steps", 50),
        (["--batch_size=16"], "train.global_batch", 16),
        (["--steps", "50"], "train.steps", 50),
        (["--compile"], "train.compile", True),
        (["--dtype", "bf16"], "train.dtype", "bfloat16"),
        (["--train.dtype", "fp32"], "train.dtype", "float32"),
        (["--precision", "FP16", "--optim.name", "adamw"], "train.dtype", "float16"),
        (["--train.dtype", "half", "--optim.name", "adamw"], "train.dtype", "float16"),
        (["--name", "x"], "launch.name", "x"),
        (["--lr", "1", "--optim.lr", "2"], "optim.lr", 2.0),
        (["--optim.lr", "2", "--lr", "1"], "optim.lr", 1.0),
    ],
)
def test_flags_that_people_know(words: list[str], key: str, value: object) -> None:
    section, _, option = key.partition(".")
    assert getattr(getattr(typed(*words).config, section), option) == value


def test_a_flag_that_a_later_one_replaces_is_a_note() -> None:
    assert typed("--lr", "1", "--optim.lr", "2").notes == ("--lr 1 has no effect: --optim.lr 2 follows",)
    assert not typed("--lr", "2", "--optim.lr", "2").notes


def test_each_name_is_one_options_flag_or_says_which_it_may_be() -> None:
    names = {name for key, f in options().items() for name in (key.partition(".")[2], *f.metadata["alias"])}
    parser = build_parser("train")
    for name in names - {"name", "processes"}:
        args, rest = parser.parse_known_args(["train", f"--{name}=1"])
        [(key, _, flag)], _ = read_overrides(args, rest)
        assert flag == f"--{name}"
        meant = candidates(name)
        assert [key] == (meant if len(meant) == 1 else [name])
    for name in ("block_size", "out_dir", "context_length", "every"):
        said = refused(f"--{name}", "8")
        assert f"--{name}" in said
        assert all(key in said for key in candidates(name))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--min_lr", "1e-5"], "optim.final_lr_fraction"),  # a rate, while ours is a fraction of the peak
        (["--eval_iters", "200"], "train.eval_tokens"),
        (["--zero", "3"], "parallel.dp_shard"),
        (["--model", "tiny"], "--model.OPTION"),
        (["--model.preset", "tinny"], "did you mean tiny?"),
        (["--processes", "200"], "launch.processes to 4"),
        (["--data.paths", "recip"], "data.paths"),
        (["--data.paths", "a", "--data.paths", "b"], "separate its values by commas: --data.paths A,B"),
        (["--data.tokenizer", "nope.json"], "nope.json was not found: there is no such file; set it to bpe"),
        (["--data.sources.st", "x"], "set data.sources.st.paths, or another of"),
    ],
)
def test_what_is_close_is_named_and_not_taken(words: list[str], named: str) -> None:
    said = refused(*words)
    assert words[0] in said
    assert named in said


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("model: tiny\n", "model: {preset: tiny}"),
        ("optim: adamw\n", "optim: {name: adamw}"),
        ("optimizer: {lr: 1}\n", "did you mean optim?"),
        ("optimizer: adamw\n", "did you mean optim.name?"),
        ("trainer: {max_steps: 1}\n", "did you mean train?"),
        ("lr: 1\n", "did you mean optim.lr?"),
        ("block_size: 8\n", "data.seq_len"),
    ],
)
def test_sections_as_others_have_them_are_explained(tmp_path: Path, text: str, named: str) -> None:
    [found] = problems(tmp_path, text)
    assert named in found


@pytest.mark.parametrize("text", ["a #b", "a\nb", "a: b", "- a", " a", "# a"])
def test_text_without_quotes_stands_as_it_was_typed(text: str) -> None:
    assert read_override("data.folder", text, "").value == text
    assert read_override("data.folder", yaml.safe_dump(text, default_style='"'), "").value == text


# --- names and places -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["x" * 300, "a/b", "..", ".x", "-x", "a\nb", "a\x1b[1m", "a\0b", "\udcff", "é" * 101, ""]
)
def test_what_cannot_be_a_folders_name_is_refused(tmp_path: Path, name: str) -> None:
    [found] = problems(tmp_path, GOOD, ("launch.name", name, "--name"))
    assert found.startswith("--name: launch.name")
    assert found.isprintable()
    assert len(found) < 300


def test_a_recipe_is_found_by_its_path_then_beside_it_then_among_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "start", "learn/01-one-device"} <= set(packaged_recipes())
    for name in packaged_recipes():
        assert find_recipe(Path(name)) == PACKAGED / f"{name}.yaml"
    (tmp_path / "quickstart").mkdir()  # a folder is not a recipe
    assert find_recipe(Path("quickstart")) == QUICKSTART
    (tmp_path / "quickstart.yaml").touch()
    assert find_recipe(Path("quickstart")) == Path("quickstart.yaml")
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").touch()
    assert find_recipe(Path("quickstart")) == Path("quickstart")
    assert find_recipe(Path("nowhere")) == Path("nowhere")


def test_what_is_no_recipe_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("mine.yaml").touch()
    assert "did you mean quickstart?" in refused(recipe=Path("quickstat"))
    assert "did you mean mine.yaml?" in refused(recipe=Path("mien.yaml"))
    assert "not a regular file" in refused(recipe=Path("pipe"))  # each process would have to read it
    assert "is a folder" in refused(recipe=tmp_path)
    assert "cannot be read" in refused(recipe=Path("x" * 300 + ".yaml"))


def test_a_recipe_in_another_encoding(tmp_path: Path) -> None:
    """Reject UTF-16, as PowerShell's `shoal config > mine.yaml` writes it."""
    (tmp_path / "a.yaml").write_text("train: {steps: 1}\n", encoding="utf-16")
    assert "is not UTF-8" in refused(recipe=tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("train: {steps: 7}\n", encoding="utf-8-sig")
    assert resolve(tmp_path / "a.yaml").config.train.steps == 7


@pytest.mark.parametrize(
    "layout",
    [["dp_replicate", "2"], ["dp_shard", "2"], ["tp", "2"], ["cp", "2"], ["pp", "2"], ["dp_replicate", "4"], ["dp_shard", "4"],
     ["tp", "4"], ["cp", "4"], ["pp", "4"], ["tp", "2", "cp", "2"], ["tp", "2", "pp", "2"], ["cp", "2", "pp", "2"],
     ["dp_shard", "2", "tp", "2"], ["dp_shard", "2", "pp", "2"], ["dp_shard", "2", "cp", "2"]],
)  # fmt: skip
@pytest.mark.parametrize("method", ["allgather", "ulysses"])
def test_the_quickstart_takes_every_layout(layout: Sequence[str], method: str) -> None:
    flags = [f"--parallel.{axis}={size}" for axis, size in zip(layout[::2], layout[1::2], strict=True)]
    blocks = (
        ["--model.num_layers", "4"] if layout == ["pp", "4"] else []
    )  # it has two, one for each stage of a pipeline
    typed(*flags, *blocks, *(["--parallel.cp_method", method] if "cp" in layout else []))


# --- sizes -------------------------------------------------------------------------------------


def test_the_amounts_of_a_config(tmp_path: Path) -> None:
    recipe = write(tmp_path, {
        "model": {"dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 64, "max_seq_len": 64, "tie_embeddings": True},
        "data": {"corpus": "dummy", "dummy_documents": 60, "tokenizer": "bytes", "seq_len": 32, "folder": str(tmp_path / "d")},
        "train": {"epochs": 2, "global_batch": 16, "micro_batch": 2},
        "parallel": {"dp_shard": 2},
        "launch": {"processes": 2},
    })  # fmt: skip
    config = resolve(recipe).config
    before = dict(line.split(": ", 1) for line in amounts(config))
    # embedding; four square matrices, three of the feed-forward; three norms
    parameters = 257 * 32 + 4 * 32 * 32 + 3 * 32 * 64 + 3 * 32
    assert before["parameters"] == f"{parameters:,}"
    assert before["tokens"].startswith("512 per step;")
    rows = len(prepare(config.data).split("train", seq_len=32))
    steps = -(-2 * rows // 16)
    after = dict(line.split(": ", 1) for line in amounts(config))
    assert after["steps"] == f"{steps:,}"
    assert steps == count_steps(config.train, 32, rows)
    assert after["tokens"] == f"512 per step, {512 * steps:,} in total"
    assert float(after["epochs"]) == pytest.approx(steps * 16 / rows, rel=5e-3)
    assert "dp_shard 2" in after["memory"]
    assert float(after["memory"].split()[0]) == pytest.approx(16 * parameters / 2 / 1e6, abs=0.05)


def test_a_config_of_a_tokenizer_that_is_not_known_has_amounts_too() -> None:
    shape = resolve_shape(dataclasses.replace(Model(), dim=32, num_heads=2))
    config = (
        resolve(START).config.replace("model", **dataclasses.asdict(shape)).replace("data", tokenizer="nowhere.json")
    )
    assert "embedding" in next(iter(amounts(config)))


SLOW = ("torch", "rich", "tokenizers", "numpy", "huggingface_hub")


@pytest.mark.parametrize(
    ("arguments", "code", "slow"),
    [
        (["train", "quickstart", "--train.setps", "3"], 2, SLOW),
        (["--help"], 0, (*SLOW, "pydantic", "psutil")),
        (["train", "--help"], 0, SLOW),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_refusal_and_help_import_nothing_that_is_slow(arguments: list[str], code: int, slow: tuple[str, ...]) -> None:
    program = (
        f"import sys\nfrom shoal.cli import main\ntry:\n    main({arguments})\nexcept SystemExit as end:\n"
        f"    print(end.code, *(m for m in {slow} if m in sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].split() == [str(code)]
