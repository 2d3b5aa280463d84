"""How the launcher judges real workers that die: which died first, and whether to restart."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from shoal.elastic import agent
from shoal.elastic.agent import Agent
from shoal.elastic.machines import Machines
from shoal.errors import EXIT_LOST_PEER

ABORT, KILLED = -6, -9

# Rank 0 reads a pipe until its only writer, rank 1, is gone. Then it aborts, as NCCL's watchdog would.
FOLLOWING = """
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if os.environ["RANK"] == "1":
    os.open(sys.argv[1], os.O_WRONLY)
    os.kill(os.getpid(), signal.SIGKILL)
open(sys.argv[1]).read()
os.abort()
"""


def test_who_aborts_after_a_peer_was_killed_is_not_the_one_that_crashed(
    launched: Callable[[str], tuple[int, list[dict[str, Any]]]],
) -> None:
    code, events = launched(FOLLOWING)
    [crash] = [e for e in events if e["event"] == "crashed"]
    assert code == 1
    assert crash["rank"] == 1
    assert "SIGKILL" in crash["how"]


def test_who_aborts_alone_crashed(launched: Callable[[str], tuple[int, list[dict[str, Any]]]]) -> None:
    code, events = launched(f"import os; os.abort() if os.environ['RANK'] == '1' else os._exit({EXIT_LOST_PEER})")
    [crash] = [e for e in events if e["event"] == "crashed"]
    assert code == 1
    assert crash["rank"] == 1
    assert "SIGABRT" in crash["how"]


def test_a_worker_that_the_kernel_ended_for_memory_is_not_started_again(
    launched: Callable[[str], tuple[int, list[dict[str, Any]]]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    kills = iter([0, *[1] * 9])  # the kernel's out-of-memory kills: 0 when the workers start, then 1
    monkeypatch.setattr(agent, "kernel_kills", lambda: next(kills))
    code, events = launched(FOLLOWING)
    assert code == 2
    assert [e["event"] for e in events] == ["crashed"]
    said = capfd.readouterr().err
    for option in ("train.micro_batch 2", "train.activation_checkpointing full", "parallel.dp_shard 2"):
        assert said.count(option) == 1


def followed(store: HashStore, codes: set[int], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether one of two launchers blames the other node if its own workers had these exit codes."""
    monkeypatch.setattr(agent, "CAUSE_SECONDS", 0.05)
    here = types.SimpleNamespace(_machines=Machines(store, 0, 2))
    return Agent._followed_another_machine(here, codes)  # type: ignore[arg-type]


def test_an_abort_is_laid_to_another_machine_only_where_one_said_that_it_crashed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = HashStore()
    assert followed(store, {EXIT_LOST_PEER}, monkeypatch)
    assert not followed(store, {ABORT}, monkeypatch)  # this call announces a crash, which the next ones find
    assert followed(store, {ABORT}, monkeypatch)
    assert followed(store, {ABORT, EXIT_LOST_PEER}, monkeypatch)
    assert not followed(store, {KILLED, EXIT_LOST_PEER}, monkeypatch)
