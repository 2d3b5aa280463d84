"""TensorBoard's files, read back by TensorBoard's own reader."""

from __future__ import annotations

import contextlib
import resource
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shoal.trackers.feeding import Feed
from tests.trackers.written import MODEL, Written


def read_back(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    return found


def curve(found: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in found.Scalars(name)]


def single(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the values in single precision, which TensorBoard keeps."""
    return [(step, struct.unpack("f", struct.pack("f", value))[0]) for step, value in points]


def feed_all(run: Written) -> None:
    feed = Feed(run.folder, "tensorboard")
    feed.open()
    while feed.turn():
        pass
    feed.close()


def test_a_run_that_went_back_twice_is_one_curve(tmp_path: Path) -> None:
    run = Written(tmp_path / "gpt")
    run.start()
    run.steps(1, 25)
    feed_all(run)
    run.start(20)
    run.steps(21, 38)
    feed_all(run)
    feed_all(run)  # a start without news
    run.start(30)
    run.steps(31, 40)
    run.sample("end", "once upon a time")
    feed_all(run)
    found = read_back(run.folder.path / "tensorboard")
    for name, key in {"train/loss": "loss", "train/grad_norm": "grad_norm", "val/loss": "val_loss"}.items():
        assert curve(found, name) == single(run.curve(key))
    assert [step for step, _ in curve(found, "memory/peak_bytes/rank_1")] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert found.Scalars("train/loss")[0].wall_time == run.lines()[0]["time"]
    notes = read_back(run.folder.path / "tensorboard" / "notes")
    texts = {tag: notes.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in notes.Tags()["tensors"]}
    assert len(notes.Tensors("events/started")) == 3
    assert MODEL in texts["about/model"]
    assert texts["samples/end"] == "once upon a time"
    assert "| optim.lr | 0.001 |" in texts["about/options"]
    for fact in (
        '| gpus.1.name | "Made-up GPU" |',
        "| world_size | 2 |",
        "| parameters | 1234 |",
        '| versions.torch | "9.9" |',
    ):
        assert fact in texts["about/facts"]


def test_a_replay_replaces_what_was_there(tmp_path: Path) -> None:
    run = Written(tmp_path / "gpt")
    run.start()
    run.steps(1, 12)
    feed_all(run)
    feed = Feed.from_the_start(run.folder, "tensorboard", run.folder.load_config())
    feed.open()
    while feed.turn():
        pass
    feed.close()
    found = read_back(run.folder.path / "tensorboard")
    assert curve(found, "train/loss") == single(run.curve())
    assert len(list((run.folder.path / "tensorboard").glob("events.*"))) == 1


@pytest.mark.parametrize("sent", [0, 10])
def test_a_full_disk_leaves_one_curve(sent: int, tmp_path: Path) -> None:
    """A record that was cut short hides what follows it in its file; what was not sent whole is in the next file."""
    run = Written(tmp_path / "gpt")
    run.start()
    run.steps(1, sent)
    feed = Feed(run.folder, "tensorboard")
    feed.open()
    feed.turn()
    run.steps(sent + 1, 30)
    [numbers] = (run.folder.path / "tensorboard").glob("events.*")
    with no_file_may_exceed(numbers.stat().st_size + 300), pytest.raises(OSError, match="large"):
        feed.turn()
    while feed.turn():
        pass
    run.steps(31, 35)
    feed.turn()
    feed.close()
    assert curve(read_back(run.folder.path / "tensorboard"), "train/loss") == single(run.curve())


@contextlib.contextmanager
def no_file_may_exceed(size: int) -> Iterator[None]:
    """Make writes beyond this size fail, in this process."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
