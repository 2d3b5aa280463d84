"""Runs from start to end, interrupted in every way by users and machines."""

from __future__ import annotations

import json
import math
import random
import re
import signal
import socket
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from shoal.errors import EXIT_REQUEUE
from shoal.infer.load import load_path
from shoal.run.folder import RunFolder
from shoal.run.now import read_now
from shoal.training.guard import FEW
from tests.cli.commands import Place, gone, wait_for, workers_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a folder with one undisturbed run, `clean`."""
    place = Place(tmp_path_factory.mktemp("place"))
    place.output = place.good("train", "recipe.yaml", "--name", "clean")  # type: ignore[attr-defined]
    return place


def test_a_run_says_what_it_does_and_leaves_what_it_should(place: Place) -> None:
    output = place.output  # type: ignore[attr-defined]
    steps = re.findall(r"^step +\d+/40  loss .*", output, re.MULTILINE)
    assert len(steps) == 40
    assert re.match(r"step 40/40  loss \d\.\d{4}  lr 1.00e-02  norm .* tok/s  .* GiB  0s left", steps[-1])
    assert max(map(len, steps)) <= 80
    assert len(re.findall(r"^\s*attention: the .* kernel", output, re.MULTILINE)) == 1  # printed once by two processes
    after = output[output.index("bits per byte: ") :]
    assert re.search(
        r"runs/clean: 40 steps, 20,480 tokens in \d+s \([\d,]+ tokens/s in steps\)\nnext:\n  \S*shoal generate clean",
        after,
    )
    assert "held-out loss" in output
    assert re.search(r"bits per byte: .*this model \d\.\d{3}", output)
    assert all(re.search(rf"{name} \d\.\d{{3}} \(cold \d\.\d{{3}}\)", output) for name in ("gzip -9", "xz -9e"))
    assert len(re.findall(r"\n  \S*shoal (generate|eval) ", output)) == 2
    assert "Warning" not in output
    run = place.folder / "runs" / "clean"
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "metrics.jsonl", "events.jsonl", "checkpoints", "samples", "tokenizer.json", "lock",
        "ledger.jsonl", "time.jsonl", "ranks.jsonl", "model.txt", "now.json",
    }  # fmt: skip
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["vocab_size"] == 257
    records = place.metrics("clean")
    wanted = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "mfu", "memory_bytes"}
    assert all(wanted <= set(r) for r in records if "loss" in r)
    assert {"val_loss", "val_bits_per_byte"} <= set(next(r for r in records if "val_loss" in r))
    split = next(r["split_seconds"] for r in records if "split_seconds" in r)
    assert {"data", "forward", "backward", "reduce", "optimizer"} <= set(split)
    assert place.events("clean")[0] == "started"
    machine = place.event_lines("clean")[0]["machine"]
    assert (machine["threads"], machine["torch"]) == (1, torch.__version__)
    assert torch.backends.cpu.get_cpu_capability() in machine["instructions"].split(", ")
    assert place.events("clean")[-1] == "finished"
    assert all(r["time"] for r in records)


def test_a_run_records_what_it_trained_and_with_what(place: Place) -> None:
    started, folder = place.event_lines("clean")[0], RunFolder(place.folder / "runs" / "clean")
    assert started["command"] == ["shoal", "train", "recipe.yaml", "--name", "clean"]
    assert started["layout"] == {"pp": 1, "dp_replicate": 2, "dp_shard": 1, "cp": 1, "tp": 1}
    assert (started["total_steps"], started["gpus"], started["hosts"]) == (40, [], 2 * [socket.gethostname()])
    assert started["versions"]["torch"] == torch.__version__
    assert "git" not in started  # the folder is in no repository
    model = load_path(folder.path).model
    numbers = sum(p.numel() for p in model.parameters())
    assert started["parameters"] == started["trainable_parameters"] == numbers
    lines = folder.model_file.read_text("utf-8").splitlines()
    assert lines[0] == f"{type(model).__name__}: {numbers:,} parameters"
    assert f"  embed: Embedding  weight {' x '.join(map(str, model.embed.weight.shape))}" in lines
    doing = read_now(folder)
    assert doing is not None
    assert (doing.phase, doing.host) == ("end", socket.gethostname())


def test_eval_and_generate_read_what_training_wrote(place: Place) -> None:
    scores = json.loads(place.answer("eval", "clean", "--json"))
    final = [r for r in place.metrics("clean") if "val_loss" in r][-1]
    assert scores["nats_per_token"] == pytest.approx(final["val_loss"], rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(final["val_loss"]), rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(final["val_bits_per_byte"], rel=1e-5)
    once = place.answer("generate", "clean", "--prompt", "ab", "--tokens", "12", "--seed", "5")
    assert once.startswith("ab")
    assert once == place.answer("generate", "runs/clean", "--prompt", "ab", "--tokens", "12", "--seed", "5")


def test_the_same_command_again_is_at_the_end_and_more_steps_go_on(place: Place) -> None:
    files = {
        path: path.read_bytes()
        for path in (place.folder / "runs" / "clean").rglob("*")
        if path.name not in ("lock", "now.json") and path.is_file()
    }
    again = place.good("train", "recipe.yaml", "--name", "clean")
    assert "step 40/40" not in again
    assert "all 40 steps are taken; a larger train.steps continues the run" in again
    output = place.output  # type: ignore[attr-defined]
    said = output[output.index("a sample:") : output.index("goodput")]
    assert said in again  # the result of the run, printed again
    assert all(path.read_bytes() == content for path, content in files.items())
    assert "bits may differ" not in again
    events = place.folder / "runs" / "clean" / "events.jsonl"
    starts = place.event_lines("clean")
    here = dict(starts[0]["machine"])
    for line in starts:
        if "machine" in line:  # as if from another CPU
            line["machine"] |= {"processor": "Another", "instructions": "AVX", "torch": "1.0"}
    events.write_text("".join(json.dumps(line) + "\n" for line in starts))
    longer = place.good(
        "train", "recipe.yaml", "--name", "clean", "--train.steps", "42", "--optim.lr=5e-3", "--launch.threads=2"
    )
    differs = f"processor Another -> {here['processor']}, instructions AVX -> {here['instructions']}, threads 1 -> 2"
    assert f"bits may differ from here on: {differs}, torch 1.0 -> {torch.__version__} since" in longer
    assert "launch.threads was" not in longer  # printed once
    assert "optim.lr was 0.01 and is 0.005 from step 41 on" in longer
    assert "the constant schedule was planned for 40 steps and is now for 42" in longer
    assert [r[0] for r in place.losses("clean")][-2:] == [41, 42]


def test_another_past_is_refused_by_name(place: Place) -> None:
    output = place.refused("train", "recipe.yaml", "--name", "clean", "--model.dim", "64", "--train.seed=3")
    assert "model.dim: 32 -> 64" in output
    assert "train.seed: 0 -> 3" in output


def clean_losses(place: Place) -> list[tuple[int, float, float]]:
    return [r for r in place.losses("clean") if r[0] <= 40]


def clean_scores(place: Place) -> list[tuple[int, float]]:
    found = [each for each in place.scores("clean") if each[0] <= 40]
    assert [step for step, _ in found] == list(range(FEW + 2, 41))
    return found


def test_a_worker_that_is_killed_is_started_again_and_no_bit_differs(place: Place) -> None:
    process = place.start("train", "recipe.yaml", "--name", "worker-killed")
    wait_for(process, "step  1/40")
    worker = workers_of(process)[1]  # found early: looking for it takes as long as many steps
    wait_for(process, "step 17/40")
    worker.kill()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    said = r"worker 1 was killed by SIGKILL .*step (1[7-9]|[23]\d|40); starting again from the last checkpoint"
    assert re.search(said, output), output
    assert "Traceback" not in output
    assert place.losses("worker-killed") == clean_losses(place)
    assert place.scores("worker-killed") == clean_scores(place)


@pytest.mark.ci
def test_what_dies_before_a_checkpoint_starts_from_the_beginning(place: Place) -> None:
    faults = [{"step": 2, "phase": "forward", "rank": 1, "fault": "kill"}]
    output = place.good("train", "recipe.yaml", "--name", "early-death", SHOAL_FAULTS=json.dumps(faults))
    assert "in forward of step 2; starting again from the beginning" in output
    assert "last checkpoint" not in output


def test_a_launcher_that_is_killed_takes_its_workers_with_it_and_the_run_goes_on(place: Place) -> None:
    process = place.start("train", "recipe.yaml", "--name", "launcher-killed")
    wait_for(process, "step 17/40")
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    assert gone(workers)
    output = place.good("train", "recipe.yaml", "--name", "launcher-killed")
    assert "resumed from runs/launcher-killed/checkpoints/step-000000" in output
    assert place.losses("launcher-killed") == clean_losses(place)
    assert place.scores("launcher-killed") == clean_scores(place)


@pytest.mark.ci
def test_a_worker_that_is_stopped_is_named_and_started_again_and_no_bit_differs(place: Place) -> None:
    process = place.start("train", "recipe.yaml", "--name", "worker-stopped", "--launch.hang_seconds", "6")
    wait_for(process, "step 17/40")
    workers_of(process)[1].suspend()
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    found = re.search(r"rank 1 did not join: stopped \(SIGSTOP\) in \w+ of step (\d+), .*; stacks in (\S+);", output)
    assert found, output
    stacks = (place.folder / found[2]).read_text()
    assert "in train_step" in stacks  # rank 0 waits for rank 1 there
    assert "rank 1: " in stacks
    hang = next(e for e in place.event_lines("worker-stopped") if e["event"] == "hang")
    assert (hang["rank"], hang["step"]) == (1, int(found[1]))
    assert "Traceback" not in output
    assert place.losses("worker-stopped") == clean_losses(place)


@pytest.mark.parametrize(
    ("fault", "how"),
    [pytest.param("kill", "was killed by SIGKILL", marks=pytest.mark.ci), ("exception", "ended with code 1")],
)
def test_a_worker_that_dies_again_and_again_ends_the_run_with_its_cause(place: Place, fault: str, how: str) -> None:
    faults = [{"step": 12, "phase": "forward", "rank": 1, "fault": fault, "life": life} for life in range(9)]
    code, output = place.run("train", "recipe.yaml", "--name", f"loop-{fault}", SHOAL_FAULTS=json.dumps(faults))
    assert code == 1, output
    last = (
        f"the run stopped: worker 1 {how} in forward of step 12; that makes 3 crashes without a step beyond 12. Saved"
    )
    assert last in output, output
    crashes = [e for e in place.event_lines(f"loop-{fault}") if e["event"] == "crashed"]
    assert [(e["rank"], e["how"], e["step"]) for e in crashes] == [(1, how, 12)] * 3


# One handler serves all three signals: `make test` sends SIGTERM here, and CI sends all three.
@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.ci),
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.ci),
    ],
)
def test_asked_to_stop_it_saves_and_says_how_to_go_on(place: Place, number: signal.Signals) -> None:
    name = f"stopped-{number.name}"
    process = place.start("train", "recipe.yaml", "--name", name)
    wait_for(process, "step  7/40")
    process.send_signal(number)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == EXIT_REQUEUE
    found = re.search(r"stopped: saved at step (\d+) of 40. The same command again resumes from there", output)
    assert found, output
    assert "Traceback" not in output
    assert f"step-{int(found[1]):08d}" in place.good("train", "recipe.yaml", "--name", name)
    assert place.losses(name) == clean_losses(place)


def not_yet_handling(process: psutil.Process) -> bool:
    """
    Return whether SIGTERM would end the process at once. Just after its fork a process still has its parent's handler, or
    ignores the signal (tests/warm.py), and then the signal is lost.
    """
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    masks = (int(found[1], 16) for found in re.finditer(r"^Sig(?:Ign|Cgt):\s*(\w+)$", status, re.MULTILINE))
    return not any(mask >> (signal.SIGTERM - 1) & 1 for mask in masks)


@pytest.mark.parametrize("whom", ["launcher", "worker"])
def test_asked_to_stop_while_it_starts_it_stops(place: Place, whom: str) -> None:
    process = place.start("train", "recipe.yaml", "--name", f"early-{whom}", "--train.steps", "100000")
    wait_for(process, "starting 2 processes")
    if whom == "launcher":
        process.send_signal(signal.SIGINT)
    else:
        while not (workers := [p for p in workers_of(process) if not_yet_handling(p)]):
            assert process.poll() is None
        workers[0].terminate()
    output = process.communicate(timeout=100)[0]
    assert process.returncode == EXIT_REQUEUE, output
    assert "Traceback" not in output


@pytest.mark.ci
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_worker_that_is_asked_stops_them_all(place: Place, number: signal.Signals) -> None:
    name = f"one-{number.name}"
    process = place.start("train", "recipe.yaml", "--name", name)
    wait_for(process, "step  7/40")
    workers_of(process)[1].send_signal(number)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == EXIT_REQUEUE, output
    assert "stopped: saved at step" in output
    assert "starting again" not in output
    assert not {"crashed", "hang"} & set(place.events(name))
    place.good("train", "recipe.yaml", "--name", name)
    assert place.losses(name) == clean_losses(place)


def test_when_its_time_is_up_it_saves_and_asks_to_be_queued_again(place: Place) -> None:
    code, output = place.run(
        "train", "recipe.yaml", "--name", "limited", "--train.steps", "1000000", "--launch.time_limit_minutes", "0.25"
    )
    assert code == EXIT_REQUEUE, output
    assert re.search(r"stopped: saved at step [1-9]\d* of 1000000", output), output


def test_a_folder_that_cannot_be_written_is_one_message(place: Place) -> None:
    in_the_way = place.folder / "runs" / "unwritable" / ".config.yaml.tmp"
    in_the_way.mkdir(parents=True)
    output = place.refused("train", "recipe.yaml", "--name", "unwritable")
    assert "runs/unwritable cannot be written: Is a directory; set launch.runs" in output


def test_a_last_checkpoint_that_is_not_there_is_no_success(place: Place) -> None:
    checkpoints = place.folder / "runs" / "unsaved" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / ".step-00000003.1.tmp").touch()  # makes the first save fail
    # also: a batch larger than the corpus, so that an epoch is one step
    output = place.refused(
        "train", "recipe.yaml", "--name", "unsaved", "--train.steps", "3", "--train.global_batch", "1024",
        "--train.micro_batch", "64",
    )  # fmt: skip
    assert "could not be written: runs/unsaved/checkpoints has none. Free some space there" in output
    assert "starts from the beginning" in output
    assert "resumes from" not in output
    assert "retried" not in output  # the run ends before step 13, the next try
    rows = place.metrics("unsaved")[-1]["tokens"] / 3 / 32
    found = re.search(
        r"one step reads the corpus (\d+\.\d) times: train.global_batch is 1,024 rows .* the corpus has (\d+)", output
    )
    assert found, output
    assert float(found[1]) == pytest.approx(1024 / int(found[2]), abs=0.06)
    assert rows == 1024


def test_a_run_that_is_being_trained_is_not_trained_twice(place: Place) -> None:
    process = place.start("train", "recipe.yaml", "--name", "locked", "--train.steps", "100000")
    wait_for(process, "step      3/")
    output = place.refused("train", "recipe.yaml", "--name", "locked", "--train.steps", "100000")
    assert f"runs/locked is being trained by process {process.pid} on " in output
    workers = workers_of(process)
    process.kill()
    process.communicate()
    assert gone(workers)


@pytest.mark.ci
def test_under_torchrun_it_is_a_worker(place: Place) -> None:
    import subprocess
    import sys

    from tests.cli.commands import clean_environment

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "shoal"]
    done = subprocess.run(
        [*command, "train", "recipe.yaml", "--name", "torchrun"],
        cwd=place.folder, env=clean_environment(), capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert place.losses("torchrun") == clean_losses(place)


def test_under_torchrun_a_worker_that_is_asked_to_stop_says_so_by_its_code(place: Place) -> None:
    import subprocess
    import sys

    from tests.cli.commands import clean_environment

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "shoal"]
    process = subprocess.Popen(
        [*command, "train", "recipe.yaml", "--name", "torchrun-stopped", "--train.steps", "100000"],
        cwd=place.folder, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(process, "step      3/")
    workers_of(process)[1].terminate()
    output = process.communicate(timeout=100)[0]
    assert "stopped: saved at step" in output
    assert set(re.findall(r"exitcode *: (-?\d+)", output)) == {str(EXIT_REQUEUE)}, output
    assert place.losses("torchrun-stopped")[:3] == clean_losses(place)[:3]


@pytest.mark.slow
def test_killed_ten_times_at_random_moments_the_last_bits_are_the_same(place: Place) -> None:
    """SIGKILL to the launcher or a worker, ten times in one run, at times drawn from a seed."""
    long = (
        "--train.steps",
        "300",
        "--train.eval_every",
        "0",
        "--launch.max_crashes",
        "20",
        "--metrics.console_every",
        "1",
    )
    place.good("train", "recipe.yaml", "--name", "left-alone", *long)
    chance, process, victims = random.Random(20261121), None, []
    for _ in range(10):
        process = process or place.start("train", "recipe.yaml", "--name", "ten-kills", *long)
        wait_for(process, "MFU counts")
        for _ in range(chance.randint(0, 20)):
            assert process.stdout is not None
            process.stdout.readline()
        workers = workers_of(process)
        victims.append(chance.choice(["launcher", "worker"]))
        if victims[-1] == "worker":
            chance.choice(workers).kill()
            continue
        process.kill()
        process.communicate()
        assert gone(workers)
        process = None
    if process is not None:
        process.communicate(timeout=200)
    assert {"launcher", "worker"} == set(victims)
    place.good("train", "recipe.yaml", "--name", "ten-kills", *long)
    assert place.losses("ten-kills") == place.losses("left-alone")
    assert place.events("ten-kills").count("started") >= 11
