"""Held-out rows of really altered shards: skipped in every layout, against the losses of the rows that remain."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.config.data_options import BlendSource, Data
from shoal.config.options import Config
from shoal.data.dataset import prepare_dataset
from shoal.data.loader import evaluation_batches
from shoal.data.order.held_out import HeldOutQuarantine, Skipped
from shoal.data.packing.pack import IGNORED_LABEL
from shoal.errors import DataError, UnreadableError
from shoal.infer.asked import Wanted
from shoal.infer.commands import evaluate_model
from shoal.mesh.mesh import Mesh
from shoal.run.folder import RunFolder
from shoal.run.narrator import Narrator
from shoal.run.records import Evaluation, read_metrics
from shoal.training.loop import complete, take_steps
from shoal.training.run import Run
from tests.parallel.layouts import ALONE, NeverStop, config_of, mesh_for
from tests.training.faulty import events
from tests.world import World

SEQ_LEN, BUDGET = 48, 100
DATA = Data(
    sources={name: BlendSource(corpus="dummy", dummy_documents=n, weight=1.0) for name, n in (("a", 30), ("b", 100))},
    val_fraction=0.2, tokenizer="bytes", seq_len=SEQ_LEN, document_mask=True, shard_tokens=1024, max_quarantined=BUDGET,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tokens of a blend, two held-out shards of its second source altered by a bit, and an intact copy."""
    folder = tmp_path_factory.mktemp("tokens") / "altered"
    dataset = prepare_dataset(data_in(folder))
    shutil.copytree(folder, folder.with_name("intact"))
    shards = sorted(dataset.parts["b"].folder.glob("val-*.safetensors"))
    assert len(shards) > 2
    for path in (shards[1], shards[-1]):  # the last has the row that fills up batches
        alter(path)
    return folder


def data_in(folder: Path, **options: Any) -> Data:
    return Data(**{**DATA.__dict__, "folder": str(folder), **options})


def alter(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-60] ^= 1
    path.write_bytes(raw)


def config_for(runs: Path, tokens: Path, name: str, most: int = BUDGET, **options: Any) -> Config:
    own: dict[str, Any] = {
        "train__steps": 2, "train__eval_every": 1, "train__eval_tokens": 2600, "train__micro_batch": 2,
        "checkpoint__background": False, "checkpoint__every": 1, "optim__schedule": "constant", "train__repro": "bitwise",
    }  # fmt: skip
    config = config_of(runs, name, **own | options)
    return Config(**{**config.__dict__, "data": data_in(tokens, max_quarantined=most)})


def evaluated(mesh: Mesh, config: Config) -> list[tuple[str, int]]:
    """Train with an evaluation after step 1 and of all tokens at the end; return the rows skipped."""
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    try:
        take_steps(run)
        run.evaluate(None)
        return list(run.state.unread)
    finally:
        run.close()


def evaluations(config: Config) -> list[Evaluation]:
    return list(read_metrics(RunFolder.of(config).metrics_file).evaluations)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> tuple[Config, list[tuple[str, int]]]:
    """Return the config of a run that one process has trained on altered tokens, and the rows that it skipped."""
    config = config_for(tmp_path_factory.mktemp("alone"), tokens, "alone")
    return config, evaluated(ALONE, config)


def unreadable_rows(folder: Path) -> list[tuple[str, int]]:
    """Read each held-out row; return those that raise."""
    found = []
    for name, rows in prepare_dataset(data_in(folder)).held_out_rows().items():
        for row in range(len(rows)):
            try:
                rows.read([row])
            except UnreadableError:
                found.append((name, row))
    return found


def in_float64(run: Run, tokens: Path, without: list[tuple[str, int]]) -> dict[str, float]:
    """Return the mean loss of each source's held-out rows but those `without`, row by row from intact tokens."""
    model = run.runnable.parts[0].double()
    model.compute_dtype = torch.float64
    means = {}
    for name, rows in prepare_dataset(data_in(tokens)).held_out_rows().items():
        total = count = 0.0
        for row in (row for row in range(len(rows)) if (name, row) not in without):
            read = rows.read([row])
            assert read.document_ids is not None
            hidden = model(*map(torch.from_numpy, (read.tokens, read.positions, read.document_ids)))
            total += float(model.loss(hidden, torch.from_numpy(read.labels)))
            count += int((read.labels != IGNORED_LABEL).sum())
        means[name] = total / count
    return means


