"""The logs of ranks: nothing is lost or held up, whatever the workers print and wherever the logs are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.elastic.kernel_log import kernel_lines
from shoal.elastic.pump import Pump, job_of, new_attempt, rank_log
from shoal.run.log_lines import ERR, KERNEL, OUT, RUN, read_stamp, stamp
from tests.disks import small_disk

JOB = {"SLURM_JOB_ID": "42", "SLURM_RESTART_COUNT": "3"}


@contextmanager
def pumped(folder: Path, logs: Path, ranks: dict[int, int], program: str) -> Iterator[list[tuple[str, str]]]:
    """Run a program as each of these ranks (local rank -> rank), and yield what was shown when all have ended."""
    shown: list[tuple[str, str]] = []
    pump = Pump(logs, folder, ranks, lambda line, stream: shown.append((stream, line)))
    started = {}
    for local in ranks:
        with open(pump.path(local, OUT), "w") as out, open(pump.path(local, ERR), "w") as err:
            started[local] = subprocess.Popen([sys.executable, "-c", program, str(local)], stdout=out, stderr=err)
    pump.start({local: process.pid for local, process in started.items()}, 8)
    for process in started.values():
        assert process.wait(timeout=60) == 0
    pump.settle()
    pump.close()
    yield shown


def lines(path: Path) -> list[tuple[str, str]]:
    """Return (mark, text) of a log's lines, which must all have a time."""
    found = [read_stamp(line) for line in path.read_text("utf-8").splitlines()]
    assert None not in found
    return [(each.mark, each.text) for each in found if each is not None]


def test_each_rank_has_a_log_and_the_first_is_shown(tmp_path: Path) -> None:
    program = "import sys; print('hello'); print('careful', file=sys.stderr)"
    with pumped(tmp_path, tmp_path / "logs", {0: 0, 1: 5}, program) as shown:
        assert sorted(shown) == [(ERR, "careful"), (ERR, "rank 5: careful"), (OUT, "hello")]
    for rank in (0, 5):
        first, *rest = lines(rank_log(tmp_path / "logs", rank))
        assert re.fullmatch(rf"rank {rank} of 8 on \S+, process \d+", first[1])
        assert sorted(rest) == [(ERR, "careful"), (OUT, "hello")]


def test_output_that_is_no_text_is_kept(tmp_path: Path) -> None:
    program = r"import os; os.write(1, b'\xff\x00\xe9\n\n' + b'no line feed')"
    with pumped(tmp_path, tmp_path, {0: 0}, program) as shown:
        assert shown[0][1] == "\ufffd\x00\ufffd"
    assert rank_log(tmp_path, 0).read_bytes().splitlines()[1].endswith(b" out \xff\x00\xe9")


def test_megabytes_are_copied_whole(tmp_path: Path) -> None:
    program = "for n in range(60_000): print(n, 'x' * 50)"
    with pumped(tmp_path, tmp_path, {0: 1}, program):
        assert [text.split()[0] for _, text in lines(rank_log(tmp_path, 1))[1:]] == [str(n) for n in range(60_000)]


def test_workers_do_not_wait_for_a_disk_that_is_full(tmp_path: Path) -> None:
    program = "import sys\nfor n in range(9000): print(n, 'x' * 90)"
    with small_disk(tmp_path / "disk", "100k") as disk, pumped(tmp_path, disk, {0: 0}, program) as shown:
        assert len(shown) == 9000  # shown, though its log lost most of them
        assert 0 < rank_log(disk, 0).stat().st_size <= 100 << 10


def test_a_log_that_could_not_be_written_says_how_much_it_lost(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.write_text("a file where the folder should be")
    pump = Pump(logs, tmp_path, {0: 0}, lambda line, stream: None)
    pump.note(0, "one")
    pump.note(0, "two")
    logs.unlink()
    pump.note(0, "three")
    assert lines(rank_log(logs, 0)) == [(RUN, "2 lines could not be written"), (RUN, "three")]


def test_a_child_that_outlives_its_worker_keeps_its_output(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    program = f"import os\nif os.fork() == 0: open('{gate}').read(); print('late', flush=True)\nos._exit(0)"
    program = program.replace("os._exit(0)", "else: print('early', flush=True)\nos._exit(0)")
    arrived = threading.Event()
    pump = Pump(tmp_path, tmp_path, {0: 0}, lambda line, stream: arrived.set() if line == "late" else None)
    with open(pump.path(0, OUT), "w") as out, open(pump.path(0, ERR), "w") as err:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=out, stderr=err)
    pump.start({0: process.pid}, 1)
    assert process.wait(timeout=60) == 0
    pump.settle()
    gate.write_text("go")
    assert arrived.wait(60)


def test_attempts_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    assert job_of() is None
    names = [new_attempt(tmp_path / "logs") for _ in range(5)]
    assert len(set(names)) == 5
    assert {path.name for path in (tmp_path / "logs").iterdir()} == set(names)
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    assert re.fullmatch(r"42-3-\d{8}T\d{6}Z", new_attempt(tmp_path / "logs"))
    (tmp_path / "file").write_text("")
    assert new_attempt(tmp_path / "file").startswith("42-3-")  # a start must not fail for its logs


def test_stamps_are_read_back() -> None:
    for seconds in (0.0, 951782400.5, 1_790_000_000.123, 4_102_444_799.999):
        line = read_stamp(stamp(seconds, KERNEL) + "text out of it")
        assert line is not None
        assert (line.mark, line.text) == (KERNEL, "text out of it")
        assert line.time == pytest.approx(seconds, abs=0.00101)
    for other in ("", "2026-11-29", "2026-13-29T10:15:00.123Z out x", "2026-11-29T10:15:00Z other x"):
        assert read_stamp(other) is None


def test_the_kernels_telling_lines_are_kept(tmp_path: Path) -> None:
    device = tmp_path / "kmsg"
    device.write_text(
        "6,1,1000000,-;usb 1-1: new device\n SUBSYSTEM=usb\n"
        "4,2,2000000,-;NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus\n"
        "3,3,9000000000000000,c;Out of memory: Killed process 7 (python)\nnot a record\n",
        encoding="utf-8",
    )
    found = kernel_lines(0.0, device)
    assert [text for _, text in found] == [
        "NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus", "Out of memory: Killed process 7 (python)",
    ]  # fmt: skip
    assert found[1][0] - found[0][0] == pytest.approx(9e9 - 2)
    assert [text for _, text in kernel_lines(found[1][0] - 1, device)] == [found[1][1]]
    assert kernel_lines(0.0, tmp_path / "none") == []
