"""What all benchmarks share: the config that is timed, a temporary folder, workers in new processes, and a result. No torch."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.bench.result import OWN, SECTIONS, Result, Row
from shoal.bench.worker_process import run_worker
from shoal.config.keys import options_of, plain_value
from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.launch.torchrun import count_gpus, plan_processes
from shoal.plan.length import given_steps
from shoal.resolve.resolve import resolve
from shoal.run.console import Console
from shoal.run.narrator import Narrator
from shoal.system.cpu import count_cores, free_cores

DEFAULT: Final = """
model: {family: llama, dim: 384, num_layers: 6, num_heads: 6, max_seq_len: 256}
data: {corpus: dummy, tokenizer: bytes, seq_len: 256}
train: {steps: 12, global_batch: 12, micro_batch: 12}
"""
WARMUP_STEPS: Final = 3
STEPS: Final = 12  # of a run, if the recipe sets none, or more than `MOST_STEPS`: its own length is for training
MOST_STEPS: Final = 40
QUIET: Final = 0.8  # share of the cores that must be free


@dataclass(frozen=True)
class Asked:
    """
    The command line of a benchmark.

    command: as it was typed. recipe: None uses the benchmark's own. repeats: runs of each case. out: file for the result.
    pictures: folder for pictures of it. default: the recipe that is used without one.
    """

    verb: str
    command: str
    recipe: Path | None
    overrides: Sequence[tuple[str, str, str]]
    repeats: int
    as_json: bool = False
    out: Path | None = None
    pictures: Path | None = None
    disk: Path | None = None  # folder on the disk to measure; None: the system's temporary folder
    default: str = DEFAULT

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ShoalError(f"--repeats {self.repeats}: a benchmark needs at least 1")
        if self.out is not None and self.out.is_dir():
            raise ShoalError(f"--out {self.out} is a folder; give a file, such as {self.out / 'result.json'}")
        if self.disk is not None and not self.disk.is_dir():
            raise ShoalError(f"--disk {self.disk} is not a folder")


class Trial:
    """A benchmark while it runs: workers get the same dtype and folders of their own."""

    def __init__(self, asked: Asked, folder: Path, narrator: Narrator) -> None:
        """Resolve the config; see `timed`. folder: for all that is written. narrator: names what takes long."""
        self.asked, self.folder, self._narrator = asked, folder, narrator
        self.gpus = count_gpus()
        self.config = self._resolved()
        self.about: dict[str, Any] = {}
        self._runs = 0
        self._said = set[str]()
        self.busy = "" if self.gpus else _others()
        if self.busy:
            self._say_once(self.busy)

    def _resolved(self) -> Config:
        recipe, overrides = self.asked.recipe, self.asked.overrides
        if recipe is None:
            recipe = self.folder / "default.yaml"
            recipe.write_text(self.asked.default, encoding="utf-8")
        resolved = resolve(recipe, overrides, needs_length=False)
        for note in resolved.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
        config, self.undecided = resolved.config, resolved.undecided
        steps = given_steps(config.train, config.data.seq_len) if self.asked.recipe else None
        self.tokens_to_train = steps and steps * config.train.global_batch * config.data.seq_len
        return timed(config, self.folder, keeps_data=self.asked.recipe is not None and config.data.corpus != "dummy")

    def prepare(self) -> int:
        """Prepare the data of the config, if that has not been done; return the vocabulary size."""
        from shoal.data.dataset import open_data

        return open_data(self.config.data, Console(on_stderr=True)).vocab_size

    def planned(self, config: Config, *, has_sizes: bool = True) -> Config:
        """
        Return `config` with its processes and threads. Raises `LaunchError` if this machine or the layout cannot run it.

        has_sizes: whether its sizes are known, which may be `undecided`.
        """
        return plan_processes(config, self.gpus, say=self._say_once, has_sizes=has_sizes)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            Console(on_stderr=True).warn(text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what takes long."""
        with self._narrator.phase(name):
            yield

    def run(self, module: str, config: Config, *, what: str, **more: Any) -> dict[str, Any]:
        """Run a worker with `config`; return its answer. what: the case, for errors. more: see `run_worker`."""
        self._runs += 1
        if config.train.dtype == "auto" and self.config.train.dtype != "auto":
            config = config.replace("train", dtype=self.config.train.dtype)
        config = config.replace("launch", runs=str(self.folder / f"runs-{self._runs}"))
        answer = run_worker(module, config, self.folder, what=what, **more)
        self.about = answer.get("about") or self.about
        if "dtype" in answer:  # what auto has chosen; a later run may not choose another
            self.config = self.config.replace("train", dtype=answer["dtype"])
        return answer

    def result(self, rows: Sequence[Row], notes: Sequence[str], model: str = "") -> Result:
        """Return the result. model: a description of it; empty if no model was timed."""
        options = {
            key: plain_value(value)
            for key, (_, value) in options_of(self.config).items()
            if key.startswith(SECTIONS) and key not in OWN
        }
        name = str(self.asked.recipe) if self.asked.recipe else "default"
        return Result(
            verb=self.asked.verb, command=self.asked.command, date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            recipe={"name": name, "model": model, "tokens_to_train": self.tokens_to_train, "options": options}, rows=rows,
            notes=[*notes, *([self.busy] if self.busy else [])], **self.about,
        )  # fmt: skip


def _others() -> str:
    """Return a warning if other programs use this machine's cores; empty if not."""
    cores, free = count_cores(), free_cores()
    if free >= QUIET * cores:
        return ""
    return f"other programs used {cores - free:.1f} of {cores} cores at the start: speeds are too low, and vary more"


@contextmanager
def trial(asked: Asked, narrator: Narrator) -> Iterator[Trial]:
    """Yield a trial whose temporary folder is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-", dir=asked.disk) as name:
        yield Trial(asked, Path(name), narrator)


def timed(config: Config, folder: Path, *, keeps_data: bool) -> Config:
    """
    Return the config to time: in a temporary run folder, of few steps, without evaluations and checkpoints.

    keeps_data: whether its prepared data is where the config says, so that training uses it too; else it is temporary.
    """
    steps = max(config.train.steps or STEPS, WARMUP_STEPS + 3)
    config = short_run(config, STEPS if steps > MOST_STEPS else steps, folder).replace("metrics", split_every=1)
    return config if keeps_data else config.replace("data", folder=str(folder / "data"))


def short_run(config: Config, steps: int, folder: Path) -> Config:
    """Return the config of a few steps in a run folder inside `folder`, each recorded, without evaluations and checkpoints."""
    config = config.replace("train", steps=steps, tokens=None, epochs=None, eval_every=0, sample_prompt="")
    config = config.replace("optim", warmup_steps=0).replace("checkpoint", every=0).replace("metrics", every=1)
    return config.replace("launch", runs=str(folder / "runs"), name="bench")


def finish(asked: Asked, result: Result, table: Callable[[Result], list[str]]) -> None:
    """Write, draw and print a result: as JSON, or as a table with what to conclude."""
    if asked.out is not None:
        result.save(asked.out)
    if asked.pictures is not None:
        from shoal.bench.pictures import draw

        files = draw(result, asked.pictures)
        print("\n".join(f"drew {file}" for file in files), file=sys.stderr)
    if asked.as_json:
        print(result.to_json())
        return
    console = Console()
    console.say(result.headline(), "bold")
    for line in [*table(result), "", *result.notes]:
        console.say(line)
