"""Several launchers of one run, as on several nodes: they meet, lose one, gain one, and end together."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from shoal.checkpoint.saved import listed
from shoal.config.options import Config
from shoal.data.order.audit import audit
from shoal.elastic.agreement import shared_settings
from shoal.elastic.heartbeat import Sign
from shoal.elastic.machines import Machines
from shoal.elastic.watch import RankStatus
from shoal.errors import EXIT_BAD_INPUT, EXIT_REQUEUE, LaunchError, RunError
from shoal.run.events import read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.starts import Starts
from tests import warm
from tests.cli.commands import clean_environment
from tests.digests import weights

RECIPE = """
model: {dim: 32, num_layers: 2, num_heads: 2, max_seq_len: 32}
data: {corpus: dummy, dummy_documents: 60, tokenizer: bytes, seq_len: 32}
optim: {lr: 1e-2, warmup_steps: 2, schedule: constant}
train: {steps: 100000, global_batch: 24, micro_batch: 2, dtype: float32, device: cpu, repro: bitwise, eval_every: 0}
checkpoint: {every: 5, keep: 3}
metrics: {peak_tflops: 1, report: false}
launch: {hang_seconds: 6, timeout_seconds: 60, threads: 1, processes: 1, join_seconds: 1}
"""
LIMIT_SECONDS = 120.0  # time limit of every wait


class Site:
    """A folder that several launchers share, and their rendezvous address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._open: list[subprocess.Popen[str]] = []

    def start(self, name: str, *options: str, meets: bool = True) -> subprocess.Popen[str]:
        """Start a launcher that prints to NAME.log."""
        command = warm.shoal("train", "recipe.yaml", "--name", "run", *options)
        command += [f"--launch.rendezvous={self.address}"] if meets else []
        with self.log(name).open("w", encoding="utf-8") as log:
            process = warm.Popen(
                command, cwd=self.folder, env=clean_environment(), stdout=log, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip
        self._open.append(process)
        return process

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "runs" / "run")

    def steps(self) -> int:
        return self.run.last_step()

    def saved(self) -> int:
        found = listed(self.run.checkpoints)
        return found[-1].step if found else 0

    def await_round(self, processes: int, after: int) -> None:
        """Wait until `processes` workers take steps in a round that began after `after` earlier rounds."""
        until(lambda: [e["processes"] for e in self.events("machines")[after:]][-1:] == [processes], self)
        begun = len(self.events("machines"))
        met = self.events("machines")[-1]["time"]
        until(lambda: any(e["time"] > met for e in self.events("started")), self)
        step = self.steps()
        until(lambda: self.steps() > step, self)
        assert len(self.events("machines")) == begun

    def rounds(self) -> int:
        return len(self.events("machines"))

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in read_json_lines(self.run.events_file) if e["event"] == name]

    def close(self) -> None:
        for process in self._open:
            if process.poll() is None:
                lose(process)
        for place in meeting_places(self):
            place.kill()


def until(true: Callable[[], bool], site: Site) -> None:
    """Wait until `true()`; on timeout fail with the output of all launchers."""
    end = time.monotonic() + LIMIT_SECONDS
    while not true():
        if time.monotonic() > end:
            pytest.fail("\n".join(f"{p.name}\n{p.read_text()}" for p in sorted(site.folder.glob("*.log"))))
        time.sleep(0.05)


def workers(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    return [p for p in psutil.Process(launcher.pid).children() if p.name() != warm.NAME]


def meeting_places(site: Site) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if p.pid != os.getpid() and _is_place(p, site.address)]


def _is_place(process: psutil.Process, address: str) -> bool:
    try:
        return "rendezvous" in process.cmdline() and address in process.cmdline()
    except psutil.Error:
        return False


def lose(launcher: subprocess.Popen[str]) -> None:
    """Kill a launcher and its workers, as if the node lost power."""
    for process in [psutil.Process(launcher.pid), *workers(launcher)]:
        process.kill()
    launcher.wait()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def _printed(site: Site, name: str, words: str) -> bool:
    return words in site.log(name).read_text()


def weights_alone(site: Site) -> dict[str, str]:
    """Return the digests of the weights of a one-process run, after as many steps as the run's newest checkpoint has."""
    step = site.saved()
    alone = site.start("alone", "--name", "alone", "--train.steps", str(step), meets=False)
    assert alone.wait(LIMIT_SECONDS) == 0, site.log("alone").read_text()
    found = listed(site.folder / "runs" / "alone" / "checkpoints")[-1]
    assert found.step == step
    return weights(found.folder)


