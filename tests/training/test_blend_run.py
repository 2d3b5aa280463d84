"""A run on a blend: its losses by source, its layouts, and a resume with other weights on other processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from shoal.config.data_options import BlendSource
from shoal.config.options import Config
from shoal.data.order.audit import audit
from shoal.data.order.blend import Blend, Stage
from shoal.data.where import Finder, Timeline
from shoal.errors import DataError
from shoal.mesh.mesh import Mesh
from shoal.run.folder import RunFolder
from shoal.run.records import Metrics, read_metrics
from shoal.training.run import Run
from tests.parallel.layouts import ALONE, NeverStop, config_of, mesh_for
from tests.training.test_equivalence import train_here
from tests.world import World

SHARES = {"a": 0.6, "b": 0.3, "c": 0.1}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Config]:
    """Return a function that makes the config of a run on three sources with weights."""
    sources = {}
    for name, weight in SHARES.items():
        path = tmp_path / f"{name}.jsonl"
        texts = [f"{name * 9} {n} " + name * (n * 31 % 200) for n in range(60)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        sources[name] = BlendSource(
            corpus="jsonl", paths=(str(path),), weight=weight, max_epochs=9 if name == "c" else None
        )

    def config(name: str, **options: Any) -> Config:
        weights = options.pop("weights", SHARES)
        own = {
            key: BlendSource(corpus="jsonl", paths=s.paths, weight=weights[key], max_epochs=s.max_epochs)
            for key, s in sources.items()
        }
        made = config_of(tmp_path, name, **{"train__steps": 8, "train__eval_every": 4, "metrics__every": 1, **options})
        return made.replace("data", corpus="stdlib", sources=own, stages={"6 steps": {"b": 1, "c": 1}})

    return config


def trained(mesh: Mesh, config: Config, steps: int | None = None) -> Metrics:
    """Take `steps` steps and save (None: finish the run); return the run's metrics."""
    train_here(mesh_for(mesh, config.parallel), config, steps)
    return read_metrics(RunFolder.of(config).metrics_file)


def test_losses_by_source_are_those_of_their_rows(make: Callable[..., Config]) -> None:
    config = make("alone")
    run = Run.open(config, ALONE, NeverStop())
    model, batches = run.runnable.parts[0].double(), run.loader.next_step()
    model.compute_dtype = torch.float64
    sums, tokens = Counter[str](), Counter[str]()
    for batch in batches:
        logits = model.logits(model(batch.tokens, batch.positions, batch.document_ids))
        each = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100, reduction="none")
        for row, losses, labels in zip(batch.sample_ids, each.view_as(batch.labels), batch.labels, strict=True):
            name = list(SHARES)[int(run.loader.order.sources_of(row))]
            sums[name] += losses.sum().item()
            tokens[name] += int((labels != -100).sum())
    run.close()
    first = trained(ALONE, config, 1).steps[0]
    assert first.source_loss is not None
    assert first.source_loss == {name: pytest.approx(sums[name] / tokens[name], rel=1e-5) for name in tokens}
    mean = sum(first.source_loss[name] * tokens[name] for name in tokens) / sum(tokens.values())
    assert first.loss == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(
    "layout",
    [{"dp_shard": 2}, {"tp": 2}, {"pp": 2}, *(pytest.param(each, marks=pytest.mark.ci) for each in ({}, {"cp": 2}))],
    ids=str,
)
def test_layouts_report_the_losses_of_one_process(
    world: Callable[[int], World], make: Callable[..., Config], layout: dict[str, int]
) -> None:
    alone = trained(ALONE, make("alone"))
    theirs = world(2).run(trained, make("two", **{f"parallel__{axis}": size for axis, size in layout.items()}))[0]
    for one, other in zip(alone.steps, theirs.steps, strict=True):
        assert other.source_loss == pytest.approx(one.source_loss, rel=1e-4)
    for before, after in zip(alone.evaluations, theirs.evaluations, strict=True):
        assert after.val_source_loss == pytest.approx(before.val_source_loss, rel=1e-4)
        assert set(before.val_source_loss or ()) == set(SHARES)
    assert [set(step.source_loss or ()) for step in alone.steps][6:] == [{"b", "c"}] * 2, "the second stage skips a"


def test_a_resume_with_other_weights_and_processes_reads_each_row_once(
    world: Callable[[int], World], make: Callable[..., Config]
) -> None:
    trained(ALONE, make("changed"), 3)
    other = {"a": 0.1, "b": 0.1, "c": 0.8}
    world(2).run(trained, make("changed", weights=other, parallel__dp_shard=2), 4)
    config = make("changed", weights=other)
    trained(ALONE, config)
    folder = RunFolder.of(config)
    found = audit(folder.ledger_file)
    assert found.passed, found.problems
    _, header = Timeline.of_ledger(folder.ledger_file, config.train.micro_batch)
    batch, sizes = config.train.global_batch, [rows for _, rows, _ in header.sources]
    stages = [Stage(0, (6, 3, 1)), Stage(3 * batch, (1, 1, 8)), Stage(6 * batch, (0, 1, 1))]
    assert header.order.stages == tuple(stages)
    expected = Blend(config.train.seed, sizes, stages, [float("inf"), float("inf"), 9]).taken_at(8 * batch)[0]
    for (name, rows, _), count in zip(header.sources, expected.tolist(), strict=True):
        assert sum(epoch.trained for epoch in found.sources[name].values()) == count
        assert all(epoch.again == 0 and epoch.trained <= rows for epoch in found.sources[name].values())
    lines = [json.loads(line) for line in folder.ledger_file.read_text().splitlines()]
    assert [line["after"] for line in lines if "after" in line] == [0, 3, 4]


def test_a_spike_names_the_documents_of_its_step(make: Callable[..., Config]) -> None:
    from tests.training.faulty import events, train_with

    config = make("spiky")
    run = train_with(ALONE, config, [{"step": 3, "phase": "forward", "rank": 0, "fault": "nan"}])
    [event] = events(config, "left out")
    timeline, header = Timeline.of_ledger(RunFolder.of(config).ledger_file, config.train.micro_batch)
    seen = Finder.of(run.dataset, header.order, timeline).at(3)
    assert event["documents"] == [[each.source, min(each.documents), max(each.documents)] for each in seen]


def test_a_run_longer_than_its_sources_allow_is_refused(make: Callable[..., Config]) -> None:
    config = make("long", train__steps=10_000)
    sources = {
        name: BlendSource(corpus="jsonl", paths=s.paths, weight=s.weight, max_epochs=2)
        for name, s in (config.data.sources or {}).items()
    }
    with pytest.raises(
        DataError, match=r"max_epochs of the sources allows \S+ rows, and the run takes .*lower train.steps"
    ):
        Run.open(config.replace("data", sources=sources), ALONE, NeverStop())
