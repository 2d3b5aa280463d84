"""Steps none of whose labels is learned: skipped in every layout, as in a float64 loop that skips them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from shoal.config.data_options import Data
from shoal.config.options import Config
from shoal.data.dataset import prepare_dataset
from shoal.data.document_index import find_documents
from shoal.data.order.audit import audit, describe
from shoal.data.order.order import sample_at
from shoal.mesh.mesh import Mesh
from shoal.mesh.region import Region
from shoal.optim.schedule import learning_rate
from shoal.run.folder import RunFolder
from shoal.run.records import read_metrics
from shoal.training.compile_check import judge
from shoal.training.loop import take_steps
from shoal.training.run import Run
from shoal.training.scaler import LossScaler
from tests.data.chats import alpaca_records, write_lines
from tests.parallel.layouts import ALONE, NeverStop, config_of, mesh_for, whole
from tests.training.faulty import events
from tests.world import World

STEPS, BATCH, SEQ_LEN = 16, 4, 32
IGNORED = -100
OPTIONS: dict[str, Any] = {
    "train__steps": STEPS, "train__global_batch": BATCH, "train__eval_every": 0, "optim__weight_decay": 0.5, "optim__lr": 1e-2,
    "optim__clip_norm": 1.0, "checkpoint__every": 5, "checkpoint__background": False, "train__seed": 1,
    "fault__max_skipped": 0,  # one skipped step that counts as a fault would roll back
}  # fmt: skip

Weights = dict[str, torch.Tensor]
Parts = dict[str, tuple[Region, torch.Tensor]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Return conversations with long prompts and short answers, so that most rows have no answer."""
    folder = tmp_path_factory.mktemp("answers")
    path = write_lines(folder / "alpaca.jsonl", alpaca_records(60))
    data = Data(
        corpus="jsonl", paths=(str(path),), format="alpaca", tokenizer="bytes", seq_len=SEQ_LEN, document_mask=True,
        folder=str(folder / "data"),
    )  # fmt: skip
    prepare_dataset(data)
    return data


def config_for(folder: Path, data: Data, name: str, **options: Any) -> Config:
    config = config_of(folder, name, **OPTIONS | options)
    return Config(**{**config.__dict__, "data": data})


def trained(mesh: Mesh, config: Config, steps: int = STEPS) -> Parts:
    """Take the steps of a run up to `steps`; return this rank's weights."""
    run = Run.open(config, mesh_for(mesh, config.parallel), NeverStop())
    try:
        run.total_steps, planned = steps, run.total_steps
        take_steps(run)
        run.total_steps = planned
        if steps < planned:
            assert run.saving.finish(run.state, None).ok
        assert run.state.step == steps
        return {s.name: (s.region, s.tensor.detach().clone()) for s in run.runnable.shards}
    finally:
        run.close()


def losses(config: Config) -> dict[int, float]:
    return {record.step: record.loss for record in read_metrics(RunFolder.of(config).metrics_file).steps}


def in_float64(config: Config, *, skips: bool) -> tuple[dict[int, float], Weights, list[list[int]]]:
    """Train with torch's AdamW in float64; return the losses of steps with labels, the weights, and each step's rows."""
    run = Run.open(config.replace("launch", name=f"reference-{skips}"), ALONE, NeverStop())
    run.close()
    rows, model = run.rows, run.runnable.parts[0].double()
    model.compute_dtype = torch.float64
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == decays], "weight_decay": 0.5 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps)
    found: dict[int, float] = {}
    order = [sample_at(1, range(s * BATCH, (s + 1) * BATCH), len(rows)).tolist() for s in range(STEPS)]
    for step, numbers in enumerate(order, 1):
        read = rows.read(numbers)
        assert read.document_ids is not None
        tokens, positions, ids = map(torch.from_numpy, (read.tokens, read.positions, read.document_ids))
        labels = torch.from_numpy(read.labels).flatten()
        if (labels != IGNORED).any():
            logits = model.logits(model(tokens, positions, ids))
            loss = cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            found[step] = loss.item()
        elif skips:
            continue
        else:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, STEPS)
        optimizer.step()
    return found, {n: p.detach().clone() for n, p in model.named_parameters()}, order


def distance(one: Weights, other: Weights) -> float:
    """Return the largest relative distance of a parameter."""
    return max(float((one[n].double() - t).norm() / t.norm()) for n, t in other.items())


def equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, data: Data
) -> tuple[dict[int, float], Weights, list[list[int]]]:
    config = config_for(tmp_path_factory.mktemp("reference"), data, "reference")
    found, weights, order = in_float64(config, skips=True)
    assert 3 <= STEPS - len(found) <= 10
    assert set(range(1, STEPS)) - set(found), "steps with labels before and after empty ones"
    _, moved, _ = in_float64(config, skips=False)
    assert distance(moved, weights) > 1e-2, "momentum and weight decay alone move the weights"
    return found, weights, order


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        pytest.param(1, {}, id="alone"),
        pytest.param(1, {"train__micro_batch": 4}, id="one micro-batch"),
        pytest.param(2, {}, id="ddp"),
        pytest.param(2, {"parallel__dp_shard": 2}, id="fsdp", marks=pytest.mark.ci),
        pytest.param(2, {"parallel__tp": 2}, id="tp", marks=pytest.mark.ci),
        pytest.param(2, {"parallel__pp": 2}, id="pp"),
    ],
)
def test_weights_equal_those_of_a_loop_that_skips_such_steps(
    world: Callable[[int], World], tmp_path: Path, data: Data, reference: Any, size: int, layout: dict[str, Any]
) -> None:
    wanted, weights, order = reference
    config = config_for(tmp_path, data, "ours", **layout)
    found = [trained(ALONE, config)] if size == 1 else world(size).run(trained, config)
    ours = losses(config)
    assert set(ours) == set(wanted)
    assert all(abs(ours[step] - loss) < 1e-4 for step, loss in wanted.items())
    assert distance(whole(found), weights) < 1e-3
    lines = events(config, "no label")
    assert {line["step"]: line["samples"] for line in lines} == {
        s: order[s - 1] for s in range(1, STEPS + 1) if s not in ours
    }
    assert not events(config, "left out") + events(config, "went back")
    proof = audit(RunFolder.of(config).ledger_file)
    assert proof.passed, proof.problems
    assert [window.step for window in proof.skipped] == [line["step"] for line in lines]
    assert sum(epoch.skipped for epoch in proof.epochs.values()) == BATCH * len(lines)
    assert sum(", no label is learned" in line for line in describe(proof)) == min(len(lines), 10)


def test_the_event_names_the_documents(
    tmp_path: Path, data: Data, reference: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path, data, "named")
    trained(ALONE, config)
    said, lines = capsys.readouterr(), events(config, "no label")
    documents = find_documents(prepare_dataset(data).parts[""], "train")
    for line in lines:
        spans = [documents.documents_in(row * SEQ_LEN, (row + 1) * SEQ_LEN + 1) for row in line["samples"]]
        assert line["documents"] == [["", span[0], span[-1]] for span in spans]
    assert f"step {lines[0]['step']} was skipped: none of its labels is learned" in said.err + said.out
    assert f"({_named(lines[0]['documents'][0])}" in said.err + said.out
    assert (said.err + said.out).count("none of its labels is learned") == min(3, len(lines))
    assert "Further such steps are only recorded in events.jsonl" in said.err + said.out


def _named(document: Sequence[Any]) -> str:
    _, first, last = document
    return f"document {first}" if first == last else f"documents {first} to {last}"


def test_bitwise_runs_of_any_layout_agree_also_after_a_resume(
    world: Callable[[int], World], tmp_path: Path, data: Data
) -> None:
    options = {"train__repro": "bitwise", "optim__schedule": "constant"}
    alone, pair, stages = (
        config_for(tmp_path, data, name, **options | more)
        for name, more in (("alone", {}), ("pair", {}), ("stages", {"parallel__pp": 2, "model__tie_embeddings": False}))
    )
    weights = trained(ALONE, alone)
    world(2).run(trained, pair, 9)
    resumed = trained(ALONE, pair)  # AdamW's count of steps leaves the skipped ones out
    assert losses(pair) == losses(alone)
    assert equal(whole([resumed]), whole([weights]))
    untied = trained(ALONE, stages.replace("launch", name="untied").replace("parallel", pp=1))
    assert equal(whole(world(2).run(trained, stages)), whole([untied]))


def test_the_loss_scale_does_not_grow_by_such_steps() -> None:
    scaler = LossScaler(torch.device("cpu"))
    for empty in (True, False, True):
        scaler.judge(torch.tensor(1.0 - empty), torch.tensor(empty))
    assert float(scaler.good_steps) == 1


def test_compiled_code_is_not_judged_by_a_step_without_a_gradient() -> None:
    assert not judge(["the loss", "w"], torch.from_numpy(np.zeros((2, 4)))).comparable
