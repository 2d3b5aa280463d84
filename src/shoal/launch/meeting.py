"""
Where the launchers of a run meet: a store that all of them reach, torch's rendezvous in it, and how the run ended.

On one machine the launcher keeps the store itself, on loopback. On several it is kept by a process apart on the machine
that `launch.rendezvous` names, and lives on while anybody is connected: a launcher that dies there takes nothing with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import psutil
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from shoal.address import read_address
from shoal.config import Config
from shoal.errors import LaunchError
from shoal.launch.listen import is_loopback, listen

LOOPBACK: Final = "127.0.0.1"
STORE_SECONDS: Final = 60.0  # for an answer of the store
# A launcher gives a sign to the others so often, and is gone when so many are missing. Compared with the others' clocks.
SIGN_SECONDS: Final = 2
SIGNS_MISSED: Final = 5
UNUSED_SECONDS: Final = 10.0  # a store that nobody is connected to for so long ends
FIRST_SECONDS: Final = 60.0  # somebody has to come within

CLOCK: Final = "shoal/clock"  # the time of day where the store is kept
SKEW_SECONDS: Final = 4.0  # torch's rendezvous compares one machine's time of day with another's


class Rendezvous(DynamicRendezvousHandler):
    """torch's, which says also why the workers are to be started anew, and bears a store that has gone."""

    news = ""  # "joins", "left" or "ended", after `num_nodes_waiting` was not 0
    machines = 0  # in the round that goes on
    on_lost: Callable[[], None] | None = None  # called once, when the store does not answer any more

    def num_nodes_waiting(self) -> int:
        """
        Not 0 where the workers are to be started anew, for whatever reason.

        Without its store a run goes on; only, nobody can join it, and what dies cannot be started again.
        """
        try:
            waiting = super().num_nodes_waiting()
        except RendezvousError:
            if self.on_lost is not None:
                self.on_lost()
                self.on_lost = None
            return 0
        state = self._state_holder.state
        if state.closed:
            self.news = "ended"
        elif self._this_node not in state.participants or len(state.participants) < self.machines:
            self.news = "left"
        else:
            self.news = "joins" if waiting else ""
        return int(bool(self.news))


@dataclass(frozen=True)
class Ended:
    """How a run ended, as the launcher that ended it left it for the others."""

    code: int
    why: str


class Meeting:
    """A launcher's seat in the meeting of one run. `address`: this machine's, as the others reach it."""

    def __init__(self, store: TCPStore, config: Config, address: str) -> None:
        launch = config.launch
        self.store, self.address = store, address
        self._run = (
            "shoal-" + hashlib.sha256((launch.name or "").encode()).hexdigest()[:16]
        )  # torch makes folders of it
        # a run that has ended is closed for good: the next one of its name meets elsewhere in the same store
        self._turn = store.compare_set(f"{self._run}/turn", "", "0").decode()
        run_id = f"{self._run}-{self._turn}"
        self.rendezvous = Rendezvous.from_backend(
            run_id,
            store,
            C10dRendezvousBackend(store, run_id),
            launch.min_nodes or launch.nodes,
            launch.nodes,
            local_addr=address,
            timeout=RendezvousTimeout(
                join=timedelta(seconds=launch.timeout_seconds), last_call=timedelta(seconds=launch.join_seconds)
            ),
            keep_alive_interval=SIGN_SECONDS,
            keep_alive_max_attempt=SIGNS_MISSED,
        )

    @classmethod
    def open(cls, config: Config, tell: Callable[[str], None]) -> Meeting:
        """Come to where `config` says. Raises `LaunchError`; tells what it waits for."""
        launch = config.launch
        if launch.rendezvous is None:
            return cls(_keep_store(LOOPBACK, launch.port), config, LOOPBACK)
        found = read_address(launch.rendezvous)
        assert found, "contradictions.py refuses others"
        host, port = found
        _await_store(host, port, launch.timeout_seconds, tell)
        address = _address_towards(host, port)
        if not is_loopback(address):
            interface = _interface_of(address)
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        try:
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))
        except DistError as error:
            raise LaunchError(
                f"what listens at launch.rendezvous {launch.rendezvous} is no meeting point of shoal; set another port"
            ) from error
        _compare_clocks(store, host)
        return cls(store, config, address)

    def end(self, code: int, why: str) -> None:
        """The run has ended for all: leave word, and let nobody in any more. Once; of several the first counts."""
        try:
            self.store.compare_set(self._ended, "", json.dumps([code, why]))
            self.store.compare_set(f"{self._run}/turn", self._turn, str(int(self._turn) + 1))
            self.rendezvous.shutdown()
        except (DistError, RendezvousError):
            pass  # the store has gone before us: there is nobody to tell

    def ended(self) -> Ended | None:
        """How the run ended, where somebody ended it."""
        try:
            if self.store.check([self._ended]):
                return Ended(*json.loads(self.store.get(self._ended)))
        except DistError:
            pass
        return None

    @property
    def _ended(self) -> str:
        return f"{self._run}/{self._turn}/ended"


