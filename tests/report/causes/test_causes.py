"""Who failed first: logs of several ranks and nodes, with failures that followed and others that only look like a cause."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from shoal.report.causes.cause import first_cause
from shoal.report.causes.failure import CAUSE, FirstCause
from shoal.run.folder import RunFolder
from shoal.run.log_lines import ENDED, ERR, OUT, RUN, STOPPED
from tests.report.causes.made import BEGAN, KILL, LOST, Made
from tests.report.causes.ranks import FOLLOWER, run_ranks


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "run")


def named(cause: FirstCause) -> tuple[int | None, str | None, str]:
    return cause.first.rank, cause.first.host, cause.first.finding.signature.name


def slurm_time(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(BEGAN + at))


def test_a_process_that_lost_its_peer_is_not_first_though_its_clock_is_behind(made: Made) -> None:
    made.rank(0, "n0", (8.0, ERR, LOST), (8.1, RUN, ENDED + "ended with code 3"))
    made.rank(1, "n1", (9.0, ERR, "Traceback (most recent call last):"), (9.0, ERR, '  File "/x/loss.py", line 12, in loss'),
              (9.0, ERR, "    raise ValueError(1)"), (9.0, ERR, "ValueError: labels beyond the vocabulary"),
              (9.2, RUN, ENDED + "ended with code 1"))  # fmt: skip
    made.rank(2, "n1", (9.3, RUN, ENDED + STOPPED))
    cause = made.cause()
    assert named(cause) == (1, "n1", "python exception")
    assert cause.first.finding.frame == "/x/loss.py:12 in loss"
    assert [(each.rank, each.finding.signature.name) for each in cause.followed] == [(0, "gloo lost peer")]
    text = "\n".join(cause.lines())
    assert text.startswith("first cause: rank 1 on n1 raised ValueError: labels beyond the vocabulary")
    assert "rank-1.log:5: ValueError: labels beyond the vocabulary" in text
    assert "followed: rank 0 on n0 lost the connection to another process" in text


def test_the_first_of_chained_exceptions_counts(made: Made) -> None:
    lines = [
        "Traceback (most recent call last):", '  File "/x/a.py", line 1, in read', "KeyError: 'tokens'", "",
        "During handling of the above exception, another exception occurred:", "",
        "Traceback (most recent call last):", '  File "/x/b.py", line 2, in main', "RuntimeError: cannot read",
    ]  # fmt: skip
    made.rank(0, "n0", *((5.0, ERR, line) for line in lines), (5.2, RUN, ENDED + "ended with code 1"))
    assert made.cause().first.finding.what == "raised KeyError: 'tokens'"


def test_an_error_that_a_process_survived_is_not_the_cause(made: Made) -> None:
    made.rank(0, "n0", (1.0, ERR, "OSError: [Errno 28] No space left on device"), (400.0, OUT, "step  40/400  loss 2.1"),
              (400.0, ERR, LOST), (400.2, RUN, ENDED + "ended with code 3"))  # fmt: skip
    made.rank(1, "n1", (400.1, RUN, ENDED + "was killed by SIGSEGV"))
    assert named(made.cause()) == (1, "n1", "segmentation fault")


def test_the_kernel_explains_a_killed_process(made: Made) -> None:
    made.rank(0, "n0", (8.0, ERR, LOST), (8.1, RUN, ENDED + "ended with code 3"))
    made.rank(1, "n1", (8.0, RUN, KILL))
    made.kernel("n1", (7.9, "Memory cgroup out of memory: Killed process 101 (python) total-vm:9kB, anon-rss:8kB"))
    cause = made.cause()
    assert named(cause) == (1, "n1", "kernel out of memory")
    assert "--mem" in "\n".join(cause.lines())


def test_memory_that_ran_out_on_another_node_explains_nothing(made: Made) -> None:
    made.rank(0, "n0", (8.0, RUN, ENDED + "ended with code 3"))
    made.rank(1, "n1", (8.0, RUN, KILL))
    made.kernel("n0", (7.9, "Out of memory: Killed process 7 (java) total-vm:9kB"))
    assert named(made.cause()) == (1, "n1", "killed")


def test_the_launchers_event_explains_a_killed_process(made: Made) -> None:
    began = time.time() - BEGAN
    made.rank(0, "n0", (began, RUN, ENDED + "ended with code 3"), began=began)
    made.rank(1, "n1", (began, RUN, KILL), began=began)
    made.event("crashed", rank=1, how="was killed by the kernel (out of memory)", step=7, phase="forward")
    cause = made.cause()
    assert named(cause) == (1, "n1", "kernel out of memory")
    assert cause.first.where == "in forward of step 7"


def test_a_gpu_that_fell_off_the_bus_is_found_before_the_time_outs_that_it_causes(made: Made) -> None:
    waited = "[Rank {}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=80, OpType=ALLREDUCE)"
    for rank, host in enumerate(["n0", "n0", "n1", "n1"]):
        made.rank(rank, host, (700.0 + rank, ERR, waited.format(rank)), (705.0, RUN, ENDED + "was killed by SIGABRT"))
    made.kernel("n1", (95.0, "NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus"))
    cause = made.cause()
    assert named(cause) == (None, "n1", "gpu off the bus")
    assert len(cause.followed) == 4


def test_the_rank_that_queued_fewer_collectives_is_named(made: Made) -> None:
    line = "[PG ID 0 Rank {}] Exception detected by watchdog at work: 808, last enqueued NCCL work: {}, last completed NCCL work: 807."
    for rank in range(4):
        made.rank(rank, f"n{rank // 2}", (600.0, ERR, line.format(rank, 807 if rank == 2 else 811)),
                  (601.0, RUN, ENDED + "was killed by SIGABRT"))  # fmt: skip
    cause = made.cause()
    assert named(cause) == (2, "n1", "absent")
    assert "it had queued 807 of them, others 811" in cause.lines()[0]
    assert [each.rank for each in cause.followed] == [0, 1, 3]


def test_the_rank_that_did_not_time_out_is_the_one_others_waited_for(made: Made) -> None:
    line = "RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30000ms for recv operation to complete"
    for rank in (0, 1, 3):
        made.rank(rank, "n0", (60.0, ERR, line), (60.1, RUN, ENDED + "ended with code 3"))
    made.rank(2, "n1", (60.2, RUN, ENDED + STOPPED))
    assert named(made.cause()) == (2, "n1", "absent")


def test_a_hang_that_the_launcher_found_is_the_cause(made: Made) -> None:
    now = time.time() - BEGAN
    for rank in range(2):
        made.rank(rank, f"n{rank}", (now, RUN, ENDED + STOPPED), began=now - 60)
    why = "rank 1 did not join: stopped (SIGSTOP) in forward of step 7, 20 s ago; stacks in x.txt"
    made.event("hang", rank=1, step=7, phase="forward", why=why)
    cause = made.cause()
    assert named(cause) == (1, "n1", "hang")
    assert cause.lines()[0].startswith(f"first cause: rank 1 on n1 {why.removeprefix('rank 1 ')}")


def test_a_node_whose_logs_just_end_is_named(made: Made) -> None:
    for rank in (0, 1):
        made.rank(rank, "n0", (9.0, ERR, LOST), (9.5, RUN, ENDED + "ended with code 3"))
    for rank in (2, 3):
        made.rank(rank, "n1", (8.0, OUT, "working"))
    cause = made.cause()
    assert named(cause) == (None, "n1", "silent node")
    assert {each.rank for each in cause.followed} == {0, 1}


def test_slurm_explains_a_silent_node(made: Made) -> None:
    attempt = "42-0-20260921T140000Z"
    made.rank(0, "n0", (9.0, ERR, LOST), (9.5, RUN, ENDED + "ended with code 3"), attempt=attempt)
    made.rank(1, "n1", (8.0, OUT, "working"), attempt=attempt)
    log = made.job(
        "42-0.log",
        f"slurmstepd: error: *** JOB 42 ON n1 CANCELLED AT {slurm_time(30)} DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***",
    )
    cause = made.cause(log)
    assert named(cause) == (None, "n1", "node failure")
    assert [each.rank for each in cause.followed] == [0]


def test_a_step_that_srun_cancelled_because_a_process_failed_is_not_the_cause(made: Made) -> None:
    attempt = "42-0-20260921T140000Z"
    made.rank(0, "n0", (9.2, RUN, KILL), attempt=attempt)
    made.rank(1, "n1", (9.6, RUN, ENDED + STOPPED), attempt=attempt)
    log = made.job("42-0.log", f"slurmstepd: error: *** STEP 42.0 ON n0 CANCELLED AT {slurm_time(10)} ***")
    assert named(made.cause(log)) == (0, "n0", "killed")


@pytest.mark.parametrize(("words", "name"), [("DUE TO TIME LIMIT", "time limit"), ("DUE TO PREEMPTION", "preempted")])
def test_slurm_ended_the_job(made: Made, words: str, name: str) -> None:
    attempt = "42-1-20260921T140000Z"
    made.rank(0, "n0", (9.0, OUT, "step 3/9"), attempt=attempt)
    log = made.job(
        "42.log",
        f"slurmstepd: error: *** JOB 42 ON n9 CANCELLED AT {slurm_time(-3600)} DUE TO NODE FAILURE ***",  # an earlier start
        f"slurmstepd: error: *** JOB 42 ON n0 CANCELLED AT {slurm_time(60)} {words} ***",
    )
    cause = made.cause(log)
    assert cause.first.finding.signature.name == name
    assert not cause.also


def test_a_job_that_was_asked_to_stop_has_not_failed(made: Made) -> None:
    attempt = "42-0-20260921T140000Z"
    made.rank(0, "n0", (9.0, RUN, ENDED + "ended with code 85"), attempt=attempt)
    log = made.job("42.log", f"slurmstepd: error: *** JOB 42 ON n0 CANCELLED AT {slurm_time(9)} DUE TO JOB REQUEUE ***")
    assert first_cause(made.folder, log) is None


def test_lines_of_a_jobs_earlier_start_are_skipped(made: Made) -> None:
    made.rank(0, "n0", (9.0, RUN, KILL), attempt="42-1-20260921T140000Z")
    oom = "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=42.0 cgroup."
    requeued = f"slurmstepd: error: *** JOB 42 ON n0 CANCELLED AT {slurm_time(-60)} DUE TO JOB REQUEUE ***"
    log = made.job("42.log", oom, requeued, "preparing")
    assert named(made.cause(log)) == (0, "n0", "killed")
    made.job("42.log", requeued, oom)
    assert named(made.cause(log)) == (0, "n0", "slurm out of memory")


def test_the_same_failure_of_all_ranks_is_counted(made: Made) -> None:
    for rank in range(3):
        made.rank(rank, "n0", (9.0, RUN, "reported: no such corpus"), (9.0, RUN, ENDED + "ended with code 2"))
    assert "also failed: 2 others in the same way" in made.cause().lines()


def test_a_job_that_failed_before_a_worker_started(made: Made) -> None:
    log = made.job(
        "43-0.log",
        "/var/spool/job43/slurm_script: line 9: shoal: command not found",
        "srun: error: n0: task 0: Exited with exit code 127",
    )
    cause = made.cause(log)
    assert cause.first.finding.signature.name == "program not found"
    made.rank(0, "n0", (9.0, RUN, KILL))  # of a start without Slurm, later
    assert made.cause(log).first.finding.signature.name == "program not found"
    assert made.cause().first.finding.signature.name == "killed"


def test_the_message_of_a_launcher_is_the_cause_if_there_is_no_other(made: Made) -> None:
    log = made.job("43-0.log", "preparing: tokens 100%", "shoal: train.micro_batch 3 does not divide 8")
    assert made.cause(log).first.finding.what == "reported: train.micro_batch 3 does not divide 8"


def test_attempts_that_failed_the_same_way_are_counted(made: Made) -> None:
    for again, wrong in enumerate(["KeyError: 'a'", "ValueError: b", "ValueError: b"]):
        at = 100.0 * again
        made.rank(1, "n1", (at + 9, ERR, "Traceback (most recent call last):"), (at + 9, ERR, wrong), (at + 9, RUN, ENDED + "ended with code 1"),
                  attempt=f"42-0-20260921T140{again}00Z", began=at)  # fmt: skip
    cause = made.cause()
    assert cause.attempt == "42-0-20260921T140200Z"
    assert cause.same_before == 2  # both are Python exceptions of this rank


def test_a_run_without_logs_is_explained_by_its_events(made: Made) -> None:
    made.event("started", step=0)
    made.event("crashed", rank=1, how="was killed by SIGKILL", step=7, phase="forward")
    cause = made.cause()
    assert named(cause) == (1, None, "killed")
    assert str(cause.first).endswith("in forward of step 7")
    made.event("started", step=5)
    assert first_cause(made.folder) is None


def test_a_finished_run_has_no_cause(made: Made) -> None:
    made.rank(
        0,
        "n0",
        (9.0, ERR, "UserWarning: Permission denied, so a cache is not used"),
        (9.1, RUN, ENDED + "ended with code 0"),
    )
    made.rank(1, "n1", (9.1, RUN, ENDED + "ended with code 0"))
    assert first_cause(made.folder) is None
    assert first_cause(RunFolder(made.folder.path / "none")) is None


def test_logs_may_be_damaged(made: Made) -> None:
    logs = made.folder.logs / "20260921T140000Z"
    logs.mkdir(parents=True)
    (logs / "rank-0.log").write_bytes(b"\xff\xfe\x00 no format\n2026-99-99T99:99:99Z out x\n")
    (logs / "rank-1.log").write_bytes(b"")
    (logs / "rank-2.log").mkdir()
    (made.folder.logs / "something else").mkdir()
    made.folder.events_file.write_bytes(b'{"event": "crashed"}\n[1]\nnot json\n')
    assert first_cause(made.folder) is None
    made.rank(3, "n1", (8.0, RUN, KILL))
    assert named(made.cause())[0] == 3


def test_a_large_log_is_read_from_its_end(made: Made) -> None:
    lines = [(float(n // 1000), OUT, "x" * 90) for n in range(20_000)]
    made.rank(0, "n0", *lines, (25.0, RUN, KILL))
    cause = made.cause()
    assert named(cause) == (0, "n0", "killed")
    assert cause.first.finding.number is None


def test_json_has_the_same_facts(made: Made) -> None:
    made.rank(0, "n0", (8.0, ERR, LOST), (8.1, RUN, ENDED + "ended with code 3"))
    made.rank(1, "n1", (8.0, RUN, KILL))
    found = json.loads(json.dumps(made.cause().as_json()))
    assert (found["first"]["rank"], found["first"]["kind"], found["first"]["time"]) == (1, "killed", BEGAN + 8)
    assert [each["rank"] for each in found["followed"]] == [0]


def test_many_failures_are_counted_not_listed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    run_ranks(folder, [*[FOLLOWER] * 6, "raise SystemExit(9)"])
    cause = first_cause(folder)
    assert cause is not None
    assert cause.first.weight != CAUSE  # an exit code says little, but more than those who lost it
    assert named(cause)[::2] == (6, "exit code")
    followed = [line for line in cause.lines() if line.startswith("followed")]
    assert len(followed) == 5
    assert followed[-1] == "followed: 2 more"


def _texts(folder: RunFolder, rank: int) -> Sequence[str]:
    [log] = folder.logs.glob(f"*/rank-{rank}.log")
    return log.read_text("utf-8").splitlines()


def test_a_log_has_all_lines_with_times_and_marks(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    run_ranks(
        folder,
        ["import os, sys\nprint('one'); sys.stdout.flush()\nos.write(2, b'two\\nno end'); os.write(1, b'x' * 200_000)"],
    )
    lines = _texts(folder, 0)
    assert lines[0][25:].startswith(f"{RUN} rank 0 of 1 on ")
    assert {(line[25:28], line[29:]) for line in lines[1:] if "xx" not in line} == {
        (OUT, "one"), (ERR, "two"), (ERR, "no end"), (RUN, "ended: ended with code 0"),
    }  # fmt: skip
    assert sum(line.count("x") for line in lines if line[25:28] == OUT) == 200_000
    assert lines == sorted(lines, key=lambda line: line[:24])