@pytest.mark.ci
def test_machines_come_and_go_and_the_weights_are_those_of_one(site: Site) -> None:
    fixed = ("--launch.nodes", "2")
    first, second = site.start("a1", *fixed), site.start("b1", *fixed)
    until(lambda: site.steps() >= 3, site)
    second.send_signal(signal.SIGTERM)  # one node is asked to stop: all stop at the same step with the resume exit code
    assert {first.wait(LIMIT_SECONDS), second.wait(LIMIT_SECONDS)} == {EXIT_REQUEUE}
    assert site.saved() == site.steps() > 0

    some, rounds = ("--launch.nodes", "3", "--launch.min_nodes", "1"), site.rounds()
    first, second = site.start("a2", *some), site.start("b2", *some)
    site.await_round(2, rounds)
    rounds = site.rounds()
    workers(second)[0].suspend()  # one worker hangs: it is named, and all restart
    site.await_round(2, rounds)
    (hang,) = site.events("hang")
    assert "stopped (SIGSTOP)" in hang["why"]

    rounds = site.rounds()
    lose(second)  # the world shrinks
    site.await_round(1, rounds)
    rounds = site.rounds()
    third = site.start("c2", *some)  # and grows; nothing is lost, since workers save first
    until(lambda: site.rounds() > rounds, site)
    assert site.events("stopped")[-1]["step"] == site.saved()
    site.await_round(2, rounds)
    for place in meeting_places(site):
        place.kill()  # without the store no node can join, but the run continues
    until(lambda: "the run continues" in site.log("a2").read_text(), site)
    step = site.steps()
    until(lambda: site.steps() > step + 2, site)
    first.send_signal(signal.SIGINT)
    assert [first.wait(LIMIT_SECONDS), third.wait(LIMIT_SECONDS)] == [EXIT_REQUEUE] * 2
    assert audit(site.run.ledger_file).passed
    assert weights_alone(site) == weights(listed(site.run.checkpoints)[-1].folder)


@pytest.mark.ci
def test_a_machine_that_is_lost_takes_a_step_with_it_where_each_has_checkpoints_in_memory(site: Site) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        memory = f"--checkpoint.fast={site.folder / 'memory' / name}"
        nodes = ("--launch.nodes=2", "--launch.min_nodes=1")
        return site.start(name, *nodes, memory, "--checkpoint.every=0", "--train.steps=10000")

    first, second = start("a"), start("b")
    site.await_round(2, 0)
    rounds, step = site.rounds(), site.steps()
    until(lambda: site.steps() > step + 5, site)
    lose(second)
    taken = site.steps()
    site.await_round(1, rounds)
    assert site.saved() == 0  # there are only checkpoints in memory
    assert site.events("started")[-1]["step"] >= taken - 2  # a save waits for the one before it
    assert f"resumed from {site.folder / 'memory' / 'a'}" in site.log("a").read_text()

    rounds = site.rounds()
    third = start("c")  # its memory is empty: all save to the shared disk first
    site.await_round(2, rounds)
    rounds = site.rounds()
    step = site.steps()
    until(lambda: site.steps() > step + 5, site)
    started = len(site.events("started"))
    (worker,) = workers(third)
    taken = site.steps()
    worker.kill()
    until(lambda: len(site.events("started")) > started, site)
    assert site.events("started")[-1]["step"] >= taken - 2
    until(lambda: site.steps() > taken, site)
    first.send_signal(signal.SIGINT)
    assert [first.wait(LIMIT_SECONDS), third.wait(LIMIT_SECONDS)] == [EXIT_REQUEUE] * 2
    assert audit(site.run.ledger_file).passed
    assert [p.name for p in (site.folder / "memory").iterdir()] == ["b"]  # left on the lost node
    assert weights_alone(site) == weights(listed(site.run.checkpoints)[-1].folder)


@pytest.mark.ci
def test_machines_with_folders_of_their_own_end_and_are_told_what_is_needed(site: Site) -> None:
    fixed = ("--launch.nodes", "2", "--launch.timeout_seconds", "600")
    first = site.start("a", *fixed)
    second = site.start("b", *fixed, "--launch.runs", "elsewhere")
    assert {first.wait(LIMIT_SECONDS), second.wait(LIMIT_SECONDS)} == {EXIT_BAD_INPUT}
    for name in ("a", "b"):
        assert "set launch.runs to the same shared folder on all nodes" in site.log(name).read_text()
    until(lambda: not meeting_places(site), site)  # the store ends when unused


@pytest.mark.ci
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--launch.nodes=3",), "launch.nodes is 3 here and 2 there"),
        (("--launch.nodes=2", "--launch.processes=2"), "launch.processes is 2 here and 1 there"),
        (("--launch.nodes=2", "--optim.lr=0.5"), "optim.lr is 0.5 here and 0.01 there"),
    ],
)
def test_two_machines_that_disagree_both_end(site: Site, options: tuple[str, ...], words: str) -> None:
    first = site.start("a", "--launch.nodes=2", "--launch.timeout_seconds=600")
    until(functools.partial(_printed, site, "a", "waiting at"), site)  # it is the first
    second = site.start("b", *options, "--launch.timeout_seconds=600")
    assert {first.wait(LIMIT_SECONDS), second.wait(LIMIT_SECONDS)} == {EXIT_BAD_INPUT}
    said = site.log("a").read_text() + site.log("b").read_text()
    assert words in said or words.replace("here", "_").replace("there", "here").replace("_", "there") in said
    assert "1 of at least 2 nodes can start" in said


