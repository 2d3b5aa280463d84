"""What a report embeds: bounded, exact where it says so, and nothing that a browser would run."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.config.options import Config
from shoal.report.curves.curves import Curves
from shoal.report.curves.ranks import RankMap
from shoal.report.page.content import run_view
from shoal.report.page.html import SCRIPTS, dashboard_html, report_html
from shoal.report.page.markdown import report_markdown
from shoal.report.page.packing import Arrays
from shoal.report.page.rank_view import ranks_view
from tests.report.made_runs import make_run

STATIC = Path(__file__).parents[2] / "src/shoal/report/page/static"
HOSTILE = "</script><img src=x onerror=alert(1)><!--"


def embedded(html: bytes) -> dict[str, Any]:
    """Return the data of a report."""
    found = re.search(rb'id="shoal-data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def unpacked(array: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Read an array as the page's script does, written independently of the packer."""
    raw = zlib.decompress(base64.b64decode(array["data"]))
    width = 4 if array["kind"] == "float32" else 8
    joined = bytes(raw[byte * (len(raw) // width) + i] for i in range(len(raw) // width) for byte in range(width))
    values = np.frombuffer(joined, dtype=f"<f{width}")
    return values if width == 4 else np.cumsum(values) * array["unit"]


def test_packed_arrays_come_back() -> None:
    arrays = Arrays()
    values = np.random.default_rng(0).normal(2, 1, 1000).astype(np.float32)
    tokens = np.cumsum(np.random.default_rng(1).integers(1, 1 << 40, 1000))
    assert arrays.add_values(values) == 0
    assert arrays.add_rising(tokens) == 1
    assert arrays.add_rising(tokens.copy()) == 1, "an array is stored once"
    np.testing.assert_array_equal(unpacked(arrays.packed[0]), values)
    np.testing.assert_array_equal(unpacked(arrays.packed[1]), tokens)


def test_a_long_run_is_small_and_its_loss_exact(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", 6000, spikes={1234: 9.5})
    html = report_html([run.path])
    assert len(html) < 2_000_000
    data = embedded(html)
    curve = data["curves"]["long"]["loss"]
    written = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    losses = [line["loss"] for line in written if "loss" in line]
    np.testing.assert_array_equal(unpacked(data["arrays"][curve["mean"]]), np.array(losses, dtype=np.float32))
    np.testing.assert_array_equal(unpacked(data["arrays"][curve["step"]]), np.arange(1, 6001))
    memory = data["curves"]["long"]["memory_bytes"]
    assert len(unpacked(data["arrays"][memory["high"]])) <= 2000, "other curves are buckets"


def test_nothing_of_a_run_becomes_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a&b <b>", 20, events=[{"event": HOSTILE, "step": 5, "why": HOSTILE}])
    run.samples.mkdir()
    (run.samples / "end.txt").write_text(HOSTILE)
    html = report_html([run.path])
    assert html.count(b"<script") == 1 + len(SCRIPTS)
    assert b"<img" not in html
    assert embedded(html)["run"]["a&b <b>"]["samples"][0]["text"] == HOSTILE
    rows = [line for line in report_markdown([run.path]).decode().splitlines() if line.startswith("|")]
    assert any("onerror" in line for line in rows)
    assert not any("<" in line for line in rows)


def test_the_policy_allows_only_the_scripts_of_the_page() -> None:
    html = dashboard_html().decode()
    assert len(html) < 500_000
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts}
    assert len(scripts) == len(SCRIPTS)
    assert set(re.search(r"script-src ([^;]*)", policy)[1].split()) == hashes  # type: ignore[index]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.findall(r"""\b(?:src|href)=["'](?!data:,)""", html), "no outside resource"


def test_uplot_is_as_published() -> None:
    folder = STATIC / "uplot"
    lines = [line.split() for line in (folder / "SHA256SUMS").read_text().splitlines()]
    sums = {name: digest for digest, name in lines}
    assert set(sums) == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    for name, wanted in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == wanted


def test_a_slow_rank_is_found_with_its_phase_and_place(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 100, ranks=300, slow=(217, "backward"))
    view = ranks_view(run, RankMap.open(run.path))
    assert view is not None
    (slow,) = view["slow"]
    assert (slow["rank"], slow["phase"], slow["place"]) == (217, "backward", "dp_shard 54, tp 1")
    assert slow["factor"] > 1.5
    row = next(i for i, (low, high) in enumerate(view["rows"]) if low <= 217 <= high)
    assert min(view["cells"][row]) > 1.5, "ranks that share a row do not hide it"
    assert {view["phases"][each] for each in view["slow_phase"][row]} == {"backward"}
    assert "rank 217" in [each["name"] for each in view["timelines"][0]["ranks"]]


def test_a_slow_step_among_many_is_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3000, ranks=4)
    lines = run.ranks_file.read_text().splitlines()
    line = json.loads(lines[150])
    line["busy_seconds"]["data"][2] += 5
    lines[150] = json.dumps(line)
    run.ranks_file.write_text("\n".join(lines) + "\n")
    view = ranks_view(run, RankMap.open(run.path))
    assert view is not None
    assert len(view["steps"]) <= 200
    assert max(view["cells"][2]) > 10
    assert view["timelines"][1]["name"] == "the slowest measured step, 1,510"


def test_an_empty_run_has_a_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1)
    for path in (run.metrics_file, run.events_file, run.time_file):
        path.unlink()
    view = run_view(run, Curves.open(run.path))
    assert (view["events"], view["account"]) == ([], None)
    assert embedded(report_html([run.path]))["curves"] == {"run": {}}


def test_runs_differ_in_what_their_configs_say(tmp_path: Path) -> None:
    config = Config().replace("train", steps=20)
    a = make_run(tmp_path / "x" / "run", 20, config=config)
    b = make_run(tmp_path / "y" / "run", 20, config=config.replace("optim", lr=0.25))
    data = embedded(report_html([a.path, b.path]))
    assert [each["name"] for each in data["runs"]["runs"]] == ["run", "y/run"]
    assert next(d for d in data["runs"]["differences"] if d["option"] == "optim.lr")["values"]["y/run"] == "0.25"


@pytest.mark.parametrize("name", ["loss", "val_loss"])
def test_curves_of_a_report_are_those_of_the_log(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run", 400, sources=("web", "code"))
    data = embedded(report_html([run.path]))
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    wanted = np.array([line[name] for line in lines if name in line], dtype=np.float32)
    np.testing.assert_array_equal(unpacked(data["arrays"][data["curves"]["run"][name]["mean"]]), wanted)
    assert "source_loss/code" in data["curves"]["run"]
