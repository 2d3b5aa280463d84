"""
Where the launchers of a run meet: a store that all of them reach, torch's rendezvous in it, and how the run ended.

On one machine the launcher keeps the store itself, on loopback. On several it is kept by a process apart on the machine
that `launch.rendezvous` names, and lives on while anybody is connected: a launcher that dies there takes nothing with it.

What is asked of the store may never be answered, where its machine lost its power. So nobody waits for it who has workers to
watch: `Aside` asks.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, TypeVar

import psutil
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from shoal.config.options import Config
from shoal.errors import LaunchError
from shoal.system.network import address_of, is_loopback, listen, read_address

T = TypeVar("T")

LOOPBACK: Final = "127.0.0.1"
STORE_SECONDS: Final = 60.0  # for an answer of the store, where there are no workers yet
ASIDE_SECONDS: Final = 2.0  # and where there are
# A launcher gives a sign to the others so often, and is gone when so many are missing. Compared with the others' clocks.
SIGN_SECONDS: Final = 2
SIGNS_MISSED: Final = 5
UNUSED_SECONDS: Final = 10.0  # a store that nobody is connected to for so long ends
FIRST_SECONDS: Final = 60.0  # somebody has to come within

CLOCK_SECONDS: Final = 5.0  # for a store to have `CLOCK`
CLOCK: Final = "shoal/clock"  # the time of day where the store is kept
SKEW_SECONDS: Final = 2.0  # of two machines from that one: torch's rendezvous compares their times of day


class Aside:
    """Asks what may never be answered, in a thread; one question at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def ask(self, question: Callable[[], T], default: T, seconds: float = ASIDE_SECONDS) -> T:
        """The answer; `default` where the store has gone, or is silent for so long, or still is from the question before."""
        if self._thread is not None and self._thread.is_alive():
            return default
        answers = [default]

        def wait() -> None:
            with contextlib.suppress(DistError, RendezvousError):
                answers[0] = question()

        self._thread = threading.Thread(target=wait, name="aside", daemon=True)
        self._thread.start()
        self._thread.join(seconds)
        return answers[0]


class Signed(C10dRendezvousBackend):
    """torch's, whose state is a pickle: here nobody unpickles what was not signed by one who can read the run's folder."""

    def __init__(self, store: TCPStore, run_id: str, key: bytes) -> None:
        super().__init__(store, run_id)
        self._secret = key

    def get_state(self) -> tuple[bytes, Any] | None:
        """Raises `RendezvousStateError` where the signature is not ours."""
        found = super().get_state()
        return None if found is None else (self._checked(found[0]), found[1])

    def set_state(self, state: bytes, token: Any | None = None) -> tuple[bytes, Any, bool] | None:
        found = super().set_state(self._signature(state) + state, token)
        return None if found is None else (self._checked(found[0]), *found[1:])

    def _signature(self, state: bytes) -> bytes:
        return hmac.digest(self._secret, state, "sha256")

    def _checked(self, signed: bytes) -> bytes:
        signature, state = signed[:32], signed[32:]
        if not hmac.compare_digest(signature, self._signature(state)):
            raise RendezvousStateError("what the store says of this run was not written by one of its launchers")
        return state


class Rendezvous(DynamicRendezvousHandler):
    """torch's, which says also why the workers are to be started anew, and bears a store that has gone or is silent."""

    news = ""  # "joins", "left" or "ended", after `num_nodes_waiting` was not 0
    machines = 0  # in the round that goes on
    on_lost: Callable[[], None] | None = None  # called once, when the store does not answer any more

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._aside = Aside()

    def num_nodes_waiting(self) -> int:
        """
        Not 0 where the workers are to be started anew, for whatever reason.

        Without its store a run goes on; only, nobody can join it, and what dies cannot be started again.
        """
        if self.settings.max_nodes == 1:  # nobody else can come or go
            return 0
        waiting = self._aside.ask(super().num_nodes_waiting, -1)
        if waiting < 0:
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
            self.news = "joins" if waiting and not self.is_full else ""
        return int(bool(self.news))

    @property
    def is_full(self) -> bool:
        """Whether all seats were taken when it was looked last."""
        state = self._state_holder.state
        return bool(state.complete) and len(state.participants) >= self.settings.max_nodes

    def leave(self) -> None:
        """Give the seat back, and be silent: without this it is kept for the other machines by a thread."""
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _RendezvousExitOp

        self.on_lost = None

        def go() -> None:
            self._stop_heartbeats()
            self._op_executor.run(_RendezvousExitOp(), time.monotonic() + ASIDE_SECONDS)

        Aside().ask(go, None)


@dataclass(frozen=True)
class Ended:
    """How a run ended, as the launcher that ended it left it for the others."""

    code: int
    why: str


