"""The predicted time of a step: rates, corrections, what runs teach, and a calibration of this machine."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shoal.config.data_options import Data
from shoal.config.layout import Layout
from shoal.config.options import Config, Model, Train
from shoal.errors import ShoalError
from shoal.plan.choice.choose import choose
from shoal.plan.choice.sketch import sketch
from shoal.plan.estimate import flops_per_token
from shoal.plan.fits import need_of
from shoal.plan.machine import Machine, find_machine, machine_of
from shoal.plan.rehearse.work import Op
from shoal.plan.speed import calibration, measured
from shoal.plan.speed.calibration import VERSION, Calibration, Setting
from shoal.plan.speed.corrections import Corrections, Seen
from shoal.plan.speed.rates import Curve, Rates
from shoal.plan.speed.seconds import Part, idle_share, step_seconds
from shoal.system.cpu import model_name
from tests.cli.commands import Place

SMALL = Config(
    model=Model(dim=256, num_layers=8, num_heads=8, num_kv_heads=4, ffn_dim=768, vocab_size=2000),
    data=Data(seq_len=256),
    train=Train(global_batch=32, micro_batch=4, dtype="bfloat16", steps=1),
)
CPUS = find_machine("2xcpu-8GB", 1)
GPUS = find_machine("8xH100-80GB", 2)


# --- rates


def test_a_curve_passes_through_what_was_measured_and_goes_on_beyond() -> None:
    curve = Curve([[10, 100], [4, 16]], [1.0, 3.0, 8.0, 20.0])
    assert curve.at([10, 16]) == pytest.approx(3.0)
    assert curve.at([100, 4]) == pytest.approx(8.0)
    assert 1.0 < curve.at([30, 4]) < 8.0
    assert curve.at([1000, 16]) == pytest.approx(200.0)  # as much time per element as at the last size
    assert curve.at([1, 4]) == pytest.approx(1.0)  # as much time as at the first size
    squares = Curve([[10, 100]], [1.0, 100.0], (2,))
    assert squares.at([1000]) == pytest.approx(10_000)


@pytest.mark.parametrize("seq_len", [256, 2048])
def test_products_and_attention_are_the_model_s_flops(seq_len: int) -> None:
    """The FLOPs that a rehearsal counts, against the formula behind MFU; and a GPU's time, against its peak."""
    config = SMALL.replace("data", seq_len=seq_len).replace("model", max_seq_len=seq_len)
    need = need_of(config, Layout(), cuda=True)
    counted = 0
    for op, times in need.works[0].done.items():
        if op.kind.startswith("linear"):
            counted += times * 2 * math.prod(op.sizes) * (2 if op.kind.endswith("back") else 1)
        elif "attention" in op.kind:  # backward computes the scores again, which MFU does not count
            counted += times * 2 * math.prod(op.sizes) * (4 if op.kind.endswith("back") else 2)
    assert counted == pytest.approx(flops_per_token(config.model, seq_len, "full") * 32 * seq_len, rel=1e-9)


def test_messages_between_nodes_take_longer_and_grow_with_their_size() -> None:
    rates = Rates(GPUS, 2)
    near, far = (rates.message("all_gather", "shard", 8, 2**30, far=far) for far in (False, True))
    assert far > near > 2**30 * 7 / 8 / GPUS.link
    assert rates.message("all_reduce", "batch", 8, 2**30, far=True) == pytest.approx(2 * far, rel=0.01)
    assert rates.message("send", "pp", 2, 2**30, far=True) >= 2**30 / GPUS.network
    measured_links = Rates(CPUS, 4, {}, {"all_gather": Curve([[2], [1, 2**20]], [1e-4, 1e-2], (0, 1))})
    assert measured_links.message("all_gather", "shard", 2, 2**21, far=False) == pytest.approx(1e-2)
    waiting = dataclasses.replace(measured_links, waits={"tp": Curve([[2, 4]], [3.0, 1.0], (0,))}, stretch=2.0)
    assert waiting.message("all_gather", "shard", 2, 2**21, far=False) == pytest.approx(2e-2)
    assert waiting.message("all_gather", "tp", 2, 2**21, far=False) == pytest.approx(6e-2)


