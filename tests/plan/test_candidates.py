"""What auto chooses from, and in which order it tries: with predictions, without them, and after failures."""

from __future__ import annotations

import math

import pytest

from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Train
from shoal.errors import ShoalError
from shoal.plan.choice.candidates import Candidate, Candidates, Timing, Trial, Tried, fastest, find_candidates
from shoal.plan.fits import need_of
from shoal.plan.machine import Machine, find_machine
from shoal.plan.speed.rates import Rates
from shoal.resolve.layout_checks import refusals

SMALL = Config(
    model=Model(dim=64, num_layers=2, num_heads=4, ffn_dim=128, vocab_size=300),
    data=Data(seq_len=64),
    train=Train(global_batch=16, micro_batch=8, dtype="float32", steps=1),
)
BOTH = {"parallel": "here", "train.micro_batch": "there"}
OUT_OF_MEMORY = Timing(None, why="out of memory", out_of_memory=True)


def found(config: Config = SMALL, devices: str = "2xcpu-4GB", undecided: dict[str, str] = BOTH) -> Candidates:
    machine: Machine = find_machine(devices, 1)
    return find_candidates(config, machine, undecided, (Rates(machine, 4), ()))


def took(candidate: Candidate | str, seconds: float) -> Tried:
    assert isinstance(candidate, Candidate), candidate
    return Tried(Trial(candidate, candidate.config, 3), Timing(seconds, 6))


def failed(candidate: Candidate | str, timing: Timing = OUT_OF_MEMORY) -> Tried:
    assert isinstance(candidate, Candidate), candidate
    return Tried(Trial(candidate, candidate.config, 3), timing)


def test_every_candidate_is_legal_and_keeps_the_global_batch() -> None:
    candidates = found()
    assert {str(c.layout) for c in candidates.listed} == {"dp_replicate 2", "dp_shard 2", "tp 2", "pp 2"}
    assert {c.size for c in candidates.listed} > {4, 8}
    for each in candidates.listed:
        assert not list(refusals(each.config, 2))
        assert each.config.replace("train", micro_batch=8).replace("parallel", **vars(SMALL.parallel)) == SMALL


def test_only_what_is_undecided_varies() -> None:
    fixed = SMALL.replace("parallel", dp_shard=2, dp_replicate=1)
    sizes = found(fixed, undecided={"train.micro_batch": "there"})
    assert {str(c.layout) for c in sizes.listed} == {"dp_shard 2"}
    assert sorted(c.size for c in sizes.listed) == [1, 2, 4, 8]  # 16 would leave a rank without a micro-batch
    layouts = found(undecided={"parallel": "here"})
    assert {c.size for c in layouts.listed} == {8}


def test_the_best_comes_first_then_another_layout() -> None:
    candidates = found()
    first = candidates.following([])
    assert first is candidates.listed[0]
    second = candidates.following([took(first, 1.0)])
    assert isinstance(second, Candidate)
    assert second.layout != candidates.listed[0].layout
    order = [c for c in candidates.listed if c.layout == second.layout]
    assert second is order[0]
    third = candidates.following([took(first, 1.0), took(second, 1.5)])
    assert isinstance(third, Candidate)
    assert third.layout == candidates.listed[0].layout
    if candidates.listed[0].size != 8:  # the usual one follows
        assert third.size == 8


def test_it_stops_when_no_other_is_likely_to_be_faster() -> None:
    candidates = found()
    best, worst = candidates.listed[0], candidates.listed[-1]
    said = candidates.predicted(worst, [took(best, 0.01)])
    assert said is not None
    assert said.low > 0.01
    left = Candidates([best, worst], candidates.plan, [])
    assert left.following([took(best, 0.01)]) == "no other is likely to be faster"


def test_measured_steps_scale_the_other_predictions() -> None:
    candidates = found()
    first, other = candidates.listed[:2]
    plain, before = candidates.predicted(first), candidates.predicted(other)
    assert plain is not None
    assert before is not None
    assert candidates.predicted(other, [took(first, 50 * plain.middle)]) == before.scaled(
        50 * plain.middle / plain.middle
    )
    assert candidates.predicted(other, [failed(first)]) == before


def test_a_candidate_that_ran_out_of_memory_rules_out_those_that_need_as_much() -> None:
    candidates = found()
    largest = max(candidates.listed, key=lambda c: c.choice.need.total if c.choice else 0)
    tried = [failed(sorted(candidates.listed, key=lambda c: c.choice.need.total if c.choice else 0)[1])]
    following = candidates.following(tried)
    assert isinstance(following, Candidate)
    assert following.choice is not None
    assert following is not largest
    assert following.choice.need.total < tried[0].candidate.choice.need.total  # type: ignore[union-attr]
    assert candidates.following([*tried, failed(following)]) == "there is no other that may fit"


def test_a_failure_of_another_kind_rules_out_nothing_else() -> None:
    candidates = found()
    following = candidates.following([failed(candidates.listed[0], Timing(None, why="a bug"))])
    assert isinstance(following, Candidate)


def test_three_are_measured_and_at_most_five_tried() -> None:
    candidates = found()
    assert candidates.following([took(c, 1.0) for c in candidates.listed[:3]]) == "3 were measured"
    broken = Timing(None, why="a bug")
    assert candidates.following([failed(c, broken) for c in candidates.listed[:5]]) == "5 were tried"


