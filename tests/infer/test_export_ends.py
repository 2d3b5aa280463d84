"""An exported config.json names the end tokens of the tokenizer that the run was trained with."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers

from shoal.config.options import Config
from shoal.data.tokens.tokenize import load_tokenizer
from shoal.infer.export import export_run
from shoal.resolve.resolve import resolve
from shoal.training.loop import complete
from shoal.training.run import Run
from tests.cli.commands import Place
from tests.hub import small
from tests.infer.folders import TURN_END, talker
from tests.parallel.layouts import ALONE, NeverStop

ENDS = {"bos_token_id": 257, "eos_token_id": [TURN_END, 256]}  # as in the source, including the end of a turn


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a folder of weights with a tokenizer, and a folder of another tokenizer with other end tokens."""
    place = Place(tmp_path_factory.mktemp("ends"))
    talker(place.folder / "source")
    described = json.loads((place.folder / "source" / "config.json").read_text())
    (place.folder / "source" / "config.json").write_text(json.dumps(described | ENDS))
    foreign = small.save("llama", place.folder / "foreign")
    for name in ("config.json", "generation_config.json"):
        (foreign / name).unlink()
    tokenizer = tokenizers.Tokenizer.from_file(str(foreign / "tokenizer.json"))
    tokenizer.add_special_tokens(["<x>", "<begin>", "<end>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", tokenizer.token_to_id("<begin>"))]
    )
    tokenizer.save(str(foreign / "tokenizer.json"))
    (foreign / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<begin>", "eos_token": "<end>"})
    )
    return place


def exported(place: Place, name: str, **given: Any) -> dict[str, Any]:
    """Return the exported config.json of a one-step run that started from the source."""
    options = {
        "model.from": place.folder / "source", "data.folder": place.folder / "data", "data.corpus": "dummy",
        "data.dummy_documents": 60, "data.seq_len": 32, "train.steps": 1, "train.global_batch": 2, "train.micro_batch": 2,
        "train.dtype": "float32", "train.device": "cpu", "metrics.peak_tflops": 1, "launch.processes": 1,
        "launch.runs": place.folder / "runs", "launch.name": name, **given,
    }  # fmt: skip
    config: Config = resolve(None, [(key, str(value), "the test") for key, value in options.items()]).config
    run = Run.open(config, ALONE, NeverStop())
    complete(run)
    run.close()
    out = export_run(place.folder / "runs", name, step=None, out=place.folder / f"{name}-out")
    described: dict[str, Any] = json.loads((out / "config.json").read_text())
    tokenizer = load_tokenizer(str(out))
    assert tokenizer.to_json() == load_tokenizer(str(place.folder / "runs" / name / "tokenizer.json")).to_json()
    return described


def test_the_sources_own_stay(place: Place) -> None:
    described = exported(place, "own")
    assert {key: described[key] for key in ENDS} == ENDS


def test_of_another_tokenizer_they_are_its_own(place: Place) -> None:
    described = exported(place, "other", **{"data.tokenizer": place.folder / "foreign"})
    assert {key: described[key] for key in ENDS} == {"bos_token_id": 258, "eos_token_id": 259}


def test_of_bytes_too(place: Place) -> None:
    described = exported(place, "plain", **{"data.tokenizer": "bytes"})
    assert {key: described[key] for key in ENDS} == {"bos_token_id": None, "eos_token_id": 256}