def test_the_loss_is_over_the_rows_that_can_be_read(tmp_path: Path, tokens: Path) -> None:
    bad, config = unreadable_rows(tokens), config_for(tmp_path, tokens, "loss")
    assert {source for source, _ in bad} == {"b"}
    run = Run.open(config, ALONE, NeverStop())
    try:
        run.evaluate(None)
    finally:
        run.close()
    assert list(run.state.unread) == bad
    with torch.no_grad():
        means = in_float64(run, tokens.with_name("intact"), bad)
    found = run.evaluation
    assert found is not None
    assert found.val_source_loss == pytest.approx(means, rel=1e-5)
    learned = {name: part.counts["val"].learned_tokens for name, part in run.dataset.parts.items()}
    assert found.val_loss == pytest.approx(sum(means[n] * learned[n] for n in means) / sum(learned.values()), rel=1e-5)
    assert found.val_skipped_rows == len(bad) > 10


@pytest.mark.parametrize(
    "layout", [pytest.param({}, id="ddp"), pytest.param({"parallel__pp": 2}, id="pp", marks=pytest.mark.ci)]
)
def test_layouts_and_a_resumed_run_skip_the_same_rows(
    world: Callable[[int], World], tmp_path: Path, tokens: Path, alone: Any, layout: dict[str, Any]
) -> None:
    first, skipped = alone
    options = layout | ({"model__tie_embeddings": False} if layout else {})
    if layout:
        first = config_for(tmp_path, tokens, "untied", model__tie_embeddings=False)
        evaluated(ALONE, first)
    config = config_for(tmp_path, tokens, "pair", **options)
    assert world(2).run(evaluated, config) == [skipped, skipped]
    ours, wanted = evaluations(config), evaluations(first)
    assert [(e.step, e.val_skipped_rows) for e in ours] == [(e.step, e.val_skipped_rows) for e in wanted]
    assert [e.val_loss for e in ours] == pytest.approx([e.val_loss for e in wanted], rel=1e-7)
    lines = events(config, "held-out row skipped")
    assert [(line["source"], line["row"]) for line in lines] == skipped, "each has one event, though read twice"
    assert {line["step"] for line in lines} == {1, 2}
    assert all(".safetensors was altered" in line["why"] for line in lines)
    longer = config.replace("train", steps=3).replace("parallel", pp=1)
    assert evaluated(ALONE, longer) == skipped
    assert len(events(config, "held-out row skipped")) >= len(lines)  # the end's were found after the last checkpoint


def test_training_and_held_out_rows_have_one_budget(
    world: Callable[[int], World], tmp_path: Path, tokens: Path, alone: Any
) -> None:
    _, skipped = alone
    enough = config_for(tmp_path, tokens, "enough", most=len(skipped))
    assert evaluated(ALONE, enough) == skipped
    for name, most in (("less", len(skipped) - 1), ("few", 1)):
        said = world(2).run(refused, config_for(tmp_path, tokens, name, most=most))
        assert said[0] == said[1]
        assert f"more than {most} row" in said[0]
        assert ".safetensors was altered" in said[0]
    with pytest.raises(UnreadableError, match="was altered"):
        evaluated(ALONE, config_for(tmp_path, tokens, "none", most=0))
    with pytest.raises(DataError, match="more than 2 rows"):
        HeldOutQuarantine({("a", 1): None}, 2, replaced=1).settle([Skipped("b", 3, "altered")], 1)


def refused(mesh: Mesh, config: Config) -> str:
    with pytest.raises(DataError) as caught:
        evaluated(mesh, config)
    return str(caught.value)


