"""
A run's folder: what is in it, who holds it, and whether a config may go on with it. No torch.

runs/NAME/
  config.yaml     the resolved config        metrics.jsonl   a line a step
  tokenizer.json  how its text became ids    events.jsonl    starts, saves, stops
  checkpoints/    see checkpoint/store.py    lock            who trains it now
  samples/        what it wrote when it ended  ledger.jsonl  which samples it was trained on
  stacks/         of workers that hung       time.jsonl      where the time went
  source/         what came beside the weights, where it started from a folder
  tokenizer/      all files of its tokenizer, where that is another folder
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from shoal.config.options import Config
from shoal.errors import ModelError, RunError, ShoalError
from shoal.hub.find import find_model
from shoal.hub.folder import HEADERS
from shoal.resolve.resolve import ChangedOption, changed_options, read_back, to_yaml, with_kept
from shoal.run.events import read_json_lines
from shoal.system.disk import write_whole
from shoal.system.output import on_one_line


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """The folder that `config` trains in."""
        return cls(Path(config.launch.runs) / (config.launch.name or "run"))

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def tokenizer_file(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def has_checkpoint(self) -> bool:
        """Whether one is on disk, whole or not."""
        return any(self.checkpoints.glob("step-*/manifest.json"))

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def time_file(self) -> Path:
        return self.path / "time.jsonl"

    @property
    def source(self) -> Path:
        return self.path / "source"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def tokenizer_files(self) -> Path | None:
        """The folder with what its tokenizer came with (its chat template among it); None for one of our own."""
        return next(
            (
                p
                for p in (self.tokenizer, self.source)
                if (p / "tokenizer.json").is_file() or (p / "tokenizer.model").is_file()
            ),
            None,
        )

    def kept(self) -> dict[str, Path]:
        """
        Return what this run keeps of a model and a tokenizer that are gone, by the name that its config has for each.

        Empty if there is no run. Raises nothing.
        """
        try:
            return self._kept(self._read_config())
        except (ShoalError, OSError):
            return {}

    def _kept(self, config: Config) -> dict[str, Path]:
        kept = {config.model.from_: self.source if (self.source / HEADERS).is_file() else None}
        kept.setdefault(config.data.tokenizer, self.tokenizer_files)
        return {name: folder for name, folder in kept.items() if name and folder and _is_gone(name, folder)}

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def last_step(self) -> int:
        """The last step in the metrics; 0 where there is none."""
        records = read_json_lines(self.metrics_file)
        return int(records[-1]["step"]) if records else 0

    def load_config(self) -> Config:
        """The config that this run was trained with. Raises `RunError` where there is no run."""
        if not self.config_file.is_file():
            others = sorted(p.parent.name for p in self.path.parent.glob("*/config.yaml"))
            near = difflib.get_close_matches(self.path.name, others, n=3)
            more = f" and {len(others) - 8} more" if len(others) > 8 else ""
            known = f"; there are {', '.join(map(on_one_line, others[:8]))}{more}" if others else ""
            meant = f"; did you mean {' or '.join(map(on_one_line, near))}?" if near else f"{known}."
            name = on_one_line(self.path.name)
            raise RunError(f"{on_one_line(self.path)} is no run{meant} shoal train RECIPE.yaml --name {name} makes one")
        config = self._read_config()
        return with_kept(config, self._kept(config))

    def _read_config(self) -> Config:
        return read_back(self.config_file)

    def begun(self) -> Config | None:
        """The config of the run that is here; None where there is no run yet."""
        return self.load_config() if self.config_file.is_file() else None

    def save_config(self, config: Config) -> None:
        """Write `config.yaml`, whole or not at all."""
        write_whole(self.config_file, [to_yaml(config).encode()])

    @contextlib.contextmanager
    def writable(self) -> Iterator[None]:
        """Raises `RunError` for a folder that cannot be written to."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error.strerror}; set launch.runs to a folder that can"
            ) from error

    def lock(self, meeting: str | None = None) -> None:
        """
        Hold this run until the process ends, however it ends. Raises `RunError` where somebody else does.

        meeting: where launchers meet that hold it together, one on each machine.
        """
        with self.writable():
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("a+", encoding="utf-8")
        held = _take(file, fcntl.LOCK_EX)
        for _ in range(
            50 if meeting else 0
        ):  # launchers that start together: the first writes, the others wait for that
            if held or (_take(file, fcntl.LOCK_SH) and _held(file).get("meeting") == meeting):
                break
            time.sleep(0.1)
            held = _take(file, fcntl.LOCK_EX)
        shared = not held and meeting is not None and _held(file).get("meeting") == meeting
        if held:
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "command": " ".join(sys.argv[1:]),
                "meeting": meeting,
                "id": _held(file).get("id") or uuid.uuid4().hex,  # of the folder, as long as it is there
            }
            file.seek(0)
            file.truncate()
            file.write(json.dumps(holder))
            file.flush()
            os.fsync(file.fileno())
            shared = meeting is None or _share(file)
        if not shared:
            raise RunError(
                f"{on_one_line(self.path)} is being trained {_holder(file)}; wait for it, stop it, or choose another --name"
            )
        self._lock = file

    def lock_id(self) -> str:
        """What the lock says here, and nowhere else: who knows it sees this folder, and may read it."""
        with (self.path / "lock").open(encoding="utf-8") as file:
            return str(_held(file).get("id", ""))

    def release(self) -> None:
        """Hold it no more. May be called twice."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def settled(self, config: Config) -> Config:
        """`config` with what the run that is here has settled already, if there is one."""
        before = self.begun()
        return _settled(config, before) if before else config

    def agree(self, config: Config) -> list[ChangedOption]:
        """
        What `config` would change of the run that is here; none where there is no run yet.

        Raises `RunError` where it would change what the steps already taken meant.
        """
        before = self.begun()
        if before is None:
            return []
        config = _settled(config, before)
        found = [d for d in changed_options(before, config) if d.key not in ("launch.name", "launch.runs")]
        if forbidden := [d for d in found if d.past]:
            lines = "\n".join(f"  {d.key}: {d.before} -> {d.after}" for d in forbidden)
            raise RunError(
                f"{self.path} was trained with another config, and this would change its past:\n{lines}\n"
                "Set these back to go on with it, or choose another --name to start anew"
            )
        return found


def _settled(config: Config, before: Config) -> Config:
    """`config` with what a run settles when it starts taken from the config it started with."""
    if config.model.vocab_size is None:  # the tokenizer's, which data.* decides
        config = config.replace("model", vocab_size=before.model.vocab_size)
    if config.train.dtype == "auto":  # measured once: another answer today would be another arithmetic
        config = config.replace("train", dtype=before.train.dtype)
    return config


def _take(file: IO[str], kind: int) -> bool:
    """A lock of this kind, if it is to be had now."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _share(file: IO[str]) -> bool:
    """A lock that others may hold too, in place of ours alone: in between another one may have that for a moment."""
    for _ in range(50):
        if _take(file, fcntl.LOCK_SH):
            return True
        time.sleep(0.1)
    return False


def _held(file: IO[str]) -> dict[str, Any]:
    """What the one who took the lock wrote into it."""
    file.seek(0)
    try:
        found = json.loads(file.read())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _holder(file: IO[str]) -> str:
    """Who wrote the lock file, in words."""
    try:
        return "by process {pid} on {host} since {since} (shoal {command})".format(**_held(file))
    except KeyError:
        return "by another process"


def _is_gone(name: str, kept: Path) -> bool:
    """Return whether `name` is nowhere, so that a run uses what it keeps of it."""
    try:
        return find_model(name, kept) == kept
    except ModelError:  # it is there, and broken
        return False