@pytest.mark.ci
def test_a_machine_does_not_wait_for_one_that_ended_with_an_error(site: Site) -> None:
    first = site.start("a", "--launch.nodes=2", "--launch.timeout_seconds=600")
    until(functools.partial(_printed, site, "a", "waiting at"), site)
    Starts(site.run.launchers_file, "node1").fail("there is no CUDA device")
    assert first.wait(LIMIT_SECONDS) == EXIT_BAD_INPUT
    assert "1 of at least 2 nodes can start. node1: there is no CUDA device" in site.log("a").read_text()


@pytest.mark.ci
def test_a_machine_that_was_started_otherwise_is_refused_and_the_others_go_on(site: Site) -> None:
    some = ("--launch.nodes", "3", "--launch.min_nodes", "1")
    first = site.start("a", *some)
    site.await_round(1, 0)
    other = site.start("b", *some, "--optim.lr", "0.5")
    assert other.wait(LIMIT_SECONDS) == EXIT_BAD_INPUT
    assert "optim.lr is 0.5 here and 0.01 there; set the same on all nodes" in site.log("b").read_text()
    step = site.steps()
    until(lambda: site.steps() > step, site)
    first.send_signal(signal.SIGTERM)
    assert first.wait(LIMIT_SECONDS) == EXIT_REQUEUE


def test_a_run_is_held_by_those_who_meet_at_one_place(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / "run") for _ in range(4)]
    folders[0].lock("node0:29400")
    folders[1].lock("node0:29400")
    assert folders[0].lock_id() == folders[1].lock_id() != ""
    for place in ("node9:29400", None):
        with pytest.raises(RunError, match="is being trained by process"):
            folders[2].lock(place)
    folders[0].release()
    with pytest.raises(RunError):
        folders[2].lock()
    folders[1].release()
    folders[2].lock()
    with pytest.raises(RunError):
        folders[3].lock("node0:29400")


def on_each(count: int, do: Callable[[Machines, int], object]) -> list[object]:
    """Return the result, or the error, of `do` on each of `count` machines."""
    store, results = HashStore(), [None] * count

    def one(rank: int) -> None:
        try:
            results[rank] = do(Machines(store, rank, count), rank)  # type: ignore[call-overload]
        except LaunchError as error:
            results[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(results)


def test_each_machine_knows_the_others_names() -> None:
    names = ["node0", "node1", "node2"]

    def greet(machines: Machines, rank: int) -> object:
        return machines.greet(names[rank], {"optim.lr": 0.1}, stays=False), machines.hosts

    assert on_each(3, greet) == [(True, names)] * 3


@pytest.mark.parametrize("stays", [False, True])
def test_who_was_started_otherwise_leaves(stays: bool) -> None:
    """A new node with another config leaves; if all are new, the first one's config is the reference."""
    rates = [0.1, 0.2, 0.1] if not stays else [0.2, 0.1, 0.1]

    def greet(machines: Machines, rank: int) -> object:
        return machines.greet(f"node{rank}", {"optim.lr": rates[rank]}, stays=stays and rank > 0)

    found = on_each(3, greet)
    odd = rates.index(0.2)
    assert isinstance(found[odd], LaunchError)
    assert "optim.lr is 0.2 here and 0.1 there" in str(found[odd])
    assert [each for rank, each in enumerate(found) if rank != odd] == [False, False]


def test_places_and_speeds_may_differ_and_nothing_else() -> None:
    config = Config()
    here = config.replace("data", folder="/local/data").replace("launch", name="x").replace("metrics", peak_tflops=3.0)
    assert shared_settings(config) == shared_settings(here)
    assert shared_settings(config) != shared_settings(config.replace("train", steps=7))


def test_who_came_and_who_left_is_said() -> None:
    def describe(machines: Machines, rank: int) -> str:
        machines.greet(["b", "c", "c"][rank], {}, stays=False)
        return machines.describe(["a", "b", "c"], 6)

    assert on_each(3, describe) == ["3 nodes (b, c, c), 6 processes; a left; c joined"] * 3


def test_workers_elsewhere_are_seen_by_the_clock_here() -> None:
    store = HashStore()
    there, here = Machines(store, 1, 2), Machines(store, 0, 2)
    there.hosts = here.hosts = ["node0", "node1"]
    assert here.others() == []
    began = time.monotonic() - 7.0
    there.post(lambda: [RankStatus(3, Sign(12, 4, "backward", began, 0.0), "sleeping")])
    (seen,) = here.others()
    assert (seen.rank, seen.sign.step, seen.sign.turn, seen.sign.phase, seen.host) == (3, 12, 4, "backward", "node1")
    assert time.monotonic() - seen.sign.since >= 7.0
    assert there.announce("hang")
    assert not here.announce("hang")
    assert not here.is_regrouping()
    there.request_regroup()
    assert here.is_regrouping()


def test_launchers_that_start_together_hold_the_run_together(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / "run") for _ in range(8)]
    ids: list[str] = []

    def hold(folder: RunFolder) -> None:
        folder.lock("node0:29400")
        ids.append(folder.lock_id())

    threads = [threading.Thread(target=hold, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1


def test_the_lock_is_readable_as_json(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.lock("node0:29400")
    assert json.loads((tmp_path / "run" / "lock").read_text())["meeting"] == "node0:29400"
