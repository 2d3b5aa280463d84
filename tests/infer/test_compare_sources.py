"""The comparison of a blend's sources with gzip and xz, against compressing each source's text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from shoal.config.data_options import BlendSource, Data
from shoal.data.compression import sizes
from shoal.data.dataset import prepare_dataset
from shoal.data.decode import held_out_text, sample_of
from shoal.infer.commands import _compare_sources
from shoal.run.console import Console


def test_each_source_is_compared_on_its_own_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = {}
    for name, form in (("words", "a word and another {} "), ("code", "def f_{0}(x): return x + {0}\n")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": form.format(n) * 20}) + "\n" for n in range(60)))
        sources[name] = BlendSource(corpus="jsonl", paths=(str(path),))
    chats = [{"instruction": f"Say {n}.", "input": "", "output": f"I say {n}. " * 9} for n in range(60)]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    sources["chats"] = BlendSource(corpus="json", paths=(str(tmp_path / "chats.json"),), format="alpaca")
    dataset = prepare_dataset(Data(sources=sources, tokenizer="bytes", folder=str(tmp_path / "data"), val_fraction=0.2))

    losses = {"words": 1.0, "code": 2.0, "chats": 3.0}
    found = _compare_sources(dataset, losses, Console(), Console(on_stderr=True))
    said = capsys.readouterr().out
    for name in ("words", "code"):
        part = dataset.parts[name]
        text = held_out_text(part)
        for compressor, bits in sizes(sample_of(part, "train", 10**9), text).items():
            assert found[name][f"{compressor}_primed_bits_per_byte"] == bits["primed"]
            assert found[name][f"{compressor}_cold_bits_per_byte"] == bits["cold"]
        ours = losses[name] * part.counts["val"].tokens / len(text) / math.log(2)
        assert found[name]["bits_per_byte"] == pytest.approx(ours)
        assert f"{name}: held-out text ({len(text):,} bytes), bits per byte: " in said
        assert f"this model {ours:.3f}" in said
    assert set(found["chats"]) == {"nats_per_token", "bits_per_byte"}
    assert "chats: conversations (" in said
