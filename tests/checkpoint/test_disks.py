"""A full, read-only or missing disk during saves: training continues, and saving resumes when the disk is back."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.checkpoint.saved import listed, verify
from shoal.data.order.audit import audit
from tests.cli.commands import Place, clean_environment, until, wait_for
from tests.disks import small_disk

NAME = "mine"


class Disk:
    """A bind mount of a small file system at `path`, so that it can be removed and restored."""

    def __init__(self, own: Path, path: Path) -> None:
        self.path, self._own = path, own
        path.mkdir()
        self._mount("--bind", own, path)

    def fill(self) -> None:
        with (self._own / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

    def empty(self) -> None:
        (self._own / "filler").unlink()

    def make_read_only(self) -> None:
        while not self._mount("-o", "remount,bind,ro", self.path, check=False):
            """The kernel rejects the remount while a file is being written."""

    def make_writable(self) -> None:
        self._mount("-o", "remount,bind,rw", self.path)

    def take_away(self) -> None:
        """Unmount the disk, and put a file there so that no folder can be created."""
        subprocess.run(["umount", "-l", self.path], check=True)
        self.path.rmdir()
        self.path.write_text("no disk")

    def bring_back(self) -> None:
        self.path.unlink()
        self.path.mkdir()
        self._mount("--bind", self._own, self.path)

    def close(self) -> None:
        subprocess.run(["umount", "-l", self.path], check=False, capture_output=True)

    @staticmethod
    def _mount(*arguments: str | Path, check: bool = True) -> bool:
        return subprocess.run(["mount", *arguments], check=check, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "own", "30m") as own:
        disk = Disk(own, tmp_path / "disk")
        yield disk
        disk.close()


@pytest.mark.parametrize(
    ("harm", "mend", "words"),
    [
        (Disk.fill, Disk.empty, "the disk is full"),
        pytest.param(Disk.make_read_only, Disk.make_writable, "Read-only file system", marks=pytest.mark.ci),
        pytest.param(Disk.take_away, Disk.bring_back, "Not a directory|File exists|No such file", marks=pytest.mark.ci),
    ],
    ids=["full", "read-only", "gone"],
)
def test_training_goes_on_and_saves_when_the_disk_is_back(
    tmp_path: Path, disk: Disk, harm: Callable[[Disk], None], mend: Callable[[Disk], None], words: str
) -> None:
    place = Place(tmp_path)
    run = tmp_path / "runs" / NAME
    run.mkdir(parents=True)
    (disk.path / "saved").mkdir()
    (run / "checkpoints").symlink_to(disk.path / "saved")
    process = place.start(
        "train", "recipe.yaml", "--name", NAME, "--train.steps", "9000", "--train.eval_every", "0",
        "--checkpoint.keep", "1000",  # deleting a checkpoint would make room on the full disk
    )  # fmt: skip
    wait_for(process, "step   17/9000")
    harm(disk)
    said = wait_for(process, "earlier ones are kept; training continues, and the save is retried at step")
    wait_for(process, "/9000  loss")  # training continues
    mend(disk)
    failed = max(e["step"] for e in place.event_lines(NAME) if e["event"] == "save failed")
    for _ in until_saved(place, process, after=failed):
        pass
    process.send_signal(signal.SIGTERM)
    output = said + process.communicate(timeout=120)[0]
    assert process.returncode == 85, output
    assert any(word in output for word in words.split("|")), output
    assert "Traceback" not in output
    assert "crashed" not in place.events(NAME)
    for saved in listed(run / "checkpoints"):
        verify(saved.folder)
    assert f"stopped: saved at step {listed(run / 'checkpoints')[-1].step} of 9000" in output
    assert audit(run / "ledger.jsonl").passed


def until_saved(place: Place, process: subprocess.Popen[str], *, after: int) -> Iterator[str]:
    """Yield the output of a run until its events list a checkpoint after step `after`."""
    assert process.stdout is not None
    for line in process.stdout:
        if any(e["event"] == "saved" and e["step"] > after for e in place.event_lines(NAME)):
            return
        yield line
    pytest.fail("the run ended before it saved again")


def test_what_a_run_writes_of_itself_waits_for_room(tmp_path: Path, disk: Disk) -> None:
    place = Place(tmp_path)
    process = place.start(
        "train", "recipe.yaml", "--name", NAME, "--launch.runs", str(disk.path), "--train.steps", "9000", "--checkpoint.every", "0",
    )  # fmt: skip
    wait_for(process, "step   17/9000")
    disk.fill()
    wait_for(process, "cannot be written: No space left on device; writing is retried")
    said = "".join(until(process, "/9000  loss"))
    disk.empty()
    wait_for(process, "/9000  loss")
    process.send_signal(signal.SIGTERM)
    output = said + process.communicate(timeout=120)[0]
    assert process.returncode == 85, output
    (tmp_path / "runs").symlink_to(disk.path)
    steps = [step for step, _, _ in place.losses(NAME)]
    assert steps == list(range(1, len(steps) + 1))
    assert audit(disk.path / NAME / "ledger.jsonl").passed
    assert "lost" not in output


@pytest.mark.ci
def test_output_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    place = Place(tmp_path)
    command = f"{place_command()} train recipe.yaml --train.steps 6 --checkpoint.every 3 --train.eval_every 0 --name"
    full = shell(place, f"{command} full > /dev/full")
    assert (full.returncode, full.stderr) == (0, "")
    left = shell(place, f"set -o pipefail; {command} left | head -n 1")
    assert (left.returncode, left.stderr) == (0, "")
    assert left.stdout.count("\n") == 1
    for run in ("full", "left"):
        assert [step for step, _, _ in place.losses(run)] == [1, 2, 3, 4, 5, 6]
        assert place.events(run).count("crashed") == 0
    shown = shell(place, f"{place_command()} env > /dev/full")
    said = "shoal: cannot write standard output: No space left on device\n"
    assert (shown.returncode, shown.stderr) == (2, said)


def place_command() -> str:
    return f"{sys.executable} -m shoal"


def shell(place: Place, line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        cwd=place.folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
