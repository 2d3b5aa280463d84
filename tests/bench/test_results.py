"""scripts/make_results.py: text of HTML pages, a run killed to its last step, and the memory of its lives."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from scripts.results.corpus import text_of
from scripts.results.page import MIB, WARM, lives

from shoal.run.records import StepRecord

RECORD = StepRecord(
    step=1, time=0.0, tokens=1, loss=1.0, lr=1.0, grad_norm=1.0, tokens_per_second=1.0, step_seconds=1.0, mfu=None,
    memory_bytes=0,
)  # fmt: skip


def test_text_of_a_page_has_neither_scripts_nor_markup() -> None:
    page = "<html><head><title>No</title></head><body><nav>no</nav><h1>A &amp; B</h1>\n\n\n<p>one<script>no()</script> two</body>"
    assert text_of(page) == "A & B\n\none two\n"


def test_lives_of_a_run_begin_anew_at_each_kill(tmp_path: Path) -> None:
    (tmp_path / "kills.jsonl").write_text(json.dumps({"time": 295.0, "killed": "worker"}) + "\n", encoding="utf-8")
    first = [(step, float(step), 10 + step) for step in range(1, 301, 10)]
    second = [(step, float(step + 20), 5) for step in range(281, 441, 10)]  # from the checkpoint at step 280
    records = [
        dataclasses.replace(RECORD, step=step, time=time, memory_bytes=memory * MIB)
        for step, time, memory in [*first, *second]
    ]
    found = lives(records, tmp_path)
    assert [len(life) for life in found] == [18, 4]
    assert found[0] == [(10 + step) * MIB for step in range(WARM + 1, 301, 10)]
    assert set(found[1]) == {5 * MIB}
