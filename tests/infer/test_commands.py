"""`shoal eval` and `shoal generate` on a folder and on a run, and their messages for invalid input."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import _run
from shoal.data.tokens.tokenize import load_tokenizer
from shoal.errors import CheckpointError, ShoalError
from shoal.infer import commands
from shoal.infer import load as load_module
from shoal.infer.asked import Text
from shoal.infer.load import load_folder
from shoal.infer.score import score
from shoal.models.generate import generate
from shoal.training.evaluate import HeldOut

from ..cli.commands import Place
from ..hub.small import save
from .folders import talker

TEXT = "A text that no model here was trained on: größer, 漢字.\n" * 4


@pytest.fixture(scope="module")
def place(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with models, a text and a finished run."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("place") / "place", symlinks=True)
    talker(folder / "talker")
    talker(folder / "begins", bos=True)
    save("llama", folder / "mute")
    (folder / "mute" / "tokenizer.json").unlink()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "empty.txt").write_text("")
    (folder / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert _run(list(arguments)) == 0
    return capsys.readouterr().out


def test_a_text_is_scored_with_its_windows_stated(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("eval", "--model.from", "talker", "--text", "text.txt", "--context", "32", "--stride", "8")
    record = json.loads(said(capsys, *arguments, "--dtype", "float32", "--json"))
    model = load_folder("talker", device="cpu", dtype="float32")
    tokenizer = model.need_tokenizer()
    result = score(model.model, [tokenizer.eot_id, *tokenizer.encode(TEXT)], context=32, stride=8)
    assert record["tokens"] == result.tokens == len(TEXT.encode())
    assert record["bytes"] == len(TEXT.encode())
    assert (record["context"], record["stride"], record["windows"]) == (32, 8, result.windows)
    assert record["nats_per_token"] == pytest.approx(result.nats_per_token, rel=1e-6)
    assert record["perplexity"] == pytest.approx(math.exp(record["nats_per_token"]))
    assert record["bits_per_byte"] == pytest.approx(result.nats / math.log(2) / len(TEXT.encode()), rel=1e-6)
    text = said(capsys, *arguments)
    assert f"{record['bits_per_byte']:.4f}" in text
    assert "windows of 32 tokens, 8 apart" in text


def test_a_byte_order_mark_is_not_scored(tmp_path: Path) -> None:
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    found = Text.read(tmp_path / "marked.txt")
    assert (found.content, found.bytes) == (TEXT, len(TEXT.encode()))


def test_what_begins_a_document_stands_first_and_then_all_is_scored(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(said(capsys, "eval", "--model.from", "begins", "--text", "text.txt", "--json"))
    assert record["tokens"] == len(TEXT.encode())
    assert record["context"] == 128
    assert record["stride"] == 64
    assert record["first_token_after"] == "<|im_start|>"


@pytest.mark.parametrize("kind", ["none", "named", "put before"])
def test_the_first_token_is_predicted_after_the_one_that_the_harness_takes(kind: str, tmp_path: Path) -> None:
    """The harness's `prefix_token_id` is the bos_token of transformers' tokenizer, or its eos_token if it has no bos_token."""
    from transformers import AutoTokenizer

    folder = talker(tmp_path / "model", bos=kind == "put before")
    described = folder / "tokenizer_config.json"
    if kind == "named":
        described.write_text(json.dumps(json.loads(described.read_text()) | {"bos_token": "<|im_end|>"}))
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.eos_token_id if theirs.bos_token_id is None else theirs.bos_token_id
    assert commands.first_token(load_tokenizer(str(folder)), folder) == expected
    assert expected == {"none": 256, "named": 258, "put before": 257}[kind]


def test_a_run_is_scored_on_a_text_or_on_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    of_text = json.loads(said(capsys, "eval", "done", "--text", "text.txt", "--json"))
    assert of_text["step"] == 4
    assert of_text["bytes"] == len(TEXT.encode())
    own = json.loads(said(capsys, "eval", "done", "--json"))
    assert own["step"] == 4
    assert own["xz_primed_bits_per_byte"] < own["xz_cold_bits_per_byte"]


@pytest.mark.parametrize(
    ("loss", "in_json", "shown"),
    [(20.0, math.exp(20.0), "4.852e+08"), (720.0, None, "inf"), (math.nan, None, "nan"), (1.0, math.e, "2.7183")],
)
def test_a_loss_of_any_size_is_shown(
    loss: float, in_json: float | None, shown: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = HeldOut(val_loss=loss, val_bits_per_byte=loss)
    monkeypatch.setattr(commands, "evaluate", lambda *_, **__: result)

    def no_number(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    record = json.loads(said(capsys, "eval", "done", "--json").splitlines()[-1], parse_constant=no_number)
    assert record["perplexity"] == (in_json if in_json is None else pytest.approx(in_json))
    [line] = [line for line in said(capsys, "eval", "done").splitlines() if "perplexity" in line]
    assert line.split() == ["perplexity", shown]


def test_a_run_is_not_scored_on_the_text_of_other_data() -> None:
    shutil.copytree("runs/done", "runs/moved", symlinks=True)
    config = Path("runs/moved/config.yaml")
    changed = config.read_text().replace("dummy_documents: 60", "dummy_documents: 61")
    assert changed != config.read_text()
    elsewhere = re.sub(r"\bfolder: .*", "folder: elsewhere", changed)  # where the run's own tokens are not found
    assert elsewhere != changed
    config.write_text(elsewhere)
    with pytest.raises(CheckpointError, match="has other tokens than moved was trained on"):
        _run(["eval", "moved", "--json"])


def test_folder_and_run_write(capsys: pytest.CaptureFixture[str]) -> None:
    one = said(capsys, "generate", "--model.from", "talker", "--prompt", "größe", "--temperature", "0", "--tokens", "9")
    both = said(
        capsys, "generate", "--model.from", "talker", "--prompt", "größe", "--prompt", "b", "--temperature", "0",
        "--tokens", "9",
    )  # fmt: skip
    assert one.startswith("größe")
    assert both.startswith(one + "-" * 40 + "\nb")
    assert said(capsys, "generate", "done", "--prompt", "ab", "--tokens", "0") == "ab\n"


def test_rows_without_a_token_are_never_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 272 rows, 13 have no token: generating one would print nothing."""
    text = said(capsys, "generate", "--model.from", "talker", "--prompt", "a", "--temperature", "50", "--tokens", "120")
    assert len(text.encode("utf-8")) > 100


