"""
Which steps a profile records, and its folders. No torch.

runs/NAME-profile/          the run that was trained for the profile; it saves no checkpoint
  profile/step-00000010/    the profile of steps 10 and after
    rank0.trace.json.gz     what rank 0 did, in the trace-event format; Perfetto opens it
    summary.json            operators, timeline, overlap and overhead, of every rank
    memory.json             memory by module, of every rank
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.config.options import Config
from shoal.errors import RunError, ShoalError
from shoal.run.folder import RunFolder

SUFFIX: Final = "-profile"  # of the name of a run that is trained for a profile
FOLDER: Final = "profile"
WARMUP: Final = 9  # steps before the default ones: compiling, allocators and caches have settled then
DEFAULT_COUNT: Final = 3
# A profiled run leaves these behind, and the next one of the same name begins without them.
_OF_LAST_TIME: Final = (
    "config.yaml", "metrics.jsonl", "ranks.jsonl", "ledger.jsonl", "time.jsonl", "tokenizer.json", "model.txt",
    "now.json", "cache", "checkpoints", "source", "tokenizer",
)  # fmt: skip
_KEPT_OF_RUN: Final = ("config.yaml", "ledger.jsonl", "tokenizer.json", "source", "tokenizer")


@dataclass(frozen=True)
class Steps:
    """The steps to profile: from `first` to `last`, both included."""

    first: int
    last: int

    @classmethod
    def read(cls, text: str) -> Steps:
        """Read "10..12" or "10". Raises `ShoalError` for anything else, and for a range that is empty or begins before 1."""
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text.strip().replace(",", ""))
        if found is None:
            raise ShoalError(
                f"--steps {text} is not a range of steps; give the first and the last, such as --steps 10..12"
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if first < 1:
            raise ShoalError(f"--steps {text}: the first step of a run is 1; give a range such as --steps 1..3")
        if last < first:
            raise ShoalError(f"--steps {text} ends before it begins; give --steps {last}..{first}")
        return cls(first, last)

    def __str__(self) -> str:
        return f"{self.first}..{self.last}"

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __contains__(self, step: int) -> bool:
        return self.first <= step <= self.last

    def check(self, total_steps: int) -> None:
        """Raise `ShoalError` if the run ends before the last of these steps."""
        if self.last > total_steps:
            count = min(len(self), total_steps)
            fits = f"{total_steps - count + 1}..{total_steps}"
            raise ShoalError(
                f"--steps {self}: the run has {total_steps:,} step{'s' * (total_steps != 1)}; give --steps {fits}, "
                "or a longer run (train.steps)"
            )


@dataclass(frozen=True)
class Asked:
    """What to profile."""

    steps: Steps
    ranks: Collection[int]
    source: RunFolder | None = None  # the run to start from; None: the beginning
    source_step: int = 0  # the step of its checkpoint


def default_steps(total_steps: int, after: int = 0) -> Steps:
    """
    Return the steps to profile if none are named: three after the warmup, fewer and earlier if the run is shorter.

    after: the step of the checkpoint from which the run starts. Raises `ShoalError` if no step is left.
    """
    if after >= total_steps:
        raise ShoalError(
            f"the run has {total_steps:,} steps and its checkpoint has taken all of them: nothing is left to profile"
        )
    first = max(after + 1, min(after + WARMUP + 1, total_steps - DEFAULT_COUNT + 1))
    return Steps(first, min(first + DEFAULT_COUNT - 1, total_steps))


def read_ranks(text: str | None, world_size: int) -> Collection[int]:
    """Return the ranks to profile, from "0,1"; all for None. Raises `ShoalError` if a rank does not exist."""
    if text is None:
        return range(world_size)
    names = [each.strip() for each in text.split(",")]
    wrong = [each for each in names if not each.isdigit() or int(each) >= world_size]
    if wrong:
        raise ShoalError(
            f"--ranks {text}: {wrong[0] or 'an empty name'} is not a rank of this layout; its ranks are 0 to {world_size - 1}"
        )
    return sorted({int(each) for each in names})


def config_of_profile(config: Config) -> Config:
    """Return the config of the run that is trained for a profile: a name of its own, and no copies of checkpoints in memory."""
    config = config.replace("launch", name=f"{config.launch.name or 'run'}{SUFFIX}", max_restarts=0)
    return config.replace("checkpoint", fast=None)


def folder_of(run: RunFolder, first: int) -> Path:
    """Return the folder of the profile whose first step is `first`."""
    return run.path / FOLDER / f"step-{first:08d}"


def profiles_of(run: Path) -> list[Path]:
    """Return the complete profiles of a run, also those of the run trained to profile it; oldest step first."""
    places = (run / FOLDER, run.with_name(run.name + SUFFIX) / FOLDER)
    return [file.parent for place in places for file in sorted(place.glob("step-*/summary.json"))]


def prepare(run: RunFolder, source: RunFolder | None, step: int) -> None:
    """
    Clear the folder of the last profile, except for its results, and start it from `source`'s checkpoint of `step`.

    source: None or step 0 for a run from the start. The checkpoint's files are linked, not copied, and never written to.
    Raises `RunError` if the folder is that of an ordinary run.
    """
    check_is_scratch(run)
    with run.writable():
        (run.path / FOLDER).mkdir(parents=True, exist_ok=True)
        for name in _OF_LAST_TIME:
            _remove(run.path / name)
        if source is not None and step:
            for name in _KEPT_OF_RUN:
                _copy(source.path / name, run.path / name)
            name = f"checkpoints/step-{step:08d}"
            _link(source.path / name, run.path / name)


def check_is_scratch(run: RunFolder) -> None:
    """Raise `RunError` if the folder is that of an ordinary run."""
    if run.config_file.is_file() and not (run.path / FOLDER).is_dir():
        raise RunError(f"{run.path} is an ordinary run, which a profile would replace; choose another --name")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _copy(path: Path, to: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, to)
    elif path.is_file():
        shutil.copy2(path, to)


def _link(folder: Path, to: Path) -> None:
    """Link the files of a folder: a checkpoint is large, and is not written to again."""
    to.mkdir(parents=True)
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # a file system without links
            os.link(path, to / path.name)
            continue
        shutil.copy2(path, to / path.name)
