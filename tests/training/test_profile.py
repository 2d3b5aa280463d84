"""Recording steps of real runs: nothing changes in the run, and the profile agrees with torch's own sums and with shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.mesh.mesh import Mesh
from shoal.metrics.profile.recorder import Recorder
from shoal.metrics.profile.records import Profile, RankMemory, RankProfile, read_memory
from shoal.metrics.profile.trace import Trace, build, read_events
from shoal.run.folder import RunFolder
from shoal.run.phases import PHASES
from shoal.run.profiles import Asked, Steps, config_of_profile, folder_of
from shoal.run.records import StepRecord, read_metrics
from shoal.training.loop import take_steps
from shoal.training.profile import record_in
from shoal.training.run import Run
from tests.metrics.profile.events import problems_of
from tests.training.test_equivalence import ALONE, NeverStop, config_in
from tests.world import World, laid_out

STEPS = Steps(3, 4)
SHAPES = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}  # of `config_in`'s attention


def profiled(
    mesh: Mesh, config: Config, layout: dict[str, int], asked: Asked
) -> tuple[list[StepRecord], dict[str, float]]:
    """Profile a run; return the records of its steps, and torch's own self time by operator."""
    seen: list[Any] = []
    usual = Recorder.stop

    def stop(self: Recorder) -> None:  # keeps torch's profiler, to ask it for its own sums
        seen.extend([self._profile] * self.is_on)
        usual(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "stop", stop)
        assert not record_in(laid_out(mesh, **layout) if layout else mesh, config, asked, NeverStop())
    own = {each.key: each.self_cpu_time_total * 1e-6 for each in seen[0].key_averages()} if seen else {}
    return list(read_metrics(RunFolder.of(config).metrics_file).steps), own


def trained(mesh: Mesh, config: Config, layout: dict[str, int]) -> list[StepRecord]:
    """Train as usual; return the records of the steps that `profiled` takes too."""
    run = Run.open(config, laid_out(mesh, **layout) if layout else mesh, NeverStop())
    take_steps(run)
    run.close()
    return list(read_metrics(run.folder.metrics_file).steps)[: STEPS.last]


def same_losses(mine: list[StepRecord], theirs: list[StepRecord]) -> bool:
    return [(r.step, r.loss, r.grad_norm) for r in mine] == [(r.step, r.loss, r.grad_norm) for r in theirs]


def check_trace(folder: Path, rank: RankProfile) -> Trace:
    """Check a rank's trace: valid, named, with all phases and modules. Return it."""
    events = read_events(folder / rank.trace)
    assert problems_of(events) == []
    assert f"rank {rank.rank}" in {e["args"]["name"] for e in events["traceEvents"] if e["name"] == "process_name"}
    names = {e["name"] for e in events["traceEvents"] if e.get("cat") == "user_annotation"}
    wanted = {f"blocks.{i}.{m}" for i in range(2) for m in ("attention", "attention.q", "ffn", "ffn.down", "ffn_norm")}
    assert wanted | {"embed", "norm", "loss", "step 3", "step 4", *PHASES} <= names
    assert not {"step 2", "step 5"} & names
    backward = {e["name"] for e in events["traceEvents"] if e.get("cat") == "backward"}
    assert wanted <= backward
    return build(events["traceEvents"], [each.name for each in rank.modules])


def check_costs(rank: RankProfile, own: dict[str, float]) -> None:
    """Check self times against torch's own sums, and sums against the recorded steps."""
    dearest = [each.name for each in rank.operators if each.name.startswith("aten::")]
    assert dearest[0] == max((n for n in own if n.startswith("aten::")), key=lambda n: own[n])
    for each in rank.operators[:10]:
        assert each.cpu_seconds == pytest.approx(own[each.name], rel=1e-3, abs=2e-5), each.name
    assert list(rank.steps) == [3, 4]
    whole = sum(rank.step_seconds)
    assert 0 < sum(each.cpu_seconds for each in rank.operators) < whole
    assert sum(rank.phase_seconds.values()) <= whole
    assert 0 <= rank.outside_seconds <= whole
    assert (
        next(each.module for each in rank.operators if each.name == "aten::mm") != ""
    )  # no product is outside of modules