def opened_and_evaluated(mesh: Mesh, config: Config, other: Path | None = None) -> tuple[float, list[tuple[str, int]]]:
    """Evaluate initial weights on a part of the tokens; return the loss and the rows skipped. other: the last rank's tokens."""
    if other is not None and mesh.place.rank == mesh.world_size - 1:
        config = config.replace("data", folder=str(other))
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    try:
        run.evaluate(config.train.eval_tokens)
        assert run.evaluation is not None
        return run.evaluation.val_loss, list(run.state.unread)
    finally:
        run.close()


def test_ranks_that_share_rows_but_not_disks_evaluate_again(
    world: Callable[[int], World], tmp_path: Path, tokens: Path
) -> None:
    """Only the second tensor-parallel rank has the altered shards."""
    loss, skipped = opened_and_evaluated(ALONE, config_for(tmp_path, tokens, "whole"))
    config = config_for(
        tmp_path, tokens.with_name("intact"), "tp", parallel__tp=2, train__repro="fast", train__micro_batch=8
    )
    assert len(skipped) > 3
    for found, rows in world(2).run(opened_and_evaluated, config, tokens):
        assert (rows, found) == (skipped, pytest.approx(loss, rel=1e-5))
    assert [(line["source"], line["row"]) for line in events(config, "held-out row skipped")] == skipped


def test_batches_keep_the_rows_that_can_be_read(tokens: Path) -> None:
    rows = prepare_dataset(data_in(tokens)).held_out_rows()["b"]
    intact = prepare_dataset(data_in(tokens.with_name("intact"))).held_out_rows()["b"]
    bad = {row for source, row in unreadable_rows(tokens) if source == "b"}
    assert len(rows) - 1 in bad
    for dp_size in (1, 2, 3):
        found: list[Skipped] = []
        for rank in range(dp_size):
            quarantine = HeldOutQuarantine({}, BUDGET)
            batches = evaluation_batches(
                rows,
                4,
                rank,
                dp_size,
                read=lambda ids, asked, q=quarantine: q.read("b", rows, ids, asked),  # type: ignore[misc]
            )
            for ours, wanted in itertools.zip_longest(batches, evaluation_batches(intact, 4, rank, dp_size)):
                for place, row in enumerate(wanted.sample_ids):
                    if row in bad:
                        assert (ours.labels[place] == IGNORED_LABEL).all()
                    else:
                        assert torch.equal(ours.labels[place], wanted.labels[place])
                        assert torch.equal(ours.tokens[place], wanted.tokens[place])
                        assert ours.document_ids is not None
                        assert wanted.document_ids is not None
                        assert torch.equal(ours.document_ids[place], wanted.document_ids[place])
            found += quarantine.take()
        assert sorted(each.row for each in found) == sorted(bad)


def test_shoal_eval_skips_them_too(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(tmp_path, tokens, "scored", train__steps=1)
    run = Run.open(config, ALONE, NeverStop())
    try:
        complete(run)
    finally:
        run.close()
    trained = capsys.readouterr().out
    assert f"({len(run.state.unread)} held-out rows cannot be read)" in trained
    wanted = Wanted(Path(config.launch.runs), "scored", device="cpu")
    evaluate_model(wanted, text=None, tasks=None, as_json=True, narrator=Narrator(lambda line: None))
    said = capsys.readouterr()
    assert json.loads(said.out)["nats_per_token"] == pytest.approx(evaluations(config)[-1].val_loss, rel=1e-5)
    (_, row), (_, after), *_ = run.state.unread
    assert f"held-out rows {row}, {after}, " in said.err
    assert f" and {len(run.state.unread) - 5} more of b cannot be read and are skipped: " in said.err


def test_no_label_within_the_limit_is_no_loss(tmp_path: Path, tokens: Path) -> None:
    config = config_for(tmp_path, tokens, "blank")
    run = Run.open(config, ALONE, NeverStop())
    try:
        for name, rows in run.dataset.held_out_rows().items():
            run.state.unread.update({(name, row): None for row in range(len(rows))})
        run.evaluate(900)
        assert (run.evaluation, run.val_loss(), evaluations(config)) == (None, None, [])
        with pytest.raises(DataError, match="no held-out row that can be read has a token to learn"):
            run.evaluate(None)
    finally:
        run.close()
