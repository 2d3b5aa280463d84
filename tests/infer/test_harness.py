"""lm-evaluation-harness tasks, really run: its numbers on an exported model equal shoal's own."""

from __future__ import annotations

import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.errors import DataError, ShoalError
from shoal.infer import harness
from shoal.infer.asked import Tasks, Wanted
from shoal.infer.harness import run_tasks
from shoal.infer.load import LoadedModel, load, load_folder
from shoal.infer.score import score

from ..cli.commands import Place
from .folders import talker

TEXTS = ["a text that is short", "another one, a bit longer; größer"]
QUESTIONS = [
    {"question": f"What is {i} + {i}?", "choices": [f"{2 * i}", "a fish", "none of them"], "answer": i % 3}
    for i in range(12)
]
NAMES = ("small_choices", "small_texts")
CHOICES = """
task: small_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
ROLLING = """
task: small_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two user tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "choices.yaml").write_text(CHOICES.format(folder=folder))
    (folder / "texts.yaml").write_text(ROLLING.format(folder=folder))
    (folder / "choices.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return folder


@pytest.fixture(scope="module")
def done(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run."""
    folder = tmp_path_factory.mktemp("trained") / "place"
    return shutil.copytree(finished, folder, symlinks=True) / "runs" / "done"


def our_bits_per_byte(model: LoadedModel) -> float:
    """Return the bits per byte of `TEXTS` by the harness's rule: put the end of text first, then score the whole text."""
    tokenizer = model.need_tokenizer()
    nats = sum(score(model.model, [tokenizer.eot_id, *tokenizer.encode(t)], context=64, stride=64).nats for t in TEXTS)
    return nats / math.log(2) / sum(len(t.encode()) for t in TEXTS)


def our_accuracy(model: LoadedModel) -> float:
    tokenizer = model.need_tokenizer()

    def log_likelihood(question: str, choice: str) -> float:
        before, after = tokenizer.encode(question), tokenizer.encode(" " + choice)
        with torch.no_grad():
            logits = model.model.logits(model.model(torch.tensor([before + after])))[0].log_softmax(-1)
        return sum(logits[len(before) - 1 + i, token].item() for i, token in enumerate(after))

    right = 0
    for question in QUESTIONS:
        scores = [log_likelihood(str(question["question"]), choice) for choice in question["choices"]]  # type: ignore[attr-defined]
        right += scores.index(max(scores)) == question["answer"]
    return right / len(QUESTIONS)


@pytest.mark.ci
def test_its_numbers_are_ours(tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = str(talker(tmp_path, "gpt2"))
    figures, table = run_tasks(Wanted(tmp_path, folder=folder, device="cpu", dtype="float32"), Tasks(NAMES, tasks))
    model = load_folder(folder, device="cpu", dtype="float32")
    assert figures["small_texts"]["bits_per_byte"] == pytest.approx(our_bits_per_byte(model), abs=1e-4)
    assert figures["small_choices"]["acc"] == pytest.approx(our_accuracy(model))
    assert all(name in table for name in NAMES)


@pytest.mark.ci
def test_a_run_is_exported_for_it(tasks: Path, done: Path) -> None:
    pytest.importorskip("lm_eval")
    place = Place(done.parents[1])
    said = place.good("eval", "done", "--tasks", "small_texts", "--include-path", str(tasks), "--json")
    figures = json.loads(next(line for line in said.splitlines() if line.startswith("{")))["tasks"]
    run = load(Wanted(done.parent, "done", device="cpu", dtype="float32"))
    assert figures["small_texts"]["bits_per_byte"] == pytest.approx(our_bits_per_byte(run), abs=1e-4)


def test_a_task_that_is_not_there_or_has_no_data(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = pytest.importorskip("lm_eval.tasks")
    # listing the harness's own 14,683 tasks takes nine seconds; the test above covers them
    monkeypatch.setattr(there, "TaskManager", partial(there.TaskManager, include_defaults=False))
    wanted = Wanted(tmp_path, folder=str(talker(tmp_path / "model")), device="cpu")
    with pytest.raises(DataError, match="no task small_choice; did you mean small_choices"):
        run_tasks(wanted, Tasks(("small_choice",), tasks))
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "texts.yaml").write_text(ROLLING.format(folder=gone))
    with pytest.raises(DataError, match="cannot read the data of small_texts"):
        run_tasks(wanted, Tasks(("small_texts",), gone))


@pytest.mark.parametrize(
    ("trained", "asked", "quick", "computed"),
    [
        ("bfloat16", "auto", True, "bfloat16"), ("bfloat16", "auto", False, "float32"), ("float32", "auto", True, "float32"),
        ("float16", "auto", True, "float32"), ("bfloat16", "float32", True, "float32"), ("float32", "bfloat16", False, "bfloat16"),
    ],
)  # fmt: skip
def test_a_run_is_computed_in_what_it_was_trained_in(
    trained: str, asked: str, quick: bool, computed: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dtype of computation is the one that `load_run` chooses, although the weights are exported in float32."""
    run = shutil.copytree(done, tmp_path / "done", symlinks=True)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("dtype: float32", f"dtype: {trained}"))
    monkeypatch.setattr("shoal.infer.load.multiplies_bfloat16", lambda: quick)
    told: list[dict[str, str]] = []

    def evaluate(*, model_args: dict[str, str], **_: object) -> dict[str, Any]:
        told.append(model_args)
        return {"results": {}}

    lm_eval = SimpleNamespace(
        simple_evaluate=evaluate,
        tasks=SimpleNamespace(TaskManager=lambda **_: SimpleNamespace(all_tasks=["a"])),
        utils=SimpleNamespace(make_table=str),
    )
    monkeypatch.setattr(harness, "_import", lambda: lm_eval)
    wanted = Wanted(tmp_path, "done", device="cpu", dtype=asked)
    run_tasks(wanted, Tasks(("a",)))
    assert [model["dtype"] for model in told] == [computed]
    assert str(load(wanted).model.compute_dtype) == f"torch.{computed}"


def test_without_the_harness_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ShoalError, match=r"shoal\[eval\]"):
        run_tasks(Wanted(tmp_path, folder=str(tmp_path)), Tasks(("hellaswag",)))
