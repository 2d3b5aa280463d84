"""The cases of scaling: their batches and layouts, and what cannot be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from shoal.bench import layouts
from shoal.bench.layouts import Case, config_of, devices_of, read_counts, read_methods, usual_counts
from shoal.config.options import Config
from shoal.errors import ShoalError
from tests.parallel.layouts import config_of as tiny


@pytest.fixture
def base(tmp_path: Path) -> Config:
    return tiny(tmp_path, "base", train__micro_batch=4, data__document_mask=False)


@pytest.mark.parametrize(
    ("case", "global_batch", "micro_batch", "axis"),
    [
        (Case("ddp", 1), 8, 4, None),
        (Case("ddp", 2), 8, 4, "dp_replicate"),
        (Case("ddp", 4), 8, 2, "dp_replicate"),
        (Case("fsdp", 8), 8, 1, "dp_shard"),
        (Case("fsdp", 4, "weak"), 32, 4, "dp_shard"),
        (Case("tp", 2), 8, 4, "tp"),
        (Case("pp", 4), 8, 2, "pp"),  # at least as many micro-batches as stages
        (Case("cp", 2, "weak"), 16, 4, "cp"),
    ],
)
def test_strong_keeps_the_batch_and_weak_lets_it_grow(
    base: Config, case: Case, global_batch: int, micro_batch: int, axis: str | None
) -> None:
    found = config_of(case, base)
    assert (found.train.global_batch, found.train.micro_batch) == (global_batch, micro_batch)
    sizes = dataclasses.asdict(found.parallel)
    assert {name for name in ("dp_replicate", "dp_shard", "tp", "cp", "pp") if sizes[name] != 1} == ({axis} - {None})
    assert axis is None or sizes[axis] == case.processes == found.launch.processes


def test_what_cannot_be_says_what_to_set(base: Config) -> None:
    with pytest.raises(ShoalError, match=r"train.global_batch 8 does not divide among 3 processes; set .* to 9"):
        config_of(Case("ddp", 3), base)
    with pytest.raises(ShoalError, match=r"TP, 3 processes.*parallel.tp 3 does not divide model.num_heads 4"):
        config_of(Case("tp", 3), base)
    for text in ("", "0", "1,x", "2,2", "-1"):
        with pytest.raises(ShoalError, match="--processes"):
            read_counts(text)
    with pytest.raises(ShoalError, match="'zero' is not one of ddp, fsdp"):
        read_methods("ddp,zero")


def test_processes_that_share_cores_are_not_more_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "count_cores", lambda: 4)
    assert [devices_of(n, 1, gpus=0) for n in (1, 2, 4, 8)] == [1, 2, 4, 4]
    assert [devices_of(n, 2, gpus=0) for n in (1, 2, 4)] == [1, 2, 2]
    assert devices_of(8, 1, gpus=8) == 8
    assert usual_counts(0) == [1, 2, 4, 8]
    assert usual_counts(2) == [1, 2]
    monkeypatch.setattr(layouts, "count_cores", lambda: 1)
    assert usual_counts(0) == [1, 2, 4]
