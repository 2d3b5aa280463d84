"""Held-out text compressed by gzip and xz, which are primed with training text: measured once, without slowing a run."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

import psutil
import pytest
import tokenizers
from tokenizers import normalizers

from shoal.data.compression import sizes
from shoal.data.decode import held_out_text, sample_of
from shoal.data.prepare import prepare
from shoal.data.stored.manifest import YARDSTICK
from shoal.data.tokens.tokenize import byte_tokenizer
from shoal.data.yardstick import Measuring, Yardstick, load
from tests.data.conftest import MakeData


def test_primed_is_what_a_text_adds() -> None:
    """A text seen before costs almost nothing, if it is within the compressor's window."""
    draw = random.Random(0)
    text = draw.randbytes(50_000)
    found = sizes(text + draw.randbytes(200_000), text)
    assert [found[name]["cold"] for name in ("xz", "gzip")] == pytest.approx([8, 8], rel=0.01)
    assert found["xz"]["primed"] < 0.2
    assert found["gzip"]["primed"] == pytest.approx(8, rel=0.01), "it looks 32 KiB back"
    near = sizes(text[:20_000], text[:20_000])
    assert near["gzip"]["primed"] < 0.2
    unrelated = sizes(draw.randbytes(100_000), text)
    assert unrelated["xz"]["primed"] == pytest.approx(8, rel=0.01)


def test_a_model_beats_what_is_primed_or_nothing() -> None:
    bits = {"xz": {"cold": 1.789, "primed": 1.340}, "gzip": {"cold": 2.038, "primed": 2.026}}
    yardstick = Yardstick("id", 9_400_000, 316_000, bits)
    ranked, how = yardstick.compared(1.63, 316_000).splitlines()
    assert ranked.endswith(": xz -9e 1.340 (cold 1.789), this model 1.630, gzip -9 2.026 (cold 2.038)")
    assert "9.4 MB" in how
    assert yardstick.compared(1.2, 316_000).index("this model") < yardstick.compared(1.2, 316_000).index("xz")
    assert "0.3 MB of it" in yardstick.compared(1.2, 900_000_000)


def test_it_is_measured_once_for_the_same_tokens(make_data: MakeData, corpus: Path) -> None:
    prepared = prepare(make_data())
    with Measuring(prepared, idle=True) as measuring:
        found = measuring.wait(60)
    assert isinstance(found, Yardstick)
    assert found.bits_per_byte == sizes(sample_of(prepared, "train", 10**9), held_out_text(prepared))
    assert found.bits_per_byte["xz"]["primed"] < found.bits_per_byte["xz"]["cold"]
    with Measuring(prepared, idle=True) as measuring:
        assert measuring.wait(0, lambda: pytest.fail("it is there")) == found
    path = prepared.folder / YARDSTICK
    for damaged in (b"{", b'{"data_id": 1}', path.read_bytes().replace(prepared.data_id.encode(), b"another")):
        path.write_bytes(damaged)
        assert load(prepared) is None
    shutil.copy(corpus / "file01.py", corpus / "added.py")
    (corpus / "new.py").write_text("a new text\n" * 40)
    assert not (prepare(make_data(rebuild=True)).folder / YARDSTICK).exists()


def test_who_does_not_wait_stops_it(make_data: MakeData) -> None:
    measuring = Measuring(prepare(make_data()), idle=False)
    assert measuring._process is not None
    process = psutil.Process(measuring._process.pid)
    process.suspend()
    told: list[float] = []
    assert measuring.wait(60, lambda: not told, lambda: told.append(time.monotonic())) == "stopped"
    assert "within 0 s" in str(measuring.wait(0))
    assert len(told) == 1
    measuring.close()
    measuring.close()
    assert not process.is_running()


def test_a_tokenizer_that_loses_text_has_no_comparison(make_data: MakeData, tmp_path: Path) -> None:
    lossy = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    lossy.normalizer = normalizers.Replace("e", "")
    lossy.save(str(tmp_path / "lossy.json"))
    with Measuring(prepare(make_data(tokenizer=str(tmp_path / "lossy.json"))), idle=False) as measuring:
        assert "set data.tokenizer to bpe or bytes" in str(measuring.wait(60))


def test_a_long_text_is_sampled_all_over(make_data: MakeData, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"<{number:06}>"}) + "\n" for number in range(20_000)))
    prepared = prepare(make_data(corpus="jsonl", paths=(str(path),), val_fraction=0.5, shard_tokens=9000))
    for split, sample in [("train", sample_of(prepared, "train", 8000)), ("val", held_out_text(prepared, 8000))]:
        assert prepared.counts[split].text_bytes > 70_000  # type: ignore[index]
        assert 7000 < len(sample) <= 8000
        numbers = [int(part) for part in sample.decode().replace("<", " ").replace(">", " ").split() if len(part) == 6]
        assert numbers == sorted(set(numbers))
        assert len({number // 1000 for number in numbers}) == 20
    assert sample_of(prepared, "val", 10**9) == held_out_text(prepared)