@pytest.mark.parametrize("prompts", [["a"], ["a", "b"]])
def test_rows_without_a_token_are_never_chosen(prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the limit to known ids, the same draws choose some such rows."""
    plain, chosen, free = generate, list[int](), list[int]()

    def watched(*given: Any, **options: Any) -> list[list[int]]:
        outputs = plain(*given, **options)
        chosen.extend(token for output in outputs for token in output)
        unbounded = plain(*given, **{**options, "known_ids": None, "on_token": None, "eot_id": None})
        free.extend(token for output in unbounded for token in output)
        return outputs

    monkeypatch.setattr(load_module, "generate", watched)
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    assert _run(["generate", "--model.from", "talker", *given, "--temperature", "50", "--tokens", "120"]) == 0
    assert max(chosen) < 259 <= max(free)


@pytest.mark.parametrize("encoding", [pytest.param("latin-1", marks=pytest.mark.ci), "ascii"])
def test_what_a_terminal_has_no_letter_for_is_replaced(place: Path, encoding: str) -> None:
    code, output = Place(place).run(
        "generate", "--model.from", "talker", "--prompt", "漢字a", "--tokens", "0", PYTHONIOENCODING=encoding
    )
    assert code == 0
    assert output.endswith("??a\n")  # after the progress on standard error


def test_what_there_is_to_tell_of_a_folder_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    talker(Path("scaled"))
    config = json.loads(Path("scaled/config.json").read_text())
    Path("scaled/config.json").write_text(json.dumps(config | {"logits_scaling": 8.0}))
    for arguments in (
        ["eval", "--model.from", "scaled", "--text", "text.txt", "--json"],
        ["generate", "--model.from", "scaled", "--prompt", "a", "--tokens", "1"],
    ):
        assert _run(arguments) == 0
        out, err = capsys.readouterr()
        assert ("logits_scaling" in out, err.count("logits_scaling")) == (False, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval"], "set RUN or --model.from DIR"),
        (["eval", "done", "--model.from", "talker"], "are two models"),
        (["eval", "--model.from", "talker"], "--text FILE or --tasks"),
        (["eval", "--model.from", "nowhere", "--text", "text.txt"], "no folder nowhere"),
        (["eval", "--model.from", "mute", "--text", "text.txt"], "mute has no tokenizer"),
        (["eval", "--model.from", "talker", "--text", "empty.txt"], "empty.txt is empty"),
        (["eval", "--model.from", "talker", "--text", "bytes.bin"], "bytes.bin is in UTF-16, not UTF-8"),
        (["eval", "--model.from", "talker", "--text", "no.txt"], "cannot read no.txt"),
        (["eval", "--model.from", "talker", "--text", "text.txt", "--stride", "200"], "--stride is 200"),
        (["eval", "--model.from", "talker", "--text", "text.txt", "--context", "200"], "--context is 200"),
        (["eval", "done", "--stride", "2"], "--stride has no effect without --text"),
        (["eval", "done", "--limit", "2"], "--limit has no effect without --tasks"),
        (["eval", "done", "--step", "3", "--text", "text.txt"], "no checkpoint of step 3"),
        (["eval", "gone", "--text", "text.txt"], "is not a run"),
        (["eval", "gone", "--tasks", "hellaswag"], "is not a run"),
        (["eval", "--model.from", "nowhere", "--tasks", "hellaswag"], "no folder nowhere"),
        (["eval", "--model.from", "talker", "--tasks", ","], "--tasks is empty"),
        (["eval", "--model.from", "talker", "--tasks", "a", "--include-path", "no"], "there is no folder no;"),
        (["generate", "--model.from", "talker"], "either --prompt TEXT or --chat"),
        (["generate", "--model.from", "talker", "--chat", "--prompt", "a"], "either --prompt TEXT or --chat"),
        (["generate", "--model.from", "talker", "--prompt", "a", "--system", "b"], "--system has no effect"),
        (["generate", "--model.from", "talker", "--prompt", ""], "empty --prompt"),
        (["generate", "--model.from", "talker", "--prompt", "a\udcff"], "argument after --prompt"),
        (["generate", "--model.from", "talker", "--chat", "--system", "\udcff"], "argument after --system"),
        (["generate", "--model.from", "talker", "--chat", "--temperature", "-1"], "--temperature is -1.0"),
        (["generate", "--model.from", "talker", "--prompt", "a", "--top-p", "2"], "--top-p is 2.0"),
        (["generate", "--model.from", "talker", "--chat", "--tokens", "-1"], "--tokens is -1"),
        (["generate", "--model.from", "talker", "--prompt", "a", "--tokens", "99999"], "set --tokens to at most 127"),
        (["generate", "--model.from", "talker", "--prompt", "a", "--top-k", "0"], "--top-k is 0"),
        (["generate", "--model.from", "talker", "--prompt", "a", "--threads", "0"], "--threads is 0"),
        (["generate", "--model.from", "mute", "--prompt", "a"], "mute has no tokenizer"),
        (["generate", "done", "--chat"], "has no chat template"),
        (["generate", "done", "--prompt", "a", "--model.family", "hf"], "--model.family hf"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_is_said(arguments: list[str], says: str) -> None:
    with pytest.raises(ShoalError) as caught:
        _run(arguments)
    assert says in str(caught.value)