def check_memory(memory: RankMemory, share: int) -> None:
    """Check bytes by module against shapes. share: of how many ranks each holds a part."""
    held = {each.name: each for each in memory.modules}
    for block in range(2):
        for name, shape in SHAPES.items():
            size = 4 * prod(shape) // share
            found = held[f"blocks.{block}.attention.{name}"]
            assert (found.parameter_bytes, found.gradient_bytes, found.optimizer_bytes) == (size, size, 2 * size)
    assert held["blocks.0.ffn_norm"].parameter_bytes == 4 * 64 // share
    inside = sum(each.activation_bytes for each in memory.modules)
    assert inside + memory.other_bytes == memory.peak_bytes
    # silu(gate) * up saves gate and up, [2, 48, 101] in float32: still held at the end of forward
    assert held["blocks.0.ffn.gate"].activation_bytes >= 4 * 2 * 48 * 101
    assert held["blocks.0.ffn.up"].activation_bytes >= 4 * 2 * 48 * 101


def test_one_process(tmp_path: Path) -> None:
    plain = trained(ALONE, config_in(tmp_path, "plain", global_batch=8), {})
    config = config_of_profile(config_in(tmp_path, "plain", global_batch=8))
    steps, own = profiled(ALONE, config, {}, Asked(STEPS, [0]))
    assert same_losses(steps, plain)
    run = RunFolder.of(config)
    assert not run.has_checkpoint()
    folder = folder_of(run, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["memory.json", "rank0.trace.json.gz", "summary.json"]
    profile = Profile.read(folder)
    [rank] = profile.ranks
    check_costs(rank, own)
    trace = check_trace(folder, rank)
    assert [step.step for step in trace.steps] == [3, 4]
    assert rank.overlap.percent is None
    assert rank.overhead is not None
    check_memory(read_memory(folder)[0], 1)
    forward = {s.module for s in trace.spans if s.phase == "forward" and s.kind == "op"}
    backward = {s.module for s in trace.spans if s.phase == "backward" and s.kind == "op"}
    assert {f"blocks.1.attention.{name}" for name in "qkvo"} <= forward & backward


def test_two_sharded_processes(world: Callable[[int], World], tmp_path: Path) -> None:
    layout = {"dp_shard": 2}
    config = config_in(tmp_path, "plain", global_batch=8).replace("parallel", dp_shard=2)
    plain = world(2).run(trained, config, layout)[0]
    scratch = config_of_profile(config)
    answers = world(2).run(profiled, scratch, layout, Asked(STEPS, [0, 1]))
    assert same_losses(answers[0][0], plain)
    folder = folder_of(RunFolder.of(scratch), 3)
    profile = Profile.read(folder)
    assert [rank.rank for rank in profile.ranks] == [0, 1]
    assert profile.layout["dp_shard"] == 2
    for rank, (_, own), memory in zip(profile.ranks, answers, read_memory(folder), strict=True):
        check_costs(rank, own)
        trace = check_trace(folder, rank)
        check_memory(memory, 2)
        check_overlap(trace, rank)


def check_overlap(trace: Trace, rank: RankProfile) -> None:
    """Count the overlap again, in a grid of a microsecond, from the definition's words."""
    start = trace.start
    length = int(max(s.stop for s in trace.spans) - start) + 2
    moving, busy = torch.zeros(length, dtype=torch.bool), torch.zeros(length, dtype=torch.bool)
    for span in trace.spans:
        if span.kind == "range" and span.name.startswith("gloo:"):
            moving[round(span.start - start) : round(span.stop - start)] = True
    assert float(moving.sum()) * 1e-6 == pytest.approx(rank.overlap.communication_seconds, rel=0.05, abs=1e-4)
    for span in trace.spans:
        is_leaf = span.kind == "op" and not span.children and not span.is_communication
        if is_leaf and not any(each.is_communication for each in span.above()):
            busy[round(span.start - start) : round(span.stop - start)] = True
    hidden = float((moving & busy).sum()) * 1e-6
    # leaves are a part of computing: an operator's time around them counts too
    assert hidden <= rank.overlap.hidden_seconds + 1e-3
    assert rank.overlap.hidden_seconds <= rank.overlap.communication_seconds


@pytest.mark.ci
@pytest.mark.parametrize("layout", [{"dp_replicate": 2}, {"tp": 2}, {"pp": 2}, {"cp": 2}])
def test_other_layouts(world: Callable[[int], World], tmp_path: Path, layout: dict[str, int]) -> None:
    sizes = {"dp_replicate": 1, "dp_shard": 1, **layout}
    config = config_in(tmp_path, "plain", global_batch=8).replace("parallel", **sizes)
    plain = world(2).run(trained, config, layout)[0]
    scratch = config_of_profile(config)
    steps = world(2).run(profiled, scratch, layout, Asked(STEPS, [0, 1]))[0][0]
    assert same_losses(steps, plain)
    profile = Profile.read(folder_of(RunFolder.of(scratch), 3))
    modules = set()
    for rank in profile.ranks:
        events = read_events(folder_of(RunFolder.of(scratch), 3) / rank.trace)
        assert problems_of(events) == []
        modules |= {each.name for each in rank.modules if each.forward_seconds > 0 and each.backward_seconds > 0}
        assert rank.overlap.percent is not None
        assert rank.overlap.communication_seconds > 0
    assert {"blocks.0.attention", "blocks.1.ffn.down", "embed", "loss"} <= modules


@pytest.mark.ci
def test_recomputed_blocks_and_one_rank_of_two(world: Callable[[int], World], tmp_path: Path) -> None:
    layout = {"dp_shard": 2}
    config = config_in(tmp_path, "plain", global_batch=8, activation_checkpointing="full").replace(
        "parallel", dp_shard=2
    )
    plain = world(2).run(trained, config, layout)[0]
    scratch = config_of_profile(config)
    assert same_losses(world(2).run(profiled, scratch, layout, Asked(STEPS, [1]))[0][0], plain)
    folder = folder_of(RunFolder.of(scratch), 3)
    [rank] = Profile.read(folder).ranks
    assert rank.rank == 1
    assert problems_of(read_events(folder / rank.trace)) == []
    calls = {each.name: each.calls for each in rank.modules}
    assert calls["blocks.0.attention"] == 2 * calls["embed"]  # a second time in backward
    held = {each.name: each.activation_bytes for each in read_memory(folder)[0].modules}
    assert held.get("blocks.0.ffn.gate", 0) == 0  # recomputed instead of kept


def test_recording_stops_at_its_bound_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.training.profile.Recorder", functools.partial(Recorder, most_bytes=-(1 << 40)))
    config = config_of_profile(config_in(tmp_path, "plain", global_batch=8))
    assert not record_in(ALONE, config, Asked(STEPS, [0]), NeverStop())
    folder = folder_of(RunFolder.of(config), 3)
    [rank] = Profile.read(folder).ranks
    assert rank.stopped_early
    assert list(rank.steps) == [3]
    assert len(rank.step_seconds) == 1
    assert problems_of(read_events(folder / rank.trace)) == []
    assert [r.step for r in read_metrics(RunFolder.of(config).metrics_file).steps] == [1, 2, 3, 4]


def test_steps_beyond_the_run_are_an_error_on_all_ranks(tmp_path: Path) -> None:
    config = config_of_profile(config_in(tmp_path, "plain", global_batch=8))
    with pytest.raises(ShoalError, match="the run has 6 steps"):
        record_in(ALONE, config, Asked(Steps(5, 7), [0]), NeverStop())
