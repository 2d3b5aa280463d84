"""Runs of several nodes in jobs of a real Slurm, written by hand as docs/CLUSTERS.md has it: stopped, requeued, nodes lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.bed import Bed
from tests.cluster.training import SHOAL, Training, undisturbed_weights

# one launcher per node; a signal to the script reaches the launchers, which save and end with 85
BATCH = f"""#!/bin/bash
#SBATCH --open-mode=append
#SBATCH --requeue
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --ntasks-per-node=1 {SHOAL} train recipe.yaml --name run \\
    --launch.nodes="$SLURM_NNODES" --launch.rendezvous="$first:29400" &
step=$!
trap 'echo "passing the signal on"; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR2
wait $step; code=$?
while kill -0 $step 2> /dev/null; do wait $step; code=$?; done  # a signal ends a wait early
echo "the launchers ended with $code"
if [ $code = 85 ]; then scontrol requeue "$SLURM_JOB_ID"; sleep 60; fi
exit $code
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return undisturbed_weights(tmp_path_factory.mktemp("undisturbed") / "alone")


@pytest.fixture
def training(bed: Bed, tmp_path: Path) -> Training:
    return Training(bed, bed.shared / tmp_path.name)


def test_a_job_of_two_nodes_trains_is_requeued_and_resumes(training: Training, undisturbed: dict[str, str]) -> None:
    job = training.submit(BATCH, "--nodes=2")
    training.until_step(20, job)
    training.bed.run("scancel", "--signal=USR2", "--batch", job)
    training.until_done(job)
    assert training.weights() == undisturbed
