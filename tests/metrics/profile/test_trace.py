"""What a trace says, on traces written by hand: owners of spans, costs, overlap and memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from shoal.metrics.profile import costs
from shoal.metrics.profile.memory import find_peak
from shoal.metrics.profile.records import Overlap
from shoal.metrics.profile.trace import (
    BACKWARD_NODE,
    Trace,
    backward_lanes,
    build,
    enrich,
    read_events,
    separate_transfers,
    write_events,
)
from tests.metrics.profile.events import GLOO, kernel, memory, op, problems_of, span

MODULES = ["embed", "blocks.0", "blocks.0.ffn", "blocks.0.ffn.up", "blocks.1", "loss"]
NODE = {"Fwd thread id": 1}


def step_of_two_blocks() -> list[dict[str, Any]]:
    """Return a step: forward of two modules, whose nodes have numbers 5 and 6, and backward in the opposite order."""
    return [
        span("step 10", 0, 1000),
        span("forward", 10, 300),
        span("blocks.0", 20, 100),
        span("blocks.0.ffn", 30, 80),
        span("blocks.0.ffn.up", 40, 60),
        op("aten::t", 42, 3, **{"Sequence number": 5}),  # carries the number of the node that comes after it
        op("aten::linear", 50, 40, **{"Sequence number": 5}),
        op("aten::mm", 55, 30, **{"Sequence number": 5}),
        span("blocks.1", 130, 100),
        op("aten::mul", 140, 50, **{"Sequence number": 6}),
        span("backward", 400, 400),
        op(f"{BACKWARD_NODE}MulBackward0", 410, 90),  # hooks hide its number, which the node itself has
        op("MulBackward0", 430, 60, **{"Sequence number": 6, **NODE}),
        op("aten::mul", 440, 20),
        op(f"{BACKWARD_NODE}MmBackward0", 510, 100, **{"Sequence number": 5, **NODE}),
        op("MmBackward0", 512, 90, **{"Sequence number": 5, **NODE}),
        op("aten::mm", 520, 70),
        op(f"{BACKWARD_NODE}torch::autograd::AccumulateGrad", 620, 10),
        op("aten::add_", 622, 5),
        span("optimizer", 810, 100),
        op("aten::_fused_adamw_", 820, 60),
    ]


def owners(trace: Trace) -> dict[tuple[str, float], tuple[int, str, str]]:
    return {(s.name, s.start): (s.step, s.phase, s.module) for s in trace.spans}


def test_spans_belong_to_the_module_that_made_their_node() -> None:
    found = owners(build(step_of_two_blocks(), MODULES))
    assert found["aten::mm", 55] == (10, "forward", "blocks.0.ffn.up")
    assert found["aten::mul", 140] == (10, "forward", "blocks.1")
    assert found["aten::mul", 440] == (10, "backward", "blocks.1")
    assert found["aten::mm", 520] == (10, "backward", "blocks.0.ffn.up")
    assert found["aten::add_", 622] == (10, "backward", "blocks.0.ffn.up")  # adds the gradient of the node before it
    assert found["aten::_fused_adamw_", 820] == (10, "optimizer", "")


def test_turns_of_modules_in_backward_nest() -> None:
    lanes = backward_lanes(build(step_of_two_blocks(), MODULES))
    assert sorted(lanes) == sorted(
        [
            ("blocks.1", 410, 500),
            ("blocks.0", 510, 630),
            ("blocks.0.ffn", 510, 630),
            ("blocks.0.ffn.up", 510, 630),
        ]
    )


def test_costs_are_of_operators_themselves() -> None:
    trace = build(step_of_two_blocks(), MODULES)
    found = {each.name: each for each in costs.operators(trace, on_device=False)}
    mm = found["aten::mm"]
    assert mm.calls == 2
    assert (mm.cpu_seconds, mm.share) == pytest.approx((100e-6, 0.1))
    assert (mm.module, mm.module_share) == ("blocks.*.ffn.up", 1.0)
    assert found["aten::linear"].cpu_seconds == pytest.approx(10e-6)
    assert found["aten::mul"].module_share == 1.0  # both belong to blocks.1
    modules = {each.name: each for each in costs.modules(trace)}
    assert modules["blocks.0"].forward_seconds == pytest.approx(100e-6)
    assert modules["blocks.0"].backward_seconds == pytest.approx(120e-6)
    assert "embed" not in modules
    assert costs.phases(trace)["backward"] == pytest.approx(400e-6)


def test_the_timeline_nests_and_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = build(step_of_two_blocks(), MODULES)
    line = costs.timeline(trace)
    shown = [(int(depth), line.names[int(name)]) for depth, _, _, name in line.ranges]
    assert shown[:5] == [(0, "step 10"), (1, "forward"), (2, "blocks.0"), (3, "blocks.0.ffn"), (4, "blocks.0.ffn.up")]
    assert line.dropped == 0
    monkeypatch.setattr(costs, "MOST_RANGES", 3)
    few = costs.timeline(trace)
    assert [few.names[int(name)] for *_, name in few.ranges] == ["step 10", "forward", "backward"]
    assert few.dropped == len(line.ranges) - 3


def test_an_enriched_trace_is_valid_and_names_the_rank(tmp_path: Path) -> None:
    about = {"ph": "M", "pid": 9, "ts": 0.0}
    events = {
        "traceEvents": [*step_of_two_blocks(), {**about, "name": "process_name", "tid": 0, "args": {"name": "python"}}]
    }
    assert problems_of(events) == []
    enrich(events, build(events["traceEvents"], MODULES), 3)
    assert write_events(tmp_path / "rank3.trace.json.gz", events) == (tmp_path / "rank3.trace.json.gz").stat().st_size
    written = read_events(tmp_path / "rank3.trace.json.gz")
    assert problems_of(written) == []
    assert {"rank 3"} == {e["args"]["name"] for e in written["traceEvents"] if e["name"] == "process_name"}
    assert sum(e.get("cat") == "backward" for e in written["traceEvents"]) == 4


def test_transfers_of_gloo_are_hidden_by_operators_of_other_threads() -> None:
    events = [
        span("step 1", 0, 100),
        op("aten::mm", 10, 30),
        op("c10d::allreduce_", 45, 10),  # the call; its transfer is on gloo's thread
        op("AllReduceBackward", 60, 20),  # calls a collective and waits for it: no computing
        op("c10d::allgather_", 62, 2),
        op("aten::add_", 70, 4),  # but this operator in it computes
        span("gloo:all_reduce", 20, 30, GLOO),
        op("aten::view", 22, 5, GLOO),  # a part of the transfer
        span("gloo:all_gather", 65, 15, GLOO),
    ]
    found = costs.overlap(build(events, []))
    assert found.communication_seconds == pytest.approx(45e-6)
    assert found.compute_seconds == pytest.approx(34e-6)
    assert found.hidden_seconds == pytest.approx(24e-6)
    assert found.percent == pytest.approx(100 * 24 / 45)


def test_transfers_that_outlast_their_call_get_lanes_of_their_own() -> None:
    events = {"traceEvents": [
        span("step 1", 0, 200), op("c10d::send", 10, 20), span("gloo:send", 12, 60), span("gloo:recv", 40, 60),
        span("gloo:send", 80, 200), op("aten::mm", 50, 30),
    ]}  # fmt: skip
    assert problems_of(events) != []
    separate_transfers(events)
    assert problems_of(events) == []
    lanes = [e["tid"] for e in events["traceEvents"] if e["name"].startswith("gloo:")]
    assert lanes == [2, 3, 2]
    found = costs.overlap(build(events["traceEvents"], []))
    assert found.communication_seconds == pytest.approx(268e-6)
    assert found.hidden_seconds == pytest.approx(30e-6)


def test_a_wait_in_a_named_range_is_no_computing() -> None:
    events = [
        op("RegisterPostBackwardFunctionBackward", 0, 50),
        span("FSDP::post_backward_reduce (blocks.0)", 10, 35),
        op("aten::cat", 12, 3),
        span("gloo:reduce_scatter", 0, 60, GLOO),
    ]
    found = costs.overlap(build(events, MODULES))
    assert found.hidden_seconds == found.compute_seconds == pytest.approx((15 + 3) * 1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_overlap_of_kernels_equals_a_count_of_microseconds(seed: int) -> None:
    chance = random.Random(seed)
    events, moving, busy = [span("step 1", 0, 500)], set[int](), set[int]()
    for stream in range(4):
        at = 0
        while at < 400:
            start, dur = at + chance.randrange(20), 1 + chance.randrange(30)
            is_nccl = stream == 0
            name = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(...)" if is_nccl else "ampere_sgemm_128x64"
            events.append(kernel(name, start, dur, tid=stream + 10))
            (moving if is_nccl else busy).update(range(start, start + dur))
            at = start + dur
    found = costs.overlap(build(events, []))
    assert found.communication_seconds == pytest.approx(len(moving) * 1e-6)
    assert found.compute_seconds == pytest.approx(len(busy) * 1e-6)
    assert found.hidden_seconds == pytest.approx(len(moving & busy) * 1e-6)


def test_no_communication_has_no_percent() -> None:
    assert costs.overlap(build(step_of_two_blocks(), MODULES)).percent is None
    assert Overlap(communication_seconds=2.0, compute_seconds=9.0, hidden_seconds=0.5).percent == 25.0


def test_kernels_count_for_the_operator_that_launched_them() -> None:
    events = [
        span("step 1", 0, 100),
        span("forward", 0, 90),
        span("blocks.1", 0, 90),
        op("aten::linear", 1, 20, **{"External id": 1}),
        op("aten::mm", 2, 10, **{"External id": 2}),
        kernel("sgemm", 30, 40, external=2),
        kernel("elementwise", 70, 4, external=99),  # of an operator before the recording
    ]
    trace = build(events, MODULES)
    found = {each.name: each for each in costs.operators(trace, on_device=True)}
    assert found["aten::mm"].device_seconds == pytest.approx(40e-6)
    assert found["aten::mm"].module == "blocks.*"
    assert found["aten::mm"].share == pytest.approx(0.4)
    assert found["elementwise"].device_seconds == pytest.approx(4e-6)
    assert "aten::linear" not in found


@pytest.mark.parametrize("seed", range(20))
def test_the_peak_of_memory_equals_a_replay(seed: int) -> None:
    chance = random.Random(seed)
    events = [span("step 1", 0, 500), span("forward", 0, 250), span("embed", 0, 100), span("loss", 100, 150)]
    live: dict[int, tuple[int, str]] = {}
    totals = []
    for at in range(1, 400):
        if live and chance.random() < 0.45:
            address = chance.choice(list(live))
            events.append(memory(at, -live.pop(address)[0], address))
        else:
            size, address = 1 + chance.randrange(1000), 1000 + at
            live[address] = (size, "embed" if at < 100 else "loss" if at < 250 else "")
            events.append(memory(at, size, address))
        totals.append((sum(size for size, _ in live.values()), list(live.values()), at))
    events.append(memory(450, -(10**6), 77))  # frees what was there before the recording
    events.append(memory(460, 10**9, 78, device=1))  # on another device
    most, held, when = max(totals, key=lambda total: total[0])
    peak = find_peak(build(events, MODULES), 0)
    assert peak.bytes == most
    assert peak.seconds == pytest.approx(when * 1e-6)
    for module in ("embed", "loss"):
        assert peak.by_module.get(module, 0) == sum(size for size, name in held if name == module)
    assert peak.other_bytes == sum(size for size, name in held if name == "")
