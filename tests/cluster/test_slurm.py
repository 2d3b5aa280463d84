"""Runs of several nodes in jobs of a real Slurm: stopped, requeued, chained, nodes lost; the last weights are the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from shoal.report.causes.signatures import recognize
from shoal.report.causes.table import TABLE
from tests.cluster.bed import Bed
from tests.cluster.case import Case, Fault, few
from tests.cluster.training import SHOAL, STEPS, Training, Undisturbed
from tests.cluster.trial import Trial

# A job as a person may write it: one launcher per node. A signal to the script reaches the launchers, which save and end with 85.
BY_HAND = f"""#!/bin/bash
#SBATCH --open-mode=append
#SBATCH --requeue
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --ntasks-per-node=1 {SHOAL} train recipe.yaml --name run \\
    --launch.nodes="$SLURM_NNODES" --launch.rendezvous="$first:29400" &
step=$!
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' USR2
wait $step; code=$?
while kill -0 $step 2> /dev/null; do wait $step; code=$?; done  # a signal ends a wait early
echo "the launchers ended with $code"
if [ $code = 85 ]; then scontrol requeue "$SLURM_JOB_ID"; sleep 60; fi
exit $code
"""
OFF: Final = Fault("node off", node=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undisturbed]:
    run = Undisturbed(tmp_path_factory.mktemp("undisturbed") / "alone")
    yield run
    run.close()


@pytest.fixture
def training(bed: Bed, tmp_path: Path) -> Training:
    return Training(bed, bed.shared / tmp_path.name)


@pytest.mark.slow
def test_a_script_written_by_hand_is_requeued_and_resumes(training: Training, undisturbed: Undisturbed) -> None:
    job = training.submit(BY_HAND, "--nodes=2")
    training.until_step(20, job)
    training.bed.run("scancel", "--signal=USR2", "--batch", job)
    training.until_done(job)
    assert "the launchers ended with 85" in training.printed(job)
    assert len(training.events("started")) == 2
    assert training.weights() == undisturbed.weights()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(few(), id="six faults"),
        pytest.param(
            Case(2, None, (Fault("slurmd killed", long=True), Fault("launcher killed"))),
            marks=pytest.mark.slow,
            id="slurmd killed, launcher killed",
        ),
        pytest.param(Case(3, 2, (OFF,)), marks=pytest.mark.slow, id="a node off, with the rest"),
        pytest.param(Case(2, None, (OFF,), spares=1), marks=pytest.mark.slow, id="a node off, with a spare"),
    ],
)
def test_a_run_survives(bed: Bed, tmp_path: Path, undisturbed: Undisturbed, case: Case) -> None:
    verdict = Trial(bed, case, tmp_path.name, undisturbed).run()
    assert not verdict.problems, "\n".join([*verdict.problems, verdict.output])


def test_slurm_signals_the_job_before_its_limit(training: Training, undisturbed: Undisturbed) -> None:
    """Slurm counts limits in minutes, and its signal may come up to a minute early."""
    training.bed.set_rate("1mbit")  # the run takes longer than the limit of a job
    job = training.launch("--nodes=2", "--time=2")
    training.until_step(5, job)
    training.until(lambda: "was signaled before its limit" in training.printed(job), job)
    stopped = training.run.last_step()
    assert 0 < stopped < STEPS
    training.bed.set_rate(None)
    training.until_done(job)
    assert training.events("started")[1]["step"] == stopped
    assert training.weights() == undisturbed.weights()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["forbidden", "chain"])
def test_a_chain_of_jobs_continues_the_run(training: Training, undisturbed: Undisturbed, how: str) -> None:
    """Where Slurm forbids requeue, the job submits the next one; with --chain, the next one waits already."""
    if how == "forbidden":
        (training.folder / "cluster.yaml").write_text("sbatch: [--no-requeue]\n", encoding="utf-8")
    job = training.launch("--nodes=2", *(["--chain=3"] if how == "chain" else []))
    training.until_step(20, job)
    training.bed.run("scancel", "--signal=USR2", "--batch", job)
    training.bed.until(lambda: training.bed.state(job) == "FAILED")
    following = str(int(job) + 1)
    training.until_done(following)
    assert (training.run.path / "finished").exists()
    assert training.weights() == undisturbed.weights()
    training.bed.until(lambda: not training.bed.run("squeue", "--noheader").strip())  # no job is left in the queue


@pytest.mark.slow
def test_a_user_stops_a_run_and_lets_it_go_on(training: Training, undisturbed: Undisturbed) -> None:
    job = training.launch("--nodes=2")
    training.until_step(10, job)
    assert "RUNNING" in training.shoal("launch", "status", "run").upper()
    training.shoal("launch", "stop", "run")
    training.bed.until(lambda: not training.bed.run("squeue", "--noheader").strip())
    stopped = training.run.last_step()
    assert stopped < STEPS
    output = training.shoal("launch", "requeue", "run")
    job = output.split("submitted job ")[1].split(",")[0]
    training.until_done(job)
    assert training.events("started")[-1]["step"] == stopped
    assert training.weights() == undisturbed.weights()


@pytest.mark.slow
def test_a_job_that_is_preempted_saves_and_resumes(training: Training, undisturbed: Undisturbed) -> None:
    job = training.launch("--nodes=2")
    training.until_step(15, job)
    urgent = training.submit("#!/bin/bash\nsleep 1\n", "--nodes=4", "--exclusive", "--partition=urgent")
    training.bed.until(lambda: training.bed.state(urgent) == "COMPLETED")
    training.until_done(job)
    [line] = [line for line in training.printed(job).splitlines() if "DUE TO" in line]
    known = recognize(line, TABLE)
    assert known is not None
    assert known[0].name == "requeued"
    first, second = training.events("started")
    assert first["step"] == 0
    assert second["step"] == training.events("stopped")[0]["step"] > 10
    assert training.weights() == undisturbed.weights()


@pytest.mark.slow
def test_the_script_runs_in_an_allocation_of_salloc(training: Training) -> None:
    training.shoal("launch", "slurm", "recipe.yaml", "--name=run", "--nodes=2", "--train.steps=20")
    script = training.run.path / "jobs" / "job.sbatch"
    output = training.bed.run("salloc", "--nodes=2", "bash", str(script), cwd=training.folder)
    assert "2 processes on" in output
    assert "no further job is needed" in output
    assert training.run.last_step() == 20


def test_what_slurm_rejects_is_one_clear_message(training: Training) -> None:
    for options, words in (
        (["--partition=nowhere"], "invalid partition"),
        (["--nodes=5"], "node"),
        (["--partition=short", "--time=30"], "time limit"),
    ):
        nodes = [] if any("nodes" in option for option in options) else ["--nodes=2"]
        command = [*SHOAL.split(), "launch", "slurm", "recipe.yaml", "--name=bad", "--submit", *nodes, *options]
        code, output = training.bed.attempt(*command, cwd=training.folder)
        assert code == 2, output
        assert words.lower() in output.lower()
        assert "Traceback" not in output
