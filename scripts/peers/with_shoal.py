"""shoal: the loop of `shoal train` on a recipe, `python -m scripts.peers.with_shoal RECIPE ANSWER`, alone or under torchrun."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from scripts.peers.contract import TURNS, Recorder, versions, write_answer

from shoal.data.loader import Batch
from shoal.mesh.mesh import open_mesh
from shoal.plan.estimate import parameter_count
from shoal.resolve.resolve import read_back
from shoal.run.records import read_metrics
from shoal.system.signals import StopRequest, die_with_parent
from shoal.training.loop import set_threads, take_steps
from shoal.training.run import Run


def main(recipe: Path, answer: Path) -> None:
    """Take the steps of the recipe; the first process waits for its turns, and the others for it."""
    die_with_parent()
    config = read_back(recipe)
    set_threads(config)
    with open_mesh(config.train.device, config.launch.timeout_seconds, config.parallel) as mesh:
        run = Run.open(config, mesh, StopRequest())
        if not mesh.is_first:
            os.environ.pop(TURNS, None)
        recorder, read = Recorder(), run.loader.next_step

        def next_step() -> list[Batch]:
            mesh.barrier()  # after the step of every process
            if run.state.step:
                recorder.tick()
            else:
                recorder.start()
            mesh.barrier()  # in this turn
            return list(read())

        run.loader.next_step = next_step  # type: ignore[method-assign]
        take_steps(run)
        recorder.tick()
        run.close()
        if mesh.is_first:
            recorder.losses = [record.loss for record in read_metrics(run.folder.metrics_file).steps]
            os.remove(run.folder.metrics_file)  # the same recipe may be timed again
            write_answer(answer, recorder, parameters=parameter_count(config.model), versions=versions(["torch"]))
        mesh.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
