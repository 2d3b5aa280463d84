"""TensorBoard: event files in the run's folder, written with the package `tensorboard` alone."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from shoal.config.track_options import Track
from shoal.trackers.points import About, Batch
from shoal.trackers.tracker import Opened, Tracker


class TensorBoard(Tracker):
    """
    Numbers in `RUN/tensorboard`, texts in `RUN/tensorboard/notes`.

    A session log of the first step that is taken again makes TensorBoard forget the steps from there on. It would also
    forget texts, so they have files of their own.
    """

    rewinds: ClassVar[bool] = True

    def __init__(self, track: Track, folder: Path) -> None:
        super().__init__(track, folder)
        self._at = folder.parents[1] / "tensorboard"
        self._is_torn = False

    def open(self, about: About, state: Mapping[str, Any]) -> Opened:
        if not state:  # the whole run is sent
            for path in self._at.glob("**/events.out.tfevents.*"):
                path.unlink()
        self._open_files()
        self._texts.add(_text("about/options", _table(about.options)), 0)
        self._texts.add(_text("about/facts", _table(about.facts)), 0)
        if about.model:
            self._texts.add(_text("about/model", f"```\n{about.model}\n```"), 0)
        self._texts.flush()
        return Opened(f"tensorboard --logdir {self._at}", {"folder": "tensorboard"})

    def _open_files(self) -> None:
        self._numbers, self._texts = _EventFile(self._at), _EventFile(self._at / "notes")

    def write(self, batch: Batch) -> None:
        cut = batch.cut
        if self._is_torn:
            self._open_files()
            cut = cut or 0
        self._is_torn = True  # until all is written: TensorBoard does not read past a record that was cut short
        self._write(batch, cut)
        self._is_torn = False

    def _write(self, batch: Batch, cut: int | None) -> None:
        if cut is not None:
            self._numbers.forget_from(cut + 1)
        for each in batch.scalars:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in each.values.items()]
            self._numbers.add(values, each.step, each.time)
        for note in batch.notes:
            self._texts.add(_text(note.name, note.text), note.step, note.time)
        self._numbers.flush()
        self._texts.flush()

    def close(self) -> None:
        self._numbers.close()
        self._texts.close()


class _EventFile:
    """A file of TensorBoard's events. Its name sorts after those of earlier starts: TensorBoard reads files in that order."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        earlier = [int(p.name.split(".")[3]) for p in folder.glob("events.out.tfevents.*")]
        begun = max([int(time.time()), *(number + 1 for number in earlier)])
        path = folder / f"events.out.tfevents.{begun:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file: BinaryIO = path.open("wb")
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=begun, file_version="brain.Event:2"))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())

    def forget_from(self, step: int) -> None:
        """Make TensorBoard forget what it read of `step` and later steps."""
        self._write(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Iterable[Summary.Value], step: int, when: float = 0.0) -> None:
        self._write(Event(wall_time=when or time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def _text(name: str, text: str) -> list[Summary.Value]:
    """Return a text, which TensorBoard shows as Markdown."""
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
    return [Summary.Value(tag=name, metadata=metadata, tensor=tensor)]


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {json.dumps(value, ensure_ascii=False)} |" for name, value in values.items()]
    return "\n".join(["| name | value |", "| --- | --- |", *rows])