def test_a_pipeline_idles_and_gradients_hide_behind_products() -> None:
    rates = Rates(GPUS, 2)
    pipeline = need_of(SMALL, Layout(pp=4, dp_replicate=2), cuda=True)
    parts = step_seconds(pipeline.works, pipeline.layout, idle_share(pipeline), rates)
    busy = sum(s for part, s in parts.items() if part not in ("bubble", "update", "replicate"))
    assert parts["bubble"] / (busy + parts["bubble"]) == pytest.approx(idle_share(pipeline))
    # with two processes on a core, one works while the other idles
    shared = step_seconds(
        pipeline.works, pipeline.layout, idle_share(pipeline), dataclasses.replace(rates, sharing=2.0)
    )
    assert shared["bubble"] == 0.0
    large = SMALL.replace("model", dim=4096, num_heads=32, num_kv_heads=8, ffn_dim=14336, num_layers=8).replace("data", seq_len=4096).replace("train", global_batch=8, micro_batch=1)  # fmt: skip
    sharded = need_of(large.replace("model", max_seq_len=4096), Layout(dp_shard=8), cuda=True)
    assert step_seconds(sharded.works, sharded.layout, 0.0, rates).get("shard", 0.0) == 0.0


def test_a_sketch_is_near_what_is_rehearsed() -> None:
    for layout in (
        Layout(dp_shard=8),
        Layout(dp_replicate=2, dp_shard=4),
        Layout(tp=2, dp_shard=4),
        Layout(dp_replicate=8),
    ):
        rough, exact = sketch(SMALL, layout, cuda=True), need_of(SMALL, layout, cuda=True)
        assert rough.total == pytest.approx(exact.total, rel=0.1)
        seconds = [sum(step_seconds(n.works, layout, 0.0, Rates(GPUS, 2)).values()) for n in (rough, exact)]
        assert seconds[0] == pytest.approx(seconds[1], rel=0.1)


# --- corrections


def drawn(random: random.Random, factors: Mapping[Part, float], spread: float) -> Seen:
    """Return a step whose parts take `factors` times as long as predicted, measured with this spread."""
    parts = {part: random.lognormvariate(0, 1) for part in factors}
    seconds = sum(factors[part] * s for part, s in parts.items()) * random.lognormvariate(0, spread)
    return Seen(parts, seconds)


def test_corrections_find_the_factors_and_their_intervals_hold() -> None:
    rng = random.Random(7)
    factors: dict[Part, float] = {"products": 1.3, "elementwise": 0.8, "shard": 2.0}
    steps = [drawn(rng, factors, 0.05) for _ in range(240)]
    before, after = Corrections([], calibrated=False), Corrections(steps[:40], calibrated=False)
    for part, factor in factors.items():
        assert after.factor(part) == pytest.approx(factor, rel=0.1)
    errors = [
        statistics.median(abs(c.predict(s.parts).middle / s.seconds - 1) for s in steps[40:]) for c in (before, after)
    ]
    assert errors[1] < errors[0] / 2
    held = sum(after.predict(s.parts).holds(s.seconds) for s in steps[40:]) / 200
    assert 0.85 <= held <= 0.98
    assert all(before.predict(s.parts).holds(s.seconds) for s in steps)


def test_few_steps_correct_without_false_certainty() -> None:
    rng = random.Random(1)
    held = 0
    for _ in range(100):
        factors: dict[Part, float] = {p: rng.lognormvariate(0, 0.2) for p in ("products", "attention", "elementwise")}
        learned = Corrections([drawn(rng, factors, 0.1) for _ in range(3)], calibrated=False)
        step = drawn(rng, factors, 0.1)
        held += learned.predict(step.parts).holds(step.seconds)
    assert held >= 85


def test_a_part_that_was_never_measured_widens_the_interval() -> None:
    learned = Corrections([Seen({"products": 1.0}, 1.1)] * 10, calibrated=True)
    known, new = learned.predict({"products": 1.0}), learned.predict({"products": 0.5, "pp": 0.5})
    assert new.high / new.low > known.high / known.low


