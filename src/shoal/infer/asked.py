"""
The model, text and tasks that a command names, checked before torch is imported, which takes seconds.
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
    """A model: a run, or a folder (or the name of a downloaded model)."""

    runs: Path
    target: str | None = None
    folder: str | None = None
    family: str | None = None
    step: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        """Raise `ShoalError` unless exactly one of run and folder is given. A folder takes no `step`, a run no `family`."""
        if self.target is None and self.folder is None:
            raise ShoalError("no model given; set RUN or --model.from DIR")
        if self.target is not None and self.folder is not None:
            raise ShoalError(f"the run {self.target} and --model.from {self.folder} are two models; give only one")
        if self.folder is not None and self.step is not None:
            raise ShoalError(
                f"--step {self.step} selects a run's checkpoint, and --model.from {self.folder} has no checkpoints"
            )
        if self.folder is None and self.family is not None:
            raise ShoalError(f"--model.family {self.family} needs --model.from; a run's config sets its family")

    @classmethod
    def at(cls, path: str | Path, *, device: str, dtype: str) -> Self:
        """Return the model in a run's folder, in a checkpoint's folder, or in a Hugging Face folder."""
        folder = Path(path).expanduser()
        run, (_, _, step) = folder.parent.parent, folder.name.rpartition("-")
        if (folder / "config.yaml").is_file():
            return cls(folder.parent, str(folder), device=device, dtype=dtype)
        if (folder / MANIFEST).is_file() and step.isdigit():
            return cls(run.parent, str(run), step=int(step), device=device, dtype=dtype)
        return cls(folder.parent, folder=str(path), device=device, dtype=dtype)

    def check(self) -> None:
        """Raise `RunError`, `CheckpointError` or `ModelError` if there is no such model."""
        if self.folder is not None:
            ModelFolder.open(find_model(self.folder))
        elif self.target is not None:
            find_checkpoint(self.runs, self.target, self.step)


@dataclass(frozen=True)
class Text:
    """A text to score, and the length and stride of its windows in tokens (None: the defaults of `score.choose_windows`)."""

    file: Path
    content: str
    bytes: int
    context: int | None = None
    stride: int | None = None

    @classmethod
    def read(cls, file: Path, context: int | None = None, stride: int | None = None) -> Self:
        """Read a UTF-8 file. Raises `DataError` if it cannot be read, is not text, or is empty."""
        try:
            content = without_mark(file.read_bytes())
            check_text(content, str(file), "set --text to a text file")
            text = content.decode("utf-8")
        except OSError as error:
            raise DataError(
                f"cannot read {on_one_line(file)}: {error.strerror or error}; set --text to a text file"
            ) from error
        except UnicodeDecodeError as error:
            raise DataError(f"{on_one_line(file)} is not UTF-8 text: {error}; set --text to a UTF-8 file") from error
        if not text:
            raise DataError(f"{on_one_line(file)} is empty; set --text to a file with text")
        return cls(file, text, len(content), context, stride)


@dataclass(frozen=True)
class Tasks:
    """Harness tasks and their settings. include_path: a folder with the user's own tasks (*.yaml)."""

    names: tuple[str, ...]
    include_path: Path | None = None
    limit: int | None = None  # maximum documents of each task
    num_fewshot: int | None = None  # examples before each question; None: the task's own number

    def __post_init__(self) -> None:
        """Raise `ShoalError` if there are no tasks, `DataError` if `include_path` is not a folder."""
        if not self.names:
            raise ShoalError("--tasks is empty; give names, such as hellaswag,arc_easy")
        if self.include_path is not None and not self.include_path.is_dir():
            raise DataError(
                f"there is no folder {on_one_line(self.include_path)}; set --include-path to a folder with tasks (*.yaml)"
            )
