"""Jobs of a real Slurm whose script starts launchers or ranks that would be alone, or would wait in vain."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

from shoal.run.folder import RunFolder
from tests.cluster.bed import Bed
from tests.cluster.training import SHOAL, Training

TRAIN: Final = f"{SHOAL} train recipe.yaml --name run"
TORCHRUN: Final = SHOAL.replace("-m shoal", "-m torch.distributed.run --nproc-per-node=1 -m shoal")
SEVERAL: Final = "--launch.nodes=2 --launch.rendezvous=$first:29400"
# Command of a job of two nodes -> words of its message.
WRONG: Final = {
    TRAIN: "launch.nodes is 1, but this Slurm job has 2 nodes",
    f"srun --ntasks-per-node=1 {TRAIN}": "srun started 2 tasks (SLURM_NTASKS) but MASTER_ADDR is not set, so each would train",
    f"{TRAIN} {SEVERAL}": "this process is the batch script, not a task of srun",
    f"srun --ntasks=4 --ntasks-per-node=2 {TRAIN} {SEVERAL}": "srun started 2 tasks on this node",
    f"srun --ntasks-per-node=1 {TRAIN} --launch.nodes=3 --launch.rendezvous=$first:29400": "this Slurm job has 2 nodes",
    f"{TORCHRUN} train recipe.yaml --name run": "torchrun started 1 process on this node alone, but Slurm gave 2 nodes",
    f"MASTER_ADDR=localhost srun --ntasks-per-node=1 {TRAIN}": "MASTER_ADDR localhost is a loopback address on n",
}
# What a user may want: one node of two, and a task of srun for each process
RIGHT: Final = {
    f"srun --nodes=1 --ntasks=1 {TRAIN} --train.steps=2": "run",
    f"MASTER_ADDR=$first MASTER_PORT=29500 srun --ntasks-per-node=1 {TRAIN}-2 --train.steps=2": "run-2",
}
SCRIPT: Final = """#!/bin/bash
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
attempt() { echo "--- $1"; eval "$2"; echo "--- $1 ended with $?"; }
"""


@pytest.mark.timeout(600)
def test_commands_of_a_job_that_would_start_worlds_of_one_end_with_the_reason(bed: Bed, tmp_path: Path) -> None:
    training = Training(bed, bed.shared / tmp_path.name)
    commands = [*WRONG, *RIGHT]
    script = SCRIPT + "\n".join(f"attempt {number} '{command}'" for number, command in enumerate(commands)) + "\n"
    job = training.submit(script, "--nodes=2", "--exclusive", "--time=10")
    training.until_over(job)
    printed = training.printed(job)
    for number, (command, words) in enumerate(WRONG.items()):
        part, code = _part(printed, number)
        assert words in part, f"{command}\n{part}"
        assert code in ("1", "2"), part  # 1 is torchrun's own code for a worker that ended with 2
    for number, name in enumerate(RIGHT.values(), len(WRONG)):
        part, code = _part(printed, number)
        assert code == "0", part
        assert RunFolder(training.folder / "runs" / name).last_step() == 2
    assert "2 processes on" in part


def _part(printed: str, number: int) -> tuple[str, str]:
    """Return what the attempt printed, and its exit code."""
    found = re.search(rf"^--- {number}$(.*?)^--- {number} ended with (\d+)$", printed, re.MULTILINE | re.DOTALL)
    assert found is not None, printed
    return found[1], found[2]
