"""
A run's folder: its files, its lock, and whether a config may resume the run. No torch.

runs/NAME/
  config.yaml     the resolved config        metrics.jsonl   loss, speed, evaluations
  tokenizer.json  how its text became ids    events.jsonl    starts, saves, stops
  checkpoints/    see checkpoint/store.py    lock            the process that trains it
  samples/        text written at the end    ledger.jsonl    the samples it was trained on
  ranks.jsonl     memory and time by rank    model.txt       the model's modules, as text
  now.json        the phase it is in         cache/          what readers keep to draw curves fast
  stacks/         stacks of hung workers     time.jsonl      where the time went
  trackers/       how far each tracker came, and what it writes offline
  launchers.jsonl starts of launchers on several nodes, and why one ended before it met the others
  tensorboard/    TensorBoard's files
  source/         files that came with the weights, if it started from a model folder
  tokenizer/      all files of its tokenizer, if it came from another folder
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from shoal.config.data_options import is_built_in
from shoal.config.keys import ChangedOption, changed_options
from shoal.config.options import Config
from shoal.errors import ModelError, RunError, ShoalError
from shoal.hub.find import find_model
from shoal.hub.folder import HEADERS
from shoal.resolve.resolve import read_back, to_yaml, with_kept
from shoal.run.records import read_metrics
from shoal.system.disk import write_whole
from shoal.system.output import on_one_line

RENEWED_SECONDS: Final = 60.0  # a file that was renewed this recently may be renewed again


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @classmethod
    def of(cls, config: Config) -> RunFolder:
        """Return the folder that `config` trains in."""
        return cls(Path(config.launch.runs) / (config.launch.name or "run"))

    @classmethod
    def named(cls, target: str, runs: Path) -> RunFolder:
        """Return the folder of a run that a user names: the folder itself, or a name under `runs`."""
        folder = cls(Path(target))
        return folder if folder.config_file.is_file() else cls(runs / target)

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
        """Return whether there is a checkpoint on disk, damaged or not."""
        return any(self.checkpoints.glob("step-*/manifest.json"))

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ranks_file(self) -> Path:
        return self.path / "ranks.jsonl"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def model_file(self) -> Path:
        return self.path / "model.txt"

    @property
    def now_file(self) -> Path:
        return self.path / "now.json"

    @property
    def launchers_file(self) -> Path:
        return self.path / "launchers.jsonl"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def time_file(self) -> Path:
        return self.path / "time.jsonl"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers"

    @property
    def source(self) -> Path:
        return self.path / "source"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def tokenizer_files(self) -> Path | None:
        """Return the folder of all files of the run's tokenizer, also its chat template; None if it did not come from a folder."""
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
        Return this run's copies of a model and a tokenizer whose originals are gone, by their names in its config.

        A tokenizer that shoal trained on a blend is among them: other weights of the sources would train another one. So is
        tiktoken's, whose files are often in a cache that is cleared.

        Empty if there is no run. Raises nothing.
        """
        try:
            return self._kept(self._read_config())
        except (ShoalError, OSError):
            return {}

    def _kept(self, config: Config) -> dict[str, Path]:
        kept = {config.model.from_: self.source if (self.source / HEADERS).is_file() else None}
        if not is_built_in(config.data.tokenizer):
            kept.setdefault(config.data.tokenizer, self.tokenizer_files)
        gone = {name: folder for name, folder in kept.items() if name and folder and _is_gone(name, folder)}
        trained_on_blend = config.data.tokenizer == "bpe" and config.data.sources
        if (trained_on_blend or config.data.tokenizer.startswith("tiktoken:")) and self.tokenizer_file.is_file():
            gone[config.data.tokenizer] = self.tokenizer_file
        return gone

    @property
    def logs(self) -> Path:
        """Return the folder with a folder of ranks' logs for each start of the workers, on several nodes and under Slurm."""
        return self.path / "logs"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def last_step(self) -> int:
        """Return the last step in the metrics; 0 if there is none."""
        return read_metrics(self.metrics_file).last_step

    def load_config(self) -> Config:
        """Return the config that this run was trained with. Raises `RunError` if there is no run."""
        if not self.config_file.is_file():
            others = sorted(p.parent.name for p in self.path.parent.glob("*/config.yaml"))
            near = difflib.get_close_matches(self.path.name, others, n=3)
            more = f" and {len(others) - 8} more" if len(others) > 8 else ""
            known = f"; there are {', '.join(map(on_one_line, others[:8]))}{more}" if others else ""
            meant = f"; did you mean {' or '.join(map(on_one_line, near))}?" if near else f"{known}."
            name = on_one_line(self.path.name)
            raise RunError(
                f"{on_one_line(self.path)} is not a run{meant} shoal train RECIPE.yaml --name {name} starts one"
            )
        config = self._read_config()
        return with_kept(config, self._kept(config))

    def _read_config(self) -> Config:
        return read_back(self.config_file)

    def begun(self) -> Config | None:
        """Return the config of the run in this folder; None if there is no run yet."""
        return self.load_config() if self.config_file.is_file() else None

    def save_config(self, config: Config) -> None:
        """Write `config.yaml`, whole or not at all."""
        write_whole(self.config_file, [to_yaml(config).encode()])

    @contextlib.contextmanager
    def writable(self) -> Iterator[None]:
        """Raise `RunError` if a write to the folder fails inside this block."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error.strerror}; set launch.runs to a writable folder"
            ) from error

    def lock(self, meeting: str | None = None) -> None:
        """
        Lock this run until the process ends, however it ends. Raises `RunError` if another process holds the lock.

        meeting: the rendezvous address of launchers that share the lock, one per node.
        """
        with self.writable():
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("a+", encoding="utf-8")
        held = _take(file, fcntl.LOCK_EX)
        for _ in range(3):  # `is_locked` holds the lock for an instant
            if held or meeting is not None:
                break
            time.sleep(0.02)
            held = _take(file, fcntl.LOCK_EX)
        # Of launchers that start together, the first writes the lock and the others wait for it
        for _ in range(50 if meeting else 0):
            if held or (_take(file, fcntl.LOCK_SH) and _held(file).get("meeting") == meeting):
                break
            time.sleep(0.1)
            held = _take(file, fcntl.LOCK_EX)
        shared = not held and meeting is not None and _held(file).get("meeting") == meeting
        if held and meeting is None and _is_elsewhere(_held(file)) and self._is_renewed():
            raise RunError(
                f"{on_one_line(self.path)} is being trained {_holder(file)}, although its lock is free here: this file system "
                "keeps locks on each node; mount it with locks for all nodes (Lustre: -o flock), or stop the other process"
            )
        if held:
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                "command": " ".join(sys.argv[1:]),
                "meeting": meeting,
                "id": _held(file).get("id") or uuid.uuid4().hex,  # identifies this folder
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

    def _is_renewed(self) -> bool:
        """Return whether another host renews `now.json`, as one that trains does every few seconds. Waits if it is recent."""
        seen = set()
        with contextlib.suppress(OSError, ValueError):
            if abs(time.time() - self.now_file.stat().st_mtime) > RENEWED_SECONDS:
                return False
            for _ in range(50):
                now = json.loads(self.now_file.read_bytes())  # it is replaced, never half written
                seen |= {now.get("time")} if _is_elsewhere(now) else set()
                if len(seen) > 1:
                    return True
                time.sleep(0.1)
        return False

    def holder(self) -> dict[str, Any]:
        """Return what the last process that locked this run wrote about itself: pid, host, since, command; empty if none did."""
        try:
            with (self.path / "lock").open(encoding="utf-8") as file:
                return _held(file)
        except (OSError, UnicodeDecodeError):
            return {}

    def is_locked(self) -> bool:
        """Return whether a process trains this run now. It takes the lock for an instant, for which `lock` waits."""
        for mode, kind in (("r+", fcntl.LOCK_EX), ("r", fcntl.LOCK_SH)):  # a reader who may not write can only share
            try:
                with (self.path / "lock").open(mode, encoding="utf-8") as file:
                    return not _take(file, kind)
            except FileNotFoundError:
                return False
            except (OSError, RunError):
                continue
        return False

    def lock_id(self) -> str:
        """Return the id in the lock file: knowing it proves that a process can read this folder."""
        with (self.path / "lock").open(encoding="utf-8") as file:
            return str(_held(file).get("id", ""))

    def release(self) -> None:
        """Release the lock. May be called twice."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove_unused(self) -> None:
        """Remove the folder of a run that did not begin: one with nothing but the lock that this process holds."""
        with contextlib.suppress(OSError):
            if self._lock is not None and {path.name for path in self.path.iterdir()} <= {"lock", self.now_file.name}:
                self.now_file.unlink(missing_ok=True)
                (self.path / "lock").unlink()
                self.path.rmdir()

    def with_earlier_choices(self, config: Config) -> Config:
        """Return `config` with the vocabulary size and dtype that the run here has chosen, if there is a run."""
        before = self.begun()
        return _with_choices_of(config, before) if before else config

    def agree(self, config: Config) -> list[ChangedOption]:
        """
        Return what `config` would change in the run here; empty if there is no run yet.

        Raises `RunError` if a change contradicts the steps already taken.
        """
        before = self.begun()
        if before is None:
            return []
        config = _with_choices_of(config, before)
        found = [d for d in changed_options(before, config) if d.key not in ("launch.name", "launch.runs")]
        if forbidden := [d for d in found if d.past]:
            lines = "\n".join(f"  {d.key}: {d.before} -> {d.after}" for d in forbidden)
            raise RunError(
                f"{self.path} was trained with another config, and this would change its past:\n{lines}\n"
                "Set these back to resume it, or choose another --name for a new run"
            )
        return found


