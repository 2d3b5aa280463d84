"""Each signature of the table, on a process that really fails, or else on lines from published reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.report.causes.cause import first_cause
from shoal.report.causes.signatures import recognize
from shoal.report.causes.table import TABLE
from shoal.run.folder import RunFolder
from tests.disks import small_disk
from tests.report.causes.ranks import FOLLOWER, run_ranks

_LIMIT = "import resource; resource.setrlimit(resource.{}, ({}, {}))\n"
_THROW = "import ctypes; ctypes.CDLL('libstdc++.so.6')._ZSt21__throw_runtime_errorPKc(b'it failed')"

# Programs that fail. A word in capitals is replaced: FOLDER by the test's folder.
SEEN: dict[str, str] = {
    "port in use": "import socket\na, b = socket.socket(), socket.socket()\na.bind(('127.0.0.1', 0)); a.listen()\nb.bind(a.getsockname())",
    "name resolution": "import socket; socket.getaddrinfo('node9.invalid', 29400)",
    "connection refused": "import socket\na = socket.socket(); a.bind(('127.0.0.1', 0))\nsocket.create_connection(a.getsockname())",
    "host out of memory": _LIMIT.format("RLIMIT_AS", 1 << 30, 1 << 30) + "bytearray(1 << 34)",
    "disk full": "with open('/dev/full', 'w') as file: file.write('x')",
    "open files": _LIMIT.format("RLIMIT_NOFILE", 20, 20) + "files = [open('/dev/null') for _ in range(20)]",
    "import": "import a_module_that_is_not_installed",
    "library": "import ctypes; ctypes.CDLL('libnot_installed.so.1')",
    "program not found": "import os; os.execvp('bash', ['bash', '-c', 'a_program_that_does_not_exist'])",
    "missing file": "open('FOLDER/gone')",
    "not permitted": "import os\nopen('FOLDER/mine', 'w').close(); os.chmod('FOLDER/mine', 0)\nos.getuid() or os.seteuid(65534)\nopen('FOLDER/mine')",
    "interrupted": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "segmentation fault": "import ctypes; ctypes.string_at(0)",
    "bus error": (
        "import mmap, os\nfile = open('FOLDER/mapped', 'w+b'); file.truncate(1 << 16)\nview = mmap.mmap(file.fileno(), 1 << 16)\n"
        "os.truncate('FOLDER/mapped', 0)\nview[1 << 15]"
    ),
    "illegal instruction": "import os, signal; os.kill(os.getpid(), signal.SIGILL)",
    "arithmetic": "import os, signal; os.kill(os.getpid(), signal.SIGFPE)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "c++ exception": _LIMIT.format("RLIMIT_CORE", 0, 0) + _THROW,
    "aborted": _LIMIT.format("RLIMIT_CORE", 0, 0) + "import os; os.abort()",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "exit code": "raise SystemExit(5)",
    "python exception": "def deep(): raise ValueError('not a good value')\ndeep()",
}  # fmt: skip

# Lines of published reports, for what cannot fail here.
PUBLISHED: dict[str, list[str]] = {
    "slurm out of memory": [
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=14604003.0 cgroup. Some of your processes may have been killed by the cgroup out-of-memory handler.",
        "slurmstepd: error: Detected 1 oom_kill event in StepId=331.batch. Some of the step tasks have been OOM Killed.",
        "srun: error: o0616: task 0: Out Of Memory",
        "slurmstepd: error: Exceeded step memory limit at some point.",
    ],
    "preempted": ["slurmstepd: error: *** JOB 913 ON n7 CANCELLED AT 2024-04-20T09:09:37 DUE TO PREEMPTION ***"],
    "gpu off the bus": [
        "NVRM: Xid (PCI:0000:44:00): 79, GPU has fallen off the bus",
        "NVRM: fallen off the bus and is not responding to commands.",
    ],
    "gpu error": [
        "NVRM: Xid (PCI:0000:3b:00): 48, pid=8911, name=python, Double Bit ECC Error",
        "[ 1843.3] NVRM: Xid (PCI:0000:9b:00): 31, pid=1, Ch 00000008, intr 00000000. MMU Fault: ENGINE GRAPHICS",
    ],
    "hardware error": ["mce: [Hardware Error]: Machine check events logged: Uncorrected error"],
    "disk error": [
        "I/O error, dev nvme0n1, sector 2048 op 0x0:(READ) flags 0x80700 phys_seg 1 prio class 2",
        "EXT4-fs error (device sda1): ext4_find_entry:1455: inode #2: comm python: reading directory lblock 0",
        "nfs: server filer3 not responding, still trying",
    ],
    "gpu out of memory": [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.02 GiB is free.",
        "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "shoal: out of memory: Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB. To use less memory: train.micro_batch 4",
    ],
    "gpu memory error": ["RuntimeError: CUDA error: uncorrectable ECC error encountered"],
    "index out of range on the gpu": [
        "RuntimeError: CUDA error: device-side assert triggered",
        "../aten/src/ATen/native/cuda/Indexing.cu:1236: indexSelectSmallIndex: block: [0,0,0], thread: [1,0,0] Assertion `srcIndex < srcSelectDimSize` failed.",
    ],
    "illegal gpu access": ["RuntimeError: CUDA error: an illegal memory access was encountered"],
    "gpu library": ["RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"],
    "cuda error": ["RuntimeError: CUDA error: unspecified launch failure"],
    "nccl timeout": [
        "[rank7]:[E816 01:45:40.183009389 ProcessGroupNCCL.cpp:607] [Rank 7] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=80078, OpType=BROADCAST, NumelIn=5056, NumelOut=5056, Timeout(ms)=600000) ran for 600026 milliseconds before timing out.",
        "[rank1]:[E626 06:24:44.906457629 ProcessGroupNCCL.cpp:1785] [PG ID 0 PG GUID 0(default_pg) Rank 1] Exception (either an error or timeout) detected by watchdog at work: 808, last enqueued NCCL work: 811, last completed NCCL work: 807.",
        "[E ProcessGroupNCCL.cpp:737] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=469508, OpType=ALLREDUCE, Timeout(ms)=1800000) ran for 1802212 milliseconds before timing out.",
    ],
    "nccl watchdog": [
        "[rank4]:[E1016 03:31:38.929246900 ProcessGroupNCCL.cpp:627] [Rank 4] To avoid data inconsistency, we are taking the entire process down.",
    ],
    "two ranks on one gpu": ["Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"],
    "nccl interface": ["dgx1:18:18 [0] bootstrap.cc:45 NCCL WARN Bootstrap : no socket interface found"],
    "infiniband": [
        "kolyoz2:25146:25854 [0] ib_plugin.c:1105 NCCL WARN NET/IB : Got completion from peer 10.0.35.1<49189> with error 4, opcode 5327, len 5327, vendor err 81 (Send)",
        "NET/IB : Got completion from peer 172.21.17.89<38536> with error 5, opcode 48, len 32710, vendor err 249",
    ],
    "nccl connection": [
        "ubuntu:39964:40075 [0] misc/socket.cc:483 NCCL WARN socketStartConnect: Connect to 10.0.0.2<45763> failed : Software caused connection abort",
    ],
    "nccl lost peer": [
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
        "torch.distributed.DistBackendError: NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a network error, NCCL version 2.21.5",
        "a100-22:183006:183220 [1] misc/socket.cc:518 NCCL WARN Net : Call to recv from 10.200.84.247<58355> failed : Broken pipe",
    ],
    "nccl error": ["ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error."],
    "quota": ["OSError: [Errno 122] Disk quota exceeded: 'runs/a/checkpoints/step-00000010'"],
    "shared disk": ["OSError: [Errno 116] Stale file handle: '/shared/runs/a/events.jsonl'"],
    "io error": ["OSError: [Errno 5] Input/output error"],
    "processes": ["RuntimeError: can't start new thread", "bash: fork: retry: Resource temporarily unavailable"],
}  # fmt: skip

# Signatures that other tests produce, with real launchers, process groups, control groups or Slurm.
ELSEWHERE = {
    "read-only disk", "shared memory", "no gpu", "gloo timeout", "gloo lost peer", "gloo interface", "rendezvous lost",
    "nodes differ", "nodes did not meet", "lost peer", "kernel out of memory", "no route", "time limit", "cancelled", "node failure",
    "requeued",
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_a_real_failure_is_recognized_before_what_follows(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    codes = run_ranks(folder, [FOLLOWER, SEEN[name].replace("FOLDER", str(tmp_path))])
    cause = first_cause(folder)
    assert codes[1] not in (0, 85)
    assert cause is not None
    assert (cause.first.rank, cause.first.finding.signature.name) == (1, name), cause.lines()
    assert [each.rank for each in cause.followed] == [0]
    assert cause.first.finding.path.name == "rank-1.log"


def test_a_read_only_disk_is_recognized(tmp_path: Path) -> None:
    import subprocess

    with small_disk(tmp_path / "disk", "100k") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        folder = RunFolder(tmp_path / "run")
        run_ranks(folder, [FOLLOWER, f"open('{disk}/new', 'w')"])
    cause = first_cause(folder)
    assert cause is not None
    assert (cause.first.rank, cause.first.finding.signature.name) == (1, "read-only disk")


@pytest.mark.parametrize(("name", "line"), [(name, line) for name, lines in PUBLISHED.items() for line in lines])
def test_a_published_line_is_recognized(name: str, line: str) -> None:
    known = recognize(line, TABLE)
    assert known is not None
    assert known[0].name == name
    assert "{" not in known[0].sentence(known[1])
    assert "?" not in known[0].sentence(known[1])


def test_each_signature_is_tested_and_marked_by_how() -> None:
    names = [each.name for each in TABLE]
    assert len(set(names)) == len(names)
    assert {each.name for each in TABLE if each.seen} == {*SEEN, *ELSEWHERE} - {"python exception"}
    assert {each.name for each in TABLE if not each.seen} == set(PUBLISHED)
    assert not ELSEWHERE & SEEN.keys()
