"""Failures of process groups and of launchers, as torch and shoal report them."""

from __future__ import annotations

import os
import socket
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from shoal.config.run_options import Launch
from shoal.elastic.machines import Machines
from shoal.elastic.supervise import _Launcher
from shoal.errors import LaunchError
from shoal.report.causes.cause import first_cause
from shoal.report.causes.failure import FirstCause
from shoal.report.causes.signatures import recognize
from shoal.report.causes.table import TABLE
from shoal.run.folder import RunFolder
from tests.report.causes.ranks import run_ranks

GROUP = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
rank = {rank}
dist.init_process_group("gloo", init_method="file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds={seconds}))
dist.all_reduce(torch.ones(4))
"""
REDUCE = "dist.all_reduce(torch.ones(4))\n"
ABSENT = "os.read(int(sys.argv[1]), 1)\n"  # until the other rank has given up
KILLED = "import signal; os.kill(os.getpid(), signal.SIGKILL)"
CONNECT = """
from datetime import timedelta
from torch.distributed import TCPStore
TCPStore("127.0.0.1", {port}, 1, False, timeout=timedelta(seconds=1))
"""
INTERFACE = """
import torch.distributed as dist
dist.init_process_group("gloo", init_method="file://{file}", rank=0, world_size=1)
"""


def cause_of(folder: Path, programs: Sequence[str], **environment: str) -> FirstCause:
    """Run these programs as ranks, and return the first cause."""
    run_ranks(RunFolder(folder), programs, environment={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    cause = first_cause(RunFolder(folder))
    assert cause is not None
    return cause


@pytest.mark.ci
def test_failures_of_process_groups_are_recognized(tmp_path: Path) -> None:
    with socket.socket() as bound, ThreadPoolExecutor() as pool:
        bound.bind(("127.0.0.1", 0))  # no process listens there
        pair = [GROUP.format(rank=rank, file=tmp_path / "lost-file", seconds=60) for rank in range(2)]
        lost = pool.submit(cause_of, tmp_path / "lost", [pair[0] + REDUCE, pair[1] + KILLED])
        slow = [GROUP.format(rank=rank, file=tmp_path / "slow-file", seconds=2) for rank in range(2)]
        late = pool.submit(cause_of, tmp_path / "late", [slow[0] + ABSENT, slow[1] + REDUCE])
        interface = pool.submit(
            cause_of, tmp_path / "interface", [INTERFACE.format(file=tmp_path / "file")], GLOO_SOCKET_IFNAME="eth77"
        )
        port = bound.getsockname()[1]
        rendezvous = pool.submit(cause_of, tmp_path / "rendezvous", [CONNECT.format(port=port)])
        gpu = pool.submit(cause_of, tmp_path / "gpu", ["import torch; torch.ones(1, device='cuda:7')"])
        found = lost.result()
        assert (found.first.rank, found.first.finding.signature.name) == (1, "killed")
        assert [each.finding.signature.name for each in found.followed] == ["gloo lost peer"]
        names = [each.result().first.finding.signature.name for each in (late, interface, rendezvous, gpu)]
    assert names == ["gloo timeout", "gloo interface", "rendezvous lost", "no gpu"]


def test_a_launchers_messages_are_recognized(capfd: pytest.CaptureFixture[str]) -> None:
    store = HashStore()
    store.set("machine/0", '["n0", {"optim.lr": 0.5}, true]')
    with pytest.raises(LaunchError) as differs:
        Machines(store, 1, 2).greet("n1", {"optim.lr": 0.1}, stays=False)
    launch = Launch(nodes=4, rendezvous="n0:29400")
    launcher = types.SimpleNamespace(_config=types.SimpleNamespace(launch=launch), _met=False)
    _Launcher._give_up_waiting(launcher, types.SimpleNamespace(met=False))  # type: ignore[arg-type]
    for message, name in ((str(differs.value), "nodes differ"), (capfd.readouterr().err, "nodes did not meet")):
        known = recognize(message, TABLE)
        assert known is not None
        assert known[0].name == name
        assert "?" not in known[0].sentence(known[1])
