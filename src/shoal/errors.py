"""
The errors a person can meet.

    ShoalError              exit code 2, one message, no traceback
    ├── ConfigError         what was asked for cannot be (all problems at once)
    ├── DataError           corpus, tokenizer or token shards
    ├── ModelError          a folder of weights: missing, cut short, or of a shape that is not honoured
    ├── CheckpointError     a checkpoint that cannot be read or written
    ├── RunError            the run's folder: locked, unwritable, of another past
    ├── CompileError        compiled code whose loss or gradients are not those of the model
    ├── LaunchError         processes, ports, devices
    │   └── LostPeerError   another process of the run is gone
    ├── MemoryProblem       memory that ran out
    ├── GenerateError       a prompt or a sampling option
    └── DivergedError       the numbers stopped being numbers

Each message says what is wrong and what to set. Anything that is not a `ShoalError` is a bug of ours and
keeps its traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

EXIT_BAD_INPUT = 2
EXIT_LOST_PEER = 3  # of a worker, when another one of its run has gone
EXIT_REQUEUE = 85  # asked to stop before the end: the same command goes on from what was saved


class ShoalError(Exception):
    """
    Base of what a person can mend; `str(error)` is the whole message.

    option: the one that the message is about, and stands in `text` as {option}: another verb may spell it otherwise.
    """

    def __init__(self, text: str, *, option: str = "") -> None:
        super().__init__(text.replace("{option}", option) if option else text)
        self.text, self.option = text, option


@contextlib.contextmanager
def spelled(names: Mapping[str, str]) -> Iterator[None]:
    """Errors from within name their option as `names` has it: as the person at this verb writes it."""
    try:
        yield
    except ShoalError as error:
        if error.option not in names:
            raise
        raise type(error)(error.text, option=names[error.option]) from None


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: `where` it was written, and `what` to do about it."""

    where: str  # "recipe.yaml:12", "--optim.lr", or "" where two values contradict each other
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class ConfigError(ShoalError):
    """Every problem of a config, found before anything starts."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "a problem"
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{count} in the config\n{lines}")


class DataError(ShoalError):
    """A corpus, a tokenizer or token shards that cannot be used."""


class ModelError(ShoalError):
    """A folder of weights that is missing, cut short, or asks for what is not built here."""


class CheckpointError(ShoalError):
    """A checkpoint that is missing, cut short, altered, or of another model."""


class RunError(ShoalError):
    """A run's folder that is locked, cannot be written, or holds another past."""


class CompileError(ShoalError):
    """Compiled code whose loss or gradients are not those of the model."""


class LaunchError(ShoalError):
    """Processes, ports or devices that are not to be had."""


class LostPeerError(LaunchError):
    """Another process of the run is gone."""


class MemoryProblem(ShoalError):
    """Memory that ran out where the same would happen again."""


class GenerateError(ShoalError):
    """A prompt or a sampling option that cannot be honoured."""


class DivergedError(ShoalError):
    """The loss or the gradient norm is no longer finite."""
