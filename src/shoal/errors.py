"""
The errors that a user can fix.

    ShoalError              exit code 2, one message, no traceback
    ├── ConfigError         invalid config, with all problems at once
    ├── DataError           invalid corpus, tokenizer or token shards
    │   ├── TooSmallError       a split without a row that has something to learn
    │   └── UnreadableError     tokens of some rows: altered, on a broken part of a disk, or not ids
    ├── ModelError          a folder of weights that is missing, truncated or unsupported
    ├── CheckpointError     a checkpoint that cannot be read or written
    ├── RunError            a run's folder that is missing, locked, unwritable or incompatible
    ├── CompileError        compiled code whose loss or gradients differ from eager code
    ├── LaunchError         unavailable processes, ports or devices
    │   └── LostPeerError   another process of the run is gone
    ├── MemoryProblem       out of memory
    ├── GenerateError       an invalid prompt or sampling option
    └── DivergedError       a loss or gradient norm that stays NaN or Inf

Each message says what is wrong and what to set. Any other exception is a bug in shoal and keeps its traceback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

EXIT_BAD_INPUT = 2
EXIT_LOST_PEER = 3  # a worker exits with this after another worker of its run is gone
EXIT_REQUEUE = 85  # stopped early on request; the same command resumes from the last checkpoint


class ShoalError(Exception):
    """
    Base class of errors that a user can fix; `str(error)` is the whole message.

    option: the option at fault, written {option} in `text`, because verbs spell the same option differently.
    """

    def __init__(self, text: str, *, option: str = "") -> None:
        super().__init__(text.replace("{option}", option) if option else text)
        self.text, self.option = text, option


@contextlib.contextmanager
def spelled(names: Mapping[str, str]) -> Iterator[None]:
    """Rename the option of errors raised inside, from its internal name to this verb's spelling in `names`."""
    try:
        yield
    except ShoalError as error:
        if error.option not in names:
            raise
        raise type(error)(error.text, option=names[error.option]) from None


@dataclass(frozen=True)
class Problem:
    """One problem of a config: its origin (`where`), and a message (`what`) that says how to fix it."""

    where: str  # "recipe.yaml:12", "--optim.lr", or "" if only defaults are involved
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class ConfigError(ShoalError):
    """All problems of a config, found before anything starts."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problems" if len(self.problems) > 1 else "a problem"
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{count} in the config\n{lines}")


class DataError(ShoalError):
    """An unusable corpus, tokenizer or token shard."""


class TooSmallError(DataError):
    """A split that fills no row, or whose rows have nothing to learn."""


class UnreadableError(DataError):
    """Tokens of some rows that cannot be read: altered, on a broken part of a disk, or not ids. Other rows may be fine."""


class ModelError(ShoalError):
    """A folder of weights that is missing, truncated, or needs an unsupported feature."""


class CheckpointError(ShoalError):
    """A checkpoint that is missing, truncated, altered, or from another model."""


class RunError(ShoalError):
    """A run's folder that is missing, locked, unwritable, or holds a run with an incompatible config."""


class CompileError(ShoalError):
    """Compiled code whose loss or gradients differ from eager code by more than rounding."""


class LaunchError(ShoalError):
    """Unavailable or inconsistent processes, ports or devices."""


class LostPeerError(LaunchError):
    """Another process of the run is gone."""


class MemoryProblem(ShoalError):
    """Out of memory in a way that a restart would repeat."""


class GenerateError(ShoalError):
    """An invalid prompt or sampling option."""


class DivergedError(ShoalError):
    """A loss or gradient norm that stays NaN or Inf."""
