"""Each ready recipe as a user runs it: fetched from a hub, trained, killed, and resumed in another layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
import torch
import transformers

from shoal.data.tokens.named_templates import NAMED
from shoal.data.tokens.tokenize import byte_tokenizer
from shoal.hub.catalog import CATALOG
from tests.cli.commands import Place
from tests.cli.public_datasets import datasets
from tests.hub.server import Repository, running_hub

LLAMA = "unsloth/Llama-3.2-1B"
SMALL = (
    "--model.dim=32", "--model.num_layers=2", "--model.num_heads=2", "--model.ffn_dim=64", "--model.max_seq_len=64",
    "--data.seq_len=32",
)  # fmt: skip
SHORT = (
    "--train.global_batch=8", "--train.micro_batch=2", "--train.dtype=float32", "--train.device=cpu",
    "--train.sample_tokens=5", "--data.val_fraction=0.1", "--optim.warmup_steps=3", "--checkpoint.every=3",
    "--metrics.every=1", "--metrics.console_every=1", "--metrics.peak_tflops=1", "--launch.threads=1",
)  # fmt: skip
ALONE = ("--launch.processes=1",)
TOKENS = ("--train.tokens=2800",)


class Case(NamedTuple):
    """A recipe's layouts before and after the kill. epochs: how many times it reads its data in whole."""

    dataset: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    flags: tuple[str, ...] = SMALL
    epochs: int = 1
    bitwise: bool = True


def two(axis: str) -> tuple[str, ...]:
    return ("--launch.processes=2", f"--parallel.{axis}=2")


CASES = {
    "tinystories": Case("tinystories", two("dp_shard"), ALONE),
    "tinystories-text": Case("tinystories-text", ALONE, two("tp"), bitwise=False),
    "wikitext-103": Case("wikitext-103", two("pp"), ALONE, epochs=5),
    "openwebtext": Case("openwebtext", two("dp_replicate"), two("dp_shard"), SMALL + TOKENS),
    "fineweb-edu": Case("fineweb-edu", two("cp"), two("dp_shard"), SMALL + TOKENS, bitwise=False),
    "alpaca-llama-3.2-1b": Case("alpaca", two("dp_shard"), two("tp"), (), epochs=3, bitwise=False),
}


def llama(folder: Path) -> dict[str, bytes]:
    """Return the files of a small Llama of random weights, with Llama 3's tokens and chat template."""
    torch.manual_seed(0)
    tokenizer = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(special)
    config = transformers.LlamaConfig(
        vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(special[0]), eos_token_id=tokenizer.token_to_id(special[1]),
    )  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[1],
        "chat_template": NAMED["llama3"],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Return a folder in which HF_ENDPOINT is a hub with the datasets of the catalog, and a small Llama."""
    place = Place(tmp_path_factory.mktemp("place"))
    with running_hub() as hub:
        for name, files in datasets().items():
            hub.repositories[name] = Repository(files, "datasets")
        hub.repositories[LLAMA] = Repository(llama(tmp_path_factory.mktemp("llama")))
        place.hub = {"HF_ENDPOINT": hub.url, "HF_HOME": str(place.folder / "home"), "HF_HUB_OFFLINE": "0"}  # type: ignore[attr-defined]
        yield place


def test_each_dataset_with_a_recipe_has_a_case(place: Place) -> None:
    assert {case.dataset for case in CASES.values()} | {"openwebtext-sample", "pile"} == set(CATALOG)


@pytest.mark.parametrize(
    "recipe", ["tinystories", *(pytest.param(name, marks=pytest.mark.ci) for name in CASES if name != "tinystories")]
)
def test_it_is_fetched_trained_killed_and_resumed(place: Place, recipe: str, request: pytest.FixtureRequest) -> None:
    case, environment = CASES[recipe], dict[str, str]()
    place.good("fetch", "data", case.dataset, **place.hub)  # type: ignore[attr-defined]
    if case.dataset == "alpaca":
        place.good("fetch", "model", LLAMA, **place.hub)  # type: ignore[attr-defined]
    if recipe == "openwebtext":
        environment["TIKTOKEN_CACHE_DIR"] = str(request.getfixturevalue("real_tokenizers") / "tiktoken")
    flags = (*SHORT, *case.flags, f"--train.repro={'bitwise' if case.bitwise else 'fast'}")
    place.kill_in_step(9, recipe, recipe, *flags, *case.before, **environment)
    # Without the environment: the run has its own copy of the tokenizer
    output = place.good("train", recipe, *flags, *case.after, "--name", recipe)
    assert f"resumed from runs/{recipe}/checkpoints/step-000000" in output
    ledger = json.loads(place.answer("ledger", recipe, "--json"))
    assert ledger["passed"]
    assert ledger["lives"] == 2
    counts = ledger["epochs"]
    assert all(each["again"] == each["skipped"] == each["passed_over"] == 0 for each in counts.values())
    assert [counts[str(epoch)]["trained"] for epoch in range(case.epochs)] == [ledger["rows"]] * case.epochs

    place.good("train", recipe, *flags, *ALONE, "--name", f"{recipe}-whole", **environment)
    expected, found = place.losses(f"{recipe}-whole"), place.losses(recipe)
    if case.bitwise:
        assert found == expected
    else:
        assert [line[0] for line in found] == [line[0] for line in expected]
        assert [line[1] for line in found] == pytest.approx([line[1] for line in expected], rel=1e-4)
