"""
What a person asks of a model: which one, a text to score, tasks. No torch.

Names, files and options are judged here, at once: importing torch takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from shoal.checkpoint.saved import MANIFEST
from shoal.data.corpus.encoding import check_text, without_mark
from shoal.errors import DataError, ShoalError
from shoal.hub.find import find_model
from shoal.hub.folder import ModelFolder
from shoal.infer.target import find_checkpoint
from shoal.system.output import on_one_line


@dataclass(frozen=True)
class Wanted:
    """Which model a person means: a run, or a folder (or the name of one that is on this machine)."""

    runs: Path
    target: str | None = None
    folder: str | None = None
    family: str | None = None
    step: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Raises `ShoalError` unless it is one of the two."""
        if self.target is None and self.folder is None:
            raise ShoalError("which model? Give a RUN, or --model.from DIR")
        if self.target is not None and self.folder is not None:
            raise ShoalError(
                f"both the run {self.target} and --model.from {self.folder}: they are two models; give one of them"
            )
        if self.folder is not None and self.step is not None:
            raise ShoalError(f"--step {self.step} is of a run's checkpoints, and --model.from {self.folder} has none")
        if self.folder is None and self.family is not None:
            raise ShoalError(f"--model.family {self.family} is for --model.from; a run knows its family")

    @classmethod
    def at(cls, path: str | Path, *, device: str, dtype: str) -> Self:
        """Return the one in a folder: a run's, a checkpoint's of a run, or one of Hugging Face's."""
        folder = Path(path).expanduser()
        run, (_, _, step) = folder.parent.parent, folder.name.rpartition("-")
        if (folder / "config.yaml").is_file():
            return cls(folder.parent, str(folder), device=device, dtype=dtype)
        if (folder / MANIFEST).is_file() and step.isdigit():
            return cls(run.parent, str(run), step=int(step), device=device, dtype=dtype)
        return cls(folder.parent, folder=str(path), device=device, dtype=dtype)

    def check(self) -> None:
        """Raises `RunError`, `CheckpointError` or `ModelError` where there is no such model."""
        if self.folder is not None:
            ModelFolder.open(find_model(self.folder))
        elif self.target is not None:
            find_checkpoint(self.runs, self.target, self.step)


@dataclass(frozen=True)
class Text:
    """A text to score: of which file, how many bytes it was, and its windows (None: see `score.choose_windows`)."""

    file: Path
    content: str
    bytes: int
    context: int | None = None
    stride: int | None = None

    @classmethod
    def read(cls, file: Path, context: int | None = None, stride: int | None = None) -> Self:
        """Raises `DataError` where it cannot be read, is no text, or is empty."""
        try:
            content = without_mark(file.read_bytes())
            check_text(content, str(file), "set --text to a file that is")
            text = content.decode("utf-8")
        except OSError as error:
            raise DataError(
                f"cannot read {on_one_line(file)}: {error.strerror or error}; set --text to a file of text"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{on_one_line(file)} is no UTF-8 text: {error}; set --text to a file that is") from error
        if not text:
            raise DataError(f"{on_one_line(file)} is empty; set --text to a file with something in it")
        return cls(file, text, len(content), context, stride)


@dataclass(frozen=True)
class Tasks:
    """Which tasks, and what the harness is told of them. include_path: a folder with tasks of one's own (*.yaml)."""

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None  # documents of each task at most
    num_fewshot: int | None = None  # examples before each question; None: as the task says

    def __post_init__(self) -> None:
        """Raises `ShoalError` where there are none, `DataError` where there is no such folder."""
        if not self.names:
            raise ShoalError("--tasks names none: give some, such as hellaswag,arc_easy")
        if self.include_path is not None and not self.include_path.is_dir():
            raise DataError(
                f"there is no folder {on_one_line(self.include_path)}; set --include-path to one with tasks (*.yaml) in it"
            )