class Meeting:
    """A launcher's seat in the meeting of one run. `address`: this machine's, as the others reach it."""

    def __init__(self, store: TCPStore, config: Config, folder: str, address: str) -> None:
        """folder: what only those know who see the run's folder; those with another never meet these."""
        launch = config.launch
        self.store, self.address = store, address
        digest = hashlib.sha256(f"{folder}/{launch.name}".encode()).hexdigest()
        self._run = f"shoal-{digest[:16]}"  # torch names files so
        # a run that has ended is closed for good: the next one of its name meets elsewhere in the same store
        self._turn = store.compare_set(f"{self._run}/turn", "", "0").decode()
        run_id = f"{self._run}-{self._turn}"
        self.rendezvous = Rendezvous.from_backend(
            run_id,
            store,
            Signed(store, run_id, folder.encode()),
            launch.fewest_nodes,
            launch.nodes,
            local_addr=address,
            timeout=RendezvousTimeout(
                join=timedelta(seconds=launch.timeout_seconds), last_call=timedelta(seconds=launch.join_seconds)
            ),
            keep_alive_interval=SIGN_SECONDS,
            keep_alive_max_attempt=SIGNS_MISSED,
        )

    @classmethod
    def open(cls, config: Config, folder: str, tell: Callable[[str], None]) -> Meeting:
        """Come to where `config` says. Raises `LaunchError`; tells what it waits for."""
        launch = config.launch
        if launch.rendezvous is None:
            return cls(_keep_store(LOOPBACK, launch.port, "launch.port"), config, folder, LOOPBACK)
        found = read_address(launch.rendezvous)
        assert found, "resolve/checks.py refuses others"
        host, port = found
        _await_store(host, port, launch.timeout_seconds, tell)
        family, place = address_of(host, port, option="launch.rendezvous", from_afar=_is_here(host))
        address = _address_towards(family, place)
        interface = _interface_of(address)
        if interface and not is_loopback(address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        store = Aside().ask(lambda: _connect(place[0], port), None, STORE_SECONDS / 3)
        if store is None:
            raise LaunchError(
                f"what listens at launch.rendezvous {launch.rendezvous} is no meeting point of shoal; set another port"
            )
        _compare_clocks(store, host)
        return cls(store, config, folder, address)

    def end(self, code: int, why: str) -> None:
        """The run has ended for all: leave word, and let nobody in any more. Once; of several the first counts."""

        def end() -> None:
            self.store.compare_set(self._ended, "", json.dumps([code, why]))
            self.store.compare_set(f"{self._run}/turn", self._turn, str(int(self._turn) + 1))
            self.rendezvous.shutdown()

        Aside().ask(end, None, 3 * ASIDE_SECONDS)  # where the store has gone before us there is nobody to tell

    def ended(self) -> Ended | None:
        """How the run ended, where somebody ended it."""

        def look() -> Ended | None:
            return Ended(*json.loads(self.store.get(self._ended))) if self.store.check([self._ended]) else None

        return Aside().ask(look, None)

    @property
    def _ended(self) -> str:
        return f"{self._run}/{self._turn}/ended"


def serve(host: str, port: int, *, while_used: bool, ready: Callable[[], None]) -> None:
    """
    Keep a store at `host`, until the process ends or, `while_used`, as long as anybody is connected.

    Raises `LaunchError` where it cannot listen there.
    """
    if while_used:  # where the launcher adopts orphans, it passes its signals on to this one too
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    store = _keep_store(host, port, "launch.rendezvous")
    store.set(CLOCK, str(time.time()))
    ready()
    process, idle_since, patience = psutil.Process(), time.monotonic(), FIRST_SECONDS
    while not while_used or time.monotonic() - idle_since < patience:
        time.sleep(1.0)
        store.set(CLOCK, str(time.time()))
        open_ = [c for c in process.net_connections(kind="tcp") if c.raddr]
        ours = {_plain(c.laddr) for c in open_}  # the store is its own first client
        if any(c.laddr.port == store.port and _plain(c.raddr) not in ours for c in open_):
            idle_since, patience = time.monotonic(), UNUSED_SECONDS


def _plain(address: Any) -> tuple[str, int]:
    """(ip, port), where a socket for both kinds of addresses writes one of the old kind in the new way."""
    return address.ip.removeprefix("::ffff:"), address.port


def _keep_store(host: str, port: int, option: str) -> TCPStore:
    """A store in this process that listens on the address of `host` alone."""
    listener = listen(host, port, option=option, from_afar=True)
    name, port = listener.getsockname()[:2]
    return TCPStore(
        name, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS),
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def _connect(address: str, port: int) -> TCPStore | None:
    """The store there; None where something else listens."""
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))
    try:
        store.wait([CLOCK], timedelta(seconds=CLOCK_SECONDS))  # one that has just begun to listen sets it next
    except DistError:
        return None
    return store


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
        listen(host, port, option="launch.rendezvous", from_afar=True).close()
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
        with socket.create_connection((host, port), timeout=2.0):  # each of its addresses in turn
            return True
    except OSError:
        return False


def _is_here(host: str) -> bool:
    """Whether `host` is an address of this machine. Raises `LaunchError` where it is nobody's."""
    family, address = address_of(host, 0, option="launch.rendezvous", from_afar=False)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(address)
        except OSError:
            return False
    return True


def _address_towards(family: int, place: Any) -> str:
    """The address with which this machine talks to `place`; its own one where that is here."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing
        return str(probe.getsockname()[0])


def _interface_of(address: str) -> str | None:
    found = psutil.net_if_addrs().items()
    return next((name for name, each in found if any(a.address == address for a in each)), None)