def test_runs_teach_how_much_memory_is_needed_and_its_interval_holds() -> None:
    """Devices that each take another share more than was counted; 0, 4 and 20 runs on each."""
    rng, widths = random.Random(3), list[float]()
    for runs in (0, 4, 20):
        held, width = 0, 0.0
        for _ in range(200):
            share = rng.lognormvariate(0, 0.04)
            seen = [Seen({"products": 1.0}, 1.0, share * rng.lognormvariate(0, 0.01)) for _ in range(runs + 1)]
            found = Corrections(seen[:-1], calibrated=True).memory(2**30, cuda=True)
            held += found.holds(2**30 * (seen[-1].memory or 0.0))
            width += math.log(found.high / found.low) / 200
        assert held >= 180  # 90%; wider intervals before a device's own spread is known
        widths.append(width)
    assert widths[0] > widths[1] > widths[2]
    once = Corrections([Seen({"products": 1.0}, 1.0, 1.05)] * 50, calibrated=True).memory(100, cuda=True)
    assert once.middle == pytest.approx(105, rel=0.01)
    exact = Corrections([], calibrated=False).memory(100, cuda=False)
    assert exact.middle == 100
    assert exact.high < 101


# --- what is kept


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "shoal" / "plan"


def a_calibration(device: str, seconds: float = 0.01) -> Calibration:
    curves: dict[Any, Curve] = {
        "linear": Curve([[64], [64], [64]], [seconds]),
        "linear back": Curve([[64]] * 3, [seconds]),
    }
    return Calibration(device, False, 2, "2.13.0", 0.0, [Setting(2, 1, "float32", curves, {}, {}, 1.0)])


def test_a_calibration_is_read_back_and_used(kept: Path) -> None:
    path = calibration.kept_file(model_name())
    assert path.parent == kept
    a_calibration(model_name()).save(path)
    rates = measured.known(CPUS, "float32")[0]
    assert rates.measured
    assert rates.device(Op("linear", (64, 64, 64))) == pytest.approx(0.01)
    four = measured.known(find_machine("4xcpu-8GB", 1), "float32")[0]
    assert four.device(Op("linear", (64, 64, 64))) == pytest.approx(0.02)  # twice as many processes as cores
    assert not measured.known(CPUS, "bfloat16")[0].measured
    assert not measured.known(GPUS, "bfloat16")[0].measured


def test_a_calibration_keeps_what_is_not_measured_again(kept: Path) -> None:
    old = a_calibration("CPU")
    new = dataclasses.replace(old, settings=[dataclasses.replace(old.settings[0], processes=1)])
    assert [each.processes for each in new.joined(old).settings] == [2, 1]
    assert new.joined(dataclasses.replace(old, torch="2.11.0")) == new
    assert len(old.joined(old).settings) == 1