def test_without_predictions_replicas_come_first_then_shards_then_sizes() -> None:
    candidates = found(SMALL.replace("train", repro="bitwise"))
    assert candidates.plan is None
    assert "train.repro bitwise" in candidates.notes[0]
    assert candidates.predicted(candidates.listed[0]) is None
    first = candidates.following([])
    assert str(first) == "dp_replicate 2, micro-batch 8"
    second = candidates.following([took(first, 1.0)])
    assert str(second) == "dp_shard 2, micro-batch 8"
    assert str(candidates.following([took(first, 1.0), took(second, 0.5)])) == "dp_shard 2, micro-batch 4"


def test_without_predictions_larger_sizes_follow_while_they_are_faster() -> None:
    many = found(SMALL.replace("train", repro="bitwise").replace("train", global_batch=64))
    first, second = many.listed[0], next(c for c in many.listed if c.layout != many.listed[0].layout)
    tried = [took(first, 1.0), failed(second)]
    third = many.following(tried)
    assert str(third) == "dp_replicate 2, micro-batch 16"
    assert str(many.following([*tried, took(third, 0.5)])) == "dp_replicate 2, micro-batch 32"
    assert many.following([*tried, took(third, 2.0)]) == "a larger micro-batch is not faster"


def test_without_predictions_smaller_sizes_follow_if_nothing_fits() -> None:
    candidates = found(SMALL.replace("train", repro="bitwise"))
    tried: list[Tried] = []
    while isinstance(following := candidates.following(tried), Candidate):
        tried.append(failed(following))
    assert [str(t.candidate) for t in tried] == [
        "dp_replicate 2, micro-batch 8", "dp_shard 2, micro-batch 8", "dp_shard 2, micro-batch 4", "dp_shard 2, micro-batch 2",
        "dp_shard 2, micro-batch 1",
    ]  # fmt: skip


def test_if_by_the_plan_nothing_fits_what_needs_least_is_tried() -> None:
    candidates = found(devices="2xcpu-0.0001GB")
    least = candidates.listed[0]
    assert least.choice is not None
    assert "nothing fits" in candidates.notes[0]
    assert least.choice.need.total == min(need_of(c.config, c.layout, cuda=False).total for c in candidates.listed)


def test_no_layout_is_an_error() -> None:
    lonely = SMALL.replace("train", global_batch=1, micro_batch=1).replace("model", num_heads=1, num_layers=1)
    with pytest.raises(ShoalError, match="no layout of this recipe uses all 2 devices"):
        found(lonely)
    with pytest.raises(ShoalError, match=r"parallel\.tp 3 does not divide"):
        found(SMALL.replace("parallel", tp=3, dp_replicate=1), "3xcpu-4GB", {"train.micro_batch": "there"})


def test_the_fastest_is_the_fastest_that_was_measured() -> None:
    first, second, third = found().listed[:3]
    assert fastest([]) is None
    best = fastest([took(first, 2.0), took(second, 1.0), failed(third)])
    assert best is not None
    assert best.candidate is second
    assert failed(third).seconds == math.inf


def test_a_long_step_is_timed_with_fewer_micro_batches() -> None:
    candidates = found(SMALL.replace("train", global_batch=256))
    many = next(c for c in candidates.listed if str(c) == "dp_replicate 2, micro-batch 8")
    whole = candidates.predicted(many)
    assert whole is not None
    trial = candidates.trial(many, [], whole.middle / 8)
    assert trial.config.train.global_batch == 256 // 8
    assert trial.share == 1 / 8
    assert 5 < trial.factor < 8  # the optimizer's update does not grow with the micro-batches
    measured = Tried(trial, Timing(0.5, 6))
    assert measured.seconds == 0.5 * trial.factor
    assert candidates.trial(many, [], whole.middle) == Trial(many, many.config, 3)
    assert candidates.trial(many, [], 7.5 * whole.middle) == Trial(
        many, many.config, 7
    )  # a short step is timed more often
    assert candidates.trial(many, [], 99 * whole.middle).steps == 12
    slower = [Tried(Trial(many, many.config, 3), Timing(2 * whole.middle, 6))]  # all take twice as long as planned
    assert candidates.trial(many, slower, whole.middle / 2).share == 1 / 4


def test_a_pipeline_is_not_timed_with_fewer_micro_batches_than_it_can_run() -> None:
    candidates = found(SMALL.replace("train", global_batch=256))
    piped = next(c for c in candidates.listed if c.layout.pp == 2)
    trial = candidates.trial(piped, [], 0.0)
    assert trial.config.train.global_batch == min(256, 3 * piped.size)


def test_without_predictions_a_few_micro_batches_are_timed() -> None:
    candidates = found(SMALL.replace("train", repro="bitwise").replace("train", global_batch=256))
    trial = candidates.trial(candidates.listed[0], [], 1.0)
    assert (trial.share, trial.factor) == (1 / 4, 4.0)


def test_a_candidate_without_a_step_in_time_rules_out_those_with_as_much_work() -> None:
    candidates = found()
    slow = next(c for c in candidates.listed if c.size == 8)
    following = candidates.following([failed(slow, Timing(None, why="no step in 30 s", too_slow=True))])
    assert isinstance(following, Candidate)
    assert following.fewest <= slow.fewest / 2
    assert (slow.turns, slow.fewest) == (16 / 8 / slow.layout.dp, 16)
