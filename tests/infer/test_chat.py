"""Conversations: the template and history match transformers; input comes in lines, output in pieces."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from shoal.errors import DataError, GenerateError, ModelError
from shoal.infer import load as load_module
from shoal.infer.chat import Chat, chat_in_terminal
from shoal.infer.load import load_folder
from shoal.models.sampling import Sampling

from ..cli.commands import clean_environment
from ..hub.small import load, save
from .folders import talker

LIMIT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("talker"), "qwen2")


def chat_of(folder: Path, *, system: str | None = None, limit: int = LIMIT) -> Chat:
    model = load_folder(str(folder), device="cpu", dtype="float32")
    return Chat.of(model, system=system, max_new_tokens=limit, sampling=Sampling())


def their_answer(folder: Path, messages: list[dict[str, str]]) -> str:
    """Return transformers' greedy answer. Rows that only pad the vocabulary are never chosen."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    out = load(folder).generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=LIMIT,
        do_sample=False, suppress_tokens=list(range(259, 272)), eos_token_id=[258, 256], pad_token_id=0,
    )[0, len(ids) :].tolist()  # fmt: skip
    if out[-1] in (258, 256):
        out = out[:-1]
    return str(tokenizer.decode(out))


def test_answers_and_history_are_those_of_transformers(folder: Path) -> None:
    chat = chat_of(folder, system="Be brief.")
    expected = [{"role": "system", "content": "Be brief."}]
    for text in ("Hello, größe!", "And then?"):
        pieces: list[str] = []
        chat.answer(text, pieces.append)
        expected.append({"role": "user", "content": text})
        answer = their_answer(folder, expected)
        expected.append({"role": "assistant", "content": answer})
        assert "".join(pieces) == answer
        assert len(pieces) > 2  # it was shown while it was generated
    assert chat.messages == expected


def test_lines_are_answered_until_exit(folder: Path) -> None:
    out = io.StringIO()
    chat = chat_of(folder)
    chat_in_terminal(chat, io.StringIO("Hello\n\n/clear\nHello\n/exit\nmore\n"), out)
    first, second = out.getvalue().split(f"\n[stopped at --tokens {LIMIT} or at the end of the context]\n")[:2]
    assert first == second != ""
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_a_conversation_that_is_too_long_says_so_and_goes_on(folder: Path) -> None:
    chat, out = chat_of(folder), io.StringIO()
    chat_in_terminal(chat, io.StringIO("a" * 200 + "\nHi\n"), out)
    assert "/clear starts a new one" in out.getvalue()
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["Hi"]


def test_an_answer_can_be_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chat, out = chat_of(folder), io.StringIO()

    def stopped(*_: object, on_token: object, **__: object) -> None:
        assert callable(on_token)
        on_token(0, ord("x"))
        raise KeyboardInterrupt

    monkeypatch.setattr(load_module, "generate", stopped)
    chat_in_terminal(chat, io.StringIO("Hello\n"), out)
    assert out.getvalue() == "x\n"
    assert chat.messages[-1] == {"role": "assistant", "content": "x"}


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_lines_that_are_no_text(folder: Path, errors: str) -> None:
    lines = io.TextIOWrapper(io.BytesIO(b"Hello\n\xff\n"), encoding="utf-8", errors=errors)
    with pytest.raises(GenerateError, match=r"standard input is not? UTF-8 text"):
        chat_in_terminal(chat_of(folder), lines, io.StringIO())


def test_by_a_pipe(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "generate", "--model.from", str(folder), "--chat", "--temperature", "0",
         "--tokens", str(LIMIT), "--dtype", "float32", "--device", "cpu"],
        input="Hello\n", capture_output=True, text=True, env=clean_environment(), check=True,
    )  # fmt: skip
    assert done.stdout.startswith(their_answer(folder, [{"role": "user", "content": "Hello"}]) + "\n")
    assert all(line.startswith(("importing torch", "loading the model")) for line in done.stderr.splitlines())


def test_what_cannot_talk(folder: Path, tmp_path: Path) -> None:
    save("llama", tmp_path)
    with pytest.raises(DataError, match="has no chat template"):
        chat_of(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        chat_of(tmp_path)