def serve(host: str, port: int, *, while_used: bool, ready: Callable[[], None]) -> None:
    """
    Keep a store at `host`, until the process ends or, `while_used`, as long as anybody is connected.

    Raises `LaunchError` where it cannot listen there.
    """
    store = _keep_store(host, port)
    store.set(CLOCK, str(time.time()))
    ready()
    process, idle_since, patience = psutil.Process(), time.monotonic(), FIRST_SECONDS
    while not while_used or time.monotonic() - idle_since < patience:
        time.sleep(1.0)
        store.set(CLOCK, str(time.time()))
        open_ = process.net_connections(kind="tcp")
        ours = {c.laddr.port for c in open_}  # the store is its own first client
        if any(c.laddr.port == store.port and c.raddr and c.raddr.port not in ours for c in open_):
            idle_since, patience = time.monotonic(), UNUSED_SECONDS


def _keep_store(host: str, port: int) -> TCPStore:
    """A store in this process that listens on the address of `host` alone."""
    listener = listen(host, port, from_afar=True, option="launch.rendezvous")
    name, port = listener.getsockname()[:2]
    return TCPStore(
        name, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS),
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def _await_store(host: str, port: int, seconds: float, tell: Callable[[str], None]) -> None:
    """Until there is one; on its own machine it is started. Raises `LaunchError`."""
    begun, told, started = time.monotonic(), False, False
    while not _answers(host, port):
        if not started and _is_here(host):
            _start_store(host, port)
            started = True
        waited = time.monotonic() - begun
        if waited > 3 and not told:
            tell(f"waiting for {host}:{port}, where the machines of this run meet")
            told = True
        if waited > seconds:
            raise LaunchError(
                f"nothing answers at launch.rendezvous {host}:{port} for {waited:.0f} s; start the run on that machine too, or "
                f"shoal rendezvous {host}:{port} there"
            )
        time.sleep(0.2)


def _compare_clocks(store: TCPStore, host: str) -> None:
    """Raises `LaunchError` where this machine's time of day is far from that of `host`."""
    skew = time.time() - float(store.get(CLOCK))  # up to a second old
    if abs(skew) > SKEW_SECONDS:
        raise LaunchError(
            f"the clock of this machine is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} that of {host}, so that they would "
            "take each other for dead; set the clocks, best by NTP"
        )


def _start_store(host: str, port: int) -> None:
    """In a process of its own, that a signal to this one's group does not reach. Raises `LaunchError`."""
    try:
        listen(host, port, from_afar=True, option="launch.rendezvous").close()
    except LaunchError:
        time.sleep(1.0)
        if _answers(host, port):  # another launcher on this machine was quicker
            return
        raise
    subprocess.run(  # leaves a process of its own, and returns at once
        [sys.executable, "-m", "shoal", "rendezvous", f"{host}:{port}", "--while-used"],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2.0):
            return True
    except OSError:
        return False


def _is_here(host: str) -> bool:
    """Whether `host` is an address of this machine. Raises `LaunchError` where it is nobody's."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise LaunchError(f"launch.rendezvous: cannot find the address of {host}: {error.strerror}") from None
    with socket.socket(family, kind) as probe:
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _address_towards(host: str, port: int) -> str:
    """The address with which this machine talks to `host`."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def _interface_of(address: str) -> str:
    return next(name for name, found in psutil.net_if_addrs().items() if any(a.address == address for a in found))