def test_a_calibration_of_another_machine_is_refused(kept: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    a_calibration("Another CPU").save(other)
    with pytest.raises(ShoalError, match="was measured on Another CPU, but the plan is for"):
        measured.known(CPUS, "float32", other)[0]
    other.write_text(f'{{"version": {VERSION}, "settings": 3}}')
    with pytest.raises(ShoalError, match="is not a calibration"):
        measured.known(CPUS, "float32", other)[0]
    with pytest.raises(ShoalError, match="does not exist; shoal plan --calibrate"):
        measured.known(CPUS, "float32", tmp_path / "missing.json")[0]


def test_a_machine_that_is_far_slower_than_its_data_sheet_is_believed() -> None:
    parts: dict[Part, float] = {"products": 0.04, "elementwise": 0.01, "replicate": 0.004}
    usual = sum(parts.values())
    seen = [Seen(parts, factor * usual) for factor in (3.4, 3.6)]
    found = Corrections(seen, calibrated=False).predict(parts)
    assert found.middle == pytest.approx(3.5 * usual, rel=0.1)
    assert Corrections(seen[:1], calibrated=False).predict(parts).middle > 2 * usual


def keep(config: Config, layout: Layout, machine: Machine, seconds: float, memory: float | None = None) -> None:
    """Keep a step as a run does that ends. memory: over what was counted."""
    found = measured.predict(config, layout, machine)
    assert found is not None
    measured.keep(found, seconds, int(memory * found.need.total) if memory else None)


def test_runs_teach_the_next_prediction(kept: Path) -> None:
    """Runs that all take twice the time: the twentieth is predicted much better than the first; the report says so."""
    config = SMALL.replace("train", dtype="float32").replace("launch", name="slow")
    machine = machine_of("", 2, 1, 8 * 2**30, cuda=False)
    assert machine is not None
    need = need_of(config, Layout(dp_replicate=2), cuda=False)
    usual = sum(step_seconds(need.works, need.layout, 0.0, Rates(machine, 4)).values())
    for _ in range(20):
        keep(config, Layout(dp_replicate=2), machine, 2 * usual)
    found = measured.read_all()
    errors = [abs(m.predicted.middle / m.seconds - 1) for m in found]
    assert errors[0] == pytest.approx(0.5)
    assert errors[-1] < 0.05
    assert measured.Measured.of_line(found[3].as_line()) == found[3]
    _, seen = measured.known(CPUS, "float32")
    assert len(seen) == 20
    [best, *_] = choose(config, CPUS, seen=seen).found
    assert sum(best.parts.values()) == pytest.approx(best.seconds.middle / 2, rel=0.05)
    with (kept / "steps.jsonl").open("a") as file:
        file.write('{"version": 1}\nnot json\n')
    assert len(measured.read_all()) == 20
    assert "data sheet    20" in "\n".join(measured.report(measured.read_all()))
    for _ in range(2):
        keep(SMALL, Layout(dp_shard=16), GPUS, 1.0, 1.01)
    assert measured.read_all()[-1].memory is not None
    *_, said = measured.report(measured.read_all())
    assert said.startswith("memory of 2 runs on GPUs: median error ")
    assert said.endswith("in its 90% interval: 2")


def test_the_file_of_steps_does_not_grow_without_end(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MOST_BYTES", 20_000)
    machine = machine_of("", 1, 1, 2**30, cuda=False)
    assert machine is not None
    for _ in range(30):
        keep(SMALL.replace("train", dtype="float32"), Layout(), machine, 1.0)
    assert (kept / "steps.jsonl").stat().st_size < 20_000
    assert measured.read_all()


@pytest.mark.ci
def test_a_run_is_kept_with_its_prediction_and_one_with_faults_is_not(kept: Path, tmp_path: Path) -> None:
    place = Place(tmp_path)
    state = {"XDG_STATE_HOME": str(tmp_path)}
    slow = json.dumps([{"step": 5, "phase": "forward", "rank": 0, "fault": "slow", "seconds": 0.01, "steps": 5}])
    place.good(
        "train",
        "recipe.yaml",
        "--name",
        "slowed",
        "--processes",
        "1",
        "--train.steps",
        "10",
        SHOAL_FAULTS=slow,
        **state,
    )
    assert not measured.read_all()
    keep(SMALL.replace("train", dtype="float32"), Layout(dp_replicate=2), CPUS, 1.0)
    said = place.good("train", "recipe.yaml", "--name", "one", **state)
    assert "predicted: " in said
    assert "a step took " in said
    _, one = measured.read_all()
    assert (one.run, one.per_node, one.layout, one.device) == ("one", 2, Layout(dp_replicate=2), model_name())
    lines = [line["step_seconds"] for line in place.metrics("one") if "step_seconds" in line]
    assert one.seconds == pytest.approx(statistics.median(lines[3:]))


@pytest.mark.ci
def test_this_machine_is_calibrated(kept: Path, tmp_path: Path) -> None:
    """The real measurement, for one setting: its rates order sizes and kinds as any machine does."""
    place = Place(tmp_path)
    said = place.good("plan", "--calibrate", "6", "--launch.processes", "2", XDG_STATE_HOME=str(tmp_path))
    path = calibration.kept_file(model_name())
    assert str(path) in said
    rates = measured.known(CPUS, "float32")[0]
    assert rates.measured
    small, large = (rates.device(Op("linear", (rows, 256, 256))) for rows in (64, 4096))
    assert 1 < large / small < 1000
    assert rates.device(Op("attention", (8, 1024, 1024, 64))) > rates.device(Op("attention", (8, 256, 256, 64)))
    assert set(rates.links) == {"all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send", "shared_sum"}
    small, large = (rates.message("all_reduce", "batch", 2, size, far=False) for size in (2**14, 2**24))
    assert large > small
    assert set(rates.waits) == {"tp", "shard"}
    assert 0.2 < rates.stretch < 5
    shown = place.good("plan", "recipe.yaml", "--devices", "2xcpu-8GB", XDG_STATE_HOME=str(tmp_path))
    assert "rates: measured on such a machine" in shown
