"""The tokens at documents' ends: Hugging Face folders and prepared tokens against transformers."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shoal.config.data_options import Data
from shoal.data.decode import held_out_text
from shoal.data.prepare import Prepared, open_prepared, prepare
from shoal.data.split import fraction_of
from shoal.data.token_folder import named_tokenizer, token_options
from shoal.data.tokens.tokenize import Tokenizer, load_tokenizer, parse_tokenizer, train_bpe
from shoal.errors import DataError
from shoal.resolve.resolve import resolve
from tests.data.conftest import MakeData
from tests.resolve.test_resolve import problems, write

SPECIAL = ("<|begin|>", "<|im_end|>", "<|pad|>")
MakeFolder = Callable[..., Path]


def put_bos(path: Path, token: str) -> None:
    """Rewrite a tokenizer.json to put `token` before each text."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B:1", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    path.write_text(tokenizer.to_str(), encoding="utf-8")


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function that makes a Hugging Face folder with a small tokenizer. puts_bos: whether it begins texts with bos."""
    inner = train_bpe(iter(["some words of a text, some others\n"] * 20), 290)._tokenizer
    inner.add_special_tokens(list(SPECIAL))

    def make(puts_bos: bool = False, **configs: dict[str, Any]) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        copy = tokenizers.Tokenizer.from_str(inner.to_str())
        (folder / "tokenizer.json").write_text(copy.to_str(), encoding="utf-8")
        if puts_bos:
            put_bos(folder / "tokenizer.json", "<|begin|>")
        for name, content in configs.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


@pytest.mark.parametrize(
    ("configs", "end"),
    [
        ({}, "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, "<|im_end|>"),
        ({"generation_config": {"eos_token_id": [-2, 0]}}, "<|im_end|>"),
        ({"config": {"eos_token_id": -2}, "tokenizer_config": {"eos_token": None}}, "<|im_end|>"),
        ({"config": {"eos_token_id": -2}, "tokenizer_config": {"eos_token": "<|pad|>"}}, "<|pad|>"),
    ],
)
def test_the_end_is_the_one_that_the_folder_names(make_folder: MakeFolder, configs: Any, end: str) -> None:
    vocab = load_tokenizer(str(make_folder())).vocab_size
    for config in configs.values():  # a negative id counts from the end of the vocabulary
        ids = config.get("eos_token_id")
        if ids is not None:
            config["eos_token_id"] = [vocab + i if i < 0 else i for i in ids] if isinstance(ids, list) else vocab + ids
    folder = make_folder(**configs)
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.decode([tokenizer.eot_id]) == end
    saved = parse_tokenizer(tokenizer.to_json(), "saved")
    assert (saved.eot_id, saved.bos_id, saved.to_json()) == (tokenizer.eot_id, None, tokenizer.to_json())
    alone = load_tokenizer(str(folder / "tokenizer.json"))
    assert alone.decode([alone.eot_id]) == "<|endoftext|>", "a file alone uses its own setting"


@pytest.mark.parametrize("puts_bos", [False, True])
@pytest.mark.parametrize("add", [None, False, True])
def test_the_beginning_is_what_transformers_puts(make_folder: MakeFolder, puts_bos: bool, add: bool | None) -> None:
    config = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = make_folder(puts_bos, tokenizer_config=config | ({} if add is None else {"add_bos_token": add}))
    tokenizer, theirs = load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode_prompt("some words") == theirs("some words").input_ids
    assert (tokenizer.bos_id is not None) == puts_bos, "a tokenizer.json has its own setting"
    saved = parse_tokenizer(tokenizer.to_json(), "saved")
    assert (saved.bos_id, saved.eot_id) == (tokenizer.bos_id, tokenizer.eot_id)
    assert saved.special_ids == {0, *(theirs.convert_tokens_to_ids(token) for token in SPECIAL)}


@pytest.mark.parametrize(
    ("configs", "says"),
    [
        ({"tokenizer_config": {"eos_token": "<gone>"}}, "eos_token <gone>, which the tokenizer lacks"),
        ({"generation_config": {"eos_token_id": 5000}}, "eos_token_id 5000, which the tokenizer lacks"),
        ({"tokenizer_config": ["no", "object"]}, "not a JSON object"),
    ],
)
def test_a_folder_that_contradicts_itself_is_refused(make_folder: MakeFolder, configs: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_tokenizer(str(make_folder(**configs)))


def test_a_sentencepiece_folder_begins_as_its_config_says(real_tokenizers: Path, tmp_path: Path) -> None:
    shutil.copy(real_tokenizers / "mistral" / "tokenizer.model", tmp_path)
    assert load_tokenizer(str(tmp_path)).bos_id is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": {"content": "<s>"}, "add_bos_token": true, "eos_token": "</s>"}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eot_id) == (1, 2)
    assert tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode("hi").ids == tokenizer.encode_prompt("hi")
    config.write_text('{"bos_token": "<gone>", "add_bos_token": true}')
    with pytest.raises(DataError, match="bos_token <gone>, which the tokenizer lacks"):
        load_tokenizer(str(tmp_path))


def test_a_config_may_name_any_of_these(make_folder: MakeFolder, tmp_path: Path) -> None:
    """A missing tokenizer is a config error, before the run starts."""
    folder = make_folder()
    for tokenizer in ("bytes", "tiktoken:gpt2", str(folder), str(folder / "tokenizer.json")):
        recipe = write(tmp_path, {"train": {"steps": 1}, "data": {"tokenizer": tokenizer}})
        assert resolve(recipe).config.data.tokenizer == tokenizer
    [found] = problems(tmp_path, {"train": {"steps": 1}, "data": {"tokenizer": "someone/gone"}})
    assert "data.tokenizer someone/gone was not found" in found


def test_a_name_is_found_where_models_are_kept(make_folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder()
    shutil.move(folder, folder.parent / "models" / "someone" / "small")
    monkeypatch.chdir(folder.parent)
    assert load_tokenizer("someone/small").eot_id == 0
    with pytest.raises(DataError, match="no such tokenizer: someone/smaller"):
        load_tokenizer("someone/smaller")


def test_a_model_with_too_few_rows_is_told_which_tokens_lack_one(make_folder: MakeFolder) -> None:
    tokenizer = load_tokenizer(str(make_folder()))
    tokenizer.check_rows(tokenizer.vocab_size)
    tokenizer.check_rows(tokenizer.vocab_size + 60)
    with pytest.raises(DataError, match=r"no row for '<\|im_end\|>', '<\|pad\|>'"):
        tokenizer.check_rows(tokenizer.vocab_size - 2)


def documents(prepared: Prepared, split: Any) -> list[list[int]]:
    stream = prepared.streams[split]
    starts = [*stream.starts(0, stream.num_tokens).tolist(), stream.num_tokens]
    return [stream.read(a, b).tolist() for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("name", [pytest.param("llama3", marks=pytest.mark.ci), "mistral"])
def test_documents_are_prepared_as_transformers_encodes_them(
    name: str, real_tokenizers: Path, make_data: MakeData, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    file = next((real_tokenizers / name).glob("tokenizer.[jm]*o*"))
    shutil.copy(file, folder)
    begin, end = ("<s>", "</s>") if name == "mistral" else ("<|begin_of_text|>", "<|end_of_text|>")
    config = {"bos_token": begin, "eos_token": end, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if name == "llama3":
        put_bos(folder / "tokenizer.json", begin)
    else:
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "tokenizer.json").write_text(load_tokenizer(str(folder)).to_json(), encoding="utf-8")
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str((folder if name == "llama3" else tmp_path / "theirs") / "tokenizer.json"),
        bos_token=begin, eos_token=end,
    )  # fmt: skip
    prepared = prepare(make_data(tokenizer=str(folder)))
    texts = [path.read_text("utf-8") for path in sorted(corpus.iterdir())]
    held = [text for text in texts if fraction_of(text.encode())[0] < 0.2]
    assert documents(prepared, "val") == [[*theirs(text).input_ids, theirs.eos_token_id] for text in held]
    assert prepared.counts["val"].text_bytes == sum(len(text.encode()) for text in held)
    assert held_out_text(prepared) == "".join(held).encode()
    again = open_prepared(prepared.folder).tokenizer
    assert (again.bos_id, again.eot_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_a_long_document_is_not_cut_where_parts_get_a_space(
    real_tokenizers: Path, make_data: MakeData, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.data.encode.PART_CHARACTERS", 50)
    prepared = prepare(make_data(tokenizer=str(real_tokenizers / "mistral" / "tokenizer.model")))
    text = held_out_text(prepared).decode()
    assert "\n    return" in text
    assert "\n     return" not in text


def test_ids_and_folders_of_before_stay(make_data: MakeData) -> None:
    """Compare with data ids pinned before tokenizers could have a beginning-of-text token."""
    pinned = {"bytes": "682bd91454f524fd", "bpe": "a636a1e13e1aa06c"}
    for tokenizer, data_id in pinned.items():
        prepared = prepare(make_data(tokenizer=tokenizer, tokenizer_vocab_size=300))
        assert prepared.data_id == data_id
    data: Data = make_data(tokenizer=str(prepared.folder / "tokenizer.json"))
    assert prepare(data).data_id == pinned["bpe"]
    assert sorted(token_options(data, named_tokenizer(data))) == [
        "corpus",
        "format",
        "paths",
        "shard_tokens",
        "tokenizer",
        "val_fraction",
    ]


def test_special_tokens_of_a_chat_are_special(make_folder: MakeFolder) -> None:
    tokenizer: Tokenizer = load_tokenizer(str(make_folder(puts_bos=True)))
    begin, end = (tokenizer._tokenizer.token_to_id(token) for token in SPECIAL[:2])
    assert tokenizer.encode_chat("<|begin|>some<|im_end|>") == [begin, *tokenizer.encode("some"), end]
    assert not {begin, end} & set(tokenizer.encode("<|begin|>some<|im_end|>"))