def _with_choices_of(config: Config, before: Config) -> Config:
    """Return `config` with the choices a run makes at its start, taken from `before`, the config that the run started with."""
    if config.model.vocab_size is None:  # the tokenizer's size, which data.* decides
        config = config.replace("model", vocab_size=before.model.vocab_size)
    if config.train.dtype == "auto":  # measured once: another result today would change the arithmetic
        config = config.replace("train", dtype=before.train.dtype)
    return config


def _take(file: IO[str], kind: int) -> bool:
    """Take a lock of this kind without waiting; return whether that succeeded. Raises `RunError` if the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EBADF, errno.EINTR):
            return False
        raise RunError(
            f"{on_one_line(file.name)} cannot be locked: {error.strerror}; mount this file system with locks (Lustre: -o "
            "flock), or set launch.runs to a folder on another one"
        ) from None
    return True


def _is_elsewhere(held: dict[str, Any]) -> bool:
    return held.get("host") not in (None, socket.gethostname())


def _share(file: IO[str]) -> bool:
    """Turn an exclusive lock into a shared one. The swap is not atomic: retry while another process holds it."""
    for _ in range(50):
        if _take(file, fcntl.LOCK_SH):
            return True
        time.sleep(0.1)
    return False


def _held(file: IO[str]) -> dict[str, Any]:
    """Return what the lock's holder wrote into the file."""
    file.seek(0)
    try:
        found = json.loads(file.read())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _holder(file: IO[str]) -> str:
    """Describe the lock's holder."""
    try:
        return "by process {pid} on {host} since {since} (shoal {command})".format(**_held(file))
    except KeyError:
        return "by another process"


def _is_gone(name: str, kept: Path) -> bool:
    """Return whether `name` can no longer be found, so that a run uses its own copy."""
    try:
        return find_model(name, kept) == kept
    except ModelError:  # it exists, but is damaged
        return False
