"""Every point of a log is in its curve: windows against plain numpy, the cache against the log."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.report.curves.curves import Curves, Window, names_at_the_end
from shoal.report.curves.pyramid import Pyramid
from shoal.run.records import forget_after
from tests.report.synthetic import write_run


def values_of(log: Path, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return steps and values of a metric by `json.loads` on each line."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    found = [(r["step"], r[name]) for r in records if name in r]
    return np.array([s for s, _ in found]), np.array([v for _, v in found], dtype=float)


def buckets_of(window: Window) -> list[slice]:
    ends = np.cumsum(window.count)
    return [slice(int(end - count), int(end)) for end, count in zip(ends, window.count, strict=True)]


def same(a: Window, b: Window) -> bool:
    return all(np.array_equal(getattr(a, f), getattr(b, f), equal_nan=True) for f in vars(a))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with a NaN, an infinite loss, a null gradient norm and two spikes."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "a", 6000, seed=1, spikes=[1234, 4321], eval_every=7).path
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    for number, (key, value) in {100: ("loss", float("nan")), 3000: ("loss", float("inf"))}.items():
        lines[number] = json.dumps(json.loads(lines[number]) | {key: value, "grad_norm": None})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("name", ["loss", "grad_norm", "val_loss", "split_seconds/forward"])
def test_windows_hold_every_point(run: Path, name: str) -> None:
    curves = Curves.open(run)
    if "/" in name:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        with_split = [r for r in records if "split_seconds" in r]
        steps = np.array([r["step"] for r in with_split])
        values = np.array([r["split_seconds"]["forward"] for r in with_split])
    else:
        steps, values = values_of(run / "metrics.jsonl", name)
    random = np.random.default_rng(7)
    for _ in range(20):
        first, last = np.sort(random.integers(0, 6100, 2))
        columns = int(random.integers(1, 300))
        window = curves.window(name, int(first), int(last), columns)
        inside = (steps >= first) & (steps <= last)
        expected = values[inside]
        assert window.count.sum() == len(expected)
        assert len(window) <= columns
        assert window.gaps.sum() == (~np.isfinite(expected)).sum()
        for place, bucket in enumerate(buckets_of(window)):
            finite = expected[bucket][np.isfinite(expected[bucket])]
            assert window.step[place] in steps[inside][bucket]
            if len(finite):
                assert window.low[place] == finite.min()
                assert window.high[place] == finite.max()
                np.testing.assert_allclose(window.mean[place], finite.mean(), rtol=1e-12)
            else:
                assert np.isnan([window.low[place], window.high[place], window.mean[place]]).all()


def test_a_spike_shows_at_every_zoom(run: Path) -> None:
    curves = Curves.open(run)
    for columns in (1, 3, 10, 100, 1000, 10_000):
        window = curves.window("loss", 1000, 6000, columns)
        assert np.nanmax(window.high) > 8
        assert (window.high > 6).sum() == min(2, len(window))


def test_few_points_are_exact(run: Path) -> None:
    window = Curves.open(run).window("loss", 101, 600, columns=500)
    assert np.array_equal(window.step, np.arange(101, 601))
    assert np.array_equal(window.low, window.high, equal_nan=True)
    assert len(window) == 500


def test_large_pyramids_equal_plain_numpy() -> None:
    random = np.random.default_rng(3)
    values = random.normal(size=200_001)
    values[random.integers(0, len(values), 50)] = np.nan
    pyramid = Pyramid()
    for part in np.split(values, np.sort(random.integers(0, len(values), 20))):
        pyramid.add(part)
    whole = Pyramid()
    whole.add(values)
    for _ in range(50):
        first, stop = (int(each) for each in np.sort(random.integers(0, len(values) + 1, 2)))
        columns = int(random.integers(1, 2000))
        starts, found = pyramid.window(first, stop, columns)
        assert np.array_equal(found, whole.window(first, stop, columns)[1])
        if first < stop:
            filled = np.nan_to_num(values[first:stop], nan=np.inf)
            assert np.array_equal(found[0], np.minimum.reduceat(filled, starts - first))
            assert found[3].sum() == np.isfinite(values[first:stop]).sum()


def test_reading_on_equals_reading_at_once(run: Path, tmp_path: Path) -> None:
    data = (run / "metrics.jsonl").read_bytes()
    growing = tmp_path / "growing"
    growing.mkdir()
    random = np.random.default_rng(5)
    curves = Curves.open(growing)
    assert curves.names() == []
    stored = set()
    with (growing / "metrics.jsonl").open("wb", buffering=0) as file:
        for part in np.split(np.frombuffer(data, np.uint8), np.sort(random.integers(0, len(data), 30))):
            file.write(part.tobytes())
            curves.refresh()
            stored |= {each.stat().st_mtime_ns for each in growing.glob("cache/curves/metrics")}
    assert len(stored) > 2
    at_once = Curves.open(run, tmp_path / "other")
    again = Curves.open(growing)  # from the cache and the lines after it
    assert set(curves.names()) == set(at_once.names())
    for name in at_once.names():
        for columns in (10, 700, 10**6):
            expected = at_once.window(name, 0, None, columns)
            assert same(curves.window(name, 0, None, columns), expected), name
            assert same(again.window(name, 0, None, columns), expected), name


def test_a_log_cut_by_a_resume_is_read_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1500, seed=2)
    curves = Curves.open(run.path)
    assert not curves.refresh()
    forget_after(run.metrics_file, 700)
    kept = run.metrics_file.read_text()
    assert curves.refresh()
    assert curves.last_step == 700
    later = write_run(tmp_path / "later", 1500, seed=3).metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text(kept + "".join(line for line in later if json.loads(line)["step"] > 700))
    assert curves.refresh()
    for each in (curves, Curves.open(run.path)):
        window = each.window("loss", columns=10_000)
        assert np.array_equal(window.step, np.arange(1, 1501))
        assert np.array_equal(window.low, values_of(run.metrics_file, "loss")[1])
        assert (np.diff(window.seconds) > 0).all()


def test_steps_taken_again_replace_the_earlier_ones(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 900, seed=2, eval_every=100)
    later = (
        write_run(tmp_path / "later", 900, seed=3, eval_every=100).metrics_file.read_text().splitlines(keepends=True)
    )
    again = "".join(line for line in later if json.loads(line)["step"] > 350)
    expected = run.metrics_file.read_text().splitlines(keepends=True)
    kept = [line for line in expected if json.loads(line)["step"] <= 350] + again.splitlines(keepends=True)
    at_once = tmp_path / "at_once"
    at_once.mkdir()
    (at_once / "metrics.jsonl").write_text("".join(expected) + again)
    followed = Curves.open(run.path)
    with run.metrics_file.open("a") as file:
        file.write(again)
    followed.refresh()
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "metrics.jsonl").write_text("".join(kept))
    for name in ("loss", "val_loss", "split_seconds/data"):
        window = Curves.open(plain).window(name)
        assert same(Curves.open(at_once).window(name), window)
        assert same(followed.window(name), window)


def test_lines_cut_short_are_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 50, seed=2)
    whole = run.metrics_file.read_text()
    run.metrics_file.write_text(whole + '{"step": 51, "lo\n[1]\n{"loss": 1}\n{"step": 51, "tokens": 1, "loss": 2.5}')
    curves = Curves.open(run.path)
    assert (curves.unread, curves.last_step) == (3, 50)
    with run.metrics_file.open("a") as file:
        file.write("\n")
    curves.refresh()
    assert curves.window("loss", 51, 51).low.tolist() == [2.5]


def test_damage_of_the_cache_is_found(run: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    expected = Curves.open(run, cache).window("loss")
    file = cache / "metrics"
    data = file.read_bytes()
    random = np.random.default_rng(1)
    places = [0, 20, 100, *(int(each) for each in random.integers(0, len(data), 5))]
    broken = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in places]
    for each in [*broken, data[: len(data) // 2], b"", b"shoal arrays 1 5 x\n", data[:10]]:
        file.unlink()
        file.write_bytes(each)
        assert same(Curves.open(run, cache).window("loss"), expected)
        assert same(Curves.open(run, cache).window("mfu"), Curves.open(run, tmp_path / "new").window("mfu"))


def test_a_cache_that_cannot_be_written_is_kept_in_memory(run: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    curves = Curves.open(run, blocked)
    assert len(curves.window("loss", columns=10_000)) == 6000
    assert not curves.refresh()
    assert blocked.read_text() == ""


def test_readers_at_once(run: Path, tmp_path: Path) -> None:
    expected = Curves.open(run, tmp_path / "one").window("loss")
    found: list[Window] = []

    def read() -> None:
        for _ in range(3):
            found.append(Curves.open(run, tmp_path / "many").window("loss"))
            (tmp_path / "many" / "metrics").unlink(missing_ok=True)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 12
    assert all(same(each, expected) for each in found)
    assert not [each for each in (tmp_path / "many").iterdir() if each.suffix == ".tmp"]


def test_other_replicas_have_curves_of_their_own(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 31):
            for replica in (0, 1):
                file.write(
                    json.dumps({"step": step, "tokens": step, "replica": replica, "loss": 10 * replica + step}) + "\n"
                )
    curves = Curves.open(tmp_path)
    assert curves.names() == ["loss", "loss@1"]
    assert curves.window("loss@1").low.tolist() == [10.0 + step for step in range(1, 31)]


def test_sources_that_come_and_go(tmp_path: Path) -> None:
    """Lines whose keys differ, also those that differ by a digit alone."""
    random = np.random.default_rng(4)
    expected: dict[str, dict[int, float]] = {}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 400):
            own = {f"c{i}": step + i / 8 for i in random.permutation(4)[: random.integers(1, 4)].tolist()}
            for name, value in own.items():
                expected.setdefault(f"source_loss/{name}", {})[step] = value
            file.write(
                json.dumps({"step": step, "tokens": step, "mfu": None, "loss": 1e-5 * step, "source_loss": own}) + "\n"
            )
    curves = Curves.open(tmp_path)
    assert set(curves.names()) == {"loss", *expected}
    for name, values in expected.items():
        window = curves.window(name)
        assert dict(zip(window.step.tolist(), window.low.tolist(), strict=True)) == values


def test_buckets_stay_while_a_run_adds_points(run: Path, tmp_path: Path) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b"".join(lines[:3000]))
    curves = Curves.open(tmp_path)
    before = curves.window("loss", 5, None, 100)
    generation = curves.generation
    with log.open("ab") as file:
        file.writelines(lines[3000:3300])
    curves.refresh()
    after = curves.window("loss", 5, None, 100)
    whole = int((before.start + before.count.sum()) // before.width - before.start // before.width)
    assert (curves.generation, after.width, after.start) == (generation, before.width, before.start)
    for name in ("step", "low", "high", "mean", "count", "seconds"):
        kept = getattr(before, name)[:whole]
        assert np.array_equal(getattr(after, name)[:whole], kept, equal_nan=True)


def test_names_of_a_log_that_was_not_read(run: Path, tmp_path: Path) -> None:
    assert set(names_at_the_end(run / "metrics.jsonl")) == set(Curves.open(run).names())
    assert names_at_the_end(tmp_path / "none") == []
