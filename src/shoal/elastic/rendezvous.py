"""
The rendezvous of a run's launchers: a store that all of them reach, torch's rendezvous in it, and the run's outcome.

On one node the launcher serves the store itself, on loopback. On several nodes a separate process serves it on the node that
`launch.rendezvous` names, and runs while a launcher is connected, so that it survives the launcher of its own node.

The store may never answer if its node lost power. A launcher with workers to watch therefore queries it through `TimedCalls`.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import psutil
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.api import RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from shoal.config.options import Config
from shoal.config.run_options import Launch
from shoal.elastic.agreement import shared_settings
from shoal.elastic.roll_call import RollCall
from shoal.elastic.store_process import answers, start_store
from shoal.elastic.timed_calls import CALL_SECONDS, TimedCalls
from shoal.errors import LaunchError
from shoal.run.folder import RunFolder
from shoal.run.starts import Starts, started_with
from shoal.system.network import address_of, is_here, is_loopback, listen, read_address

LOOPBACK: Final = "127.0.0.1"
STORE_SECONDS: Final = 60.0  # to wait for the store's answer while there are no workers
# A launcher sends a keep-alive signal at this interval; the others, by their own clocks, count it as gone after this many
# missed signals.
SIGN_SECONDS: Final = 2
SIGNS_MISSED: Final = 5
UNUSED_SECONDS: Final = 10.0  # a store without connections for this long ends
FIRST_SECONDS: Final = 60.0  # but the first connection may take this long

ALONE_SECONDS: Final = 10.0  # to wait for a store that other nodes have reached, and for its host's name to be known

EARLY_SECONDS: Final = 30.0  # a store that was started before torch was imported may take this long to answer
CLOCK_SECONDS: Final = 5.0  # to wait until a new store has set `CLOCK`
CLOCK: Final = "shoal/clock"  # key of the time of day on the store's node
IDENTITY: Final = "shoal/id"  # key of a random name of the store
SKEW_SECONDS: Final = 2.0  # maximum clock difference: torch's rendezvous compares the nodes' times of day


class SignedBackend(C10dRendezvousBackend):
    """torch's rendezvous backend, whose state is a pickle. It accepts only states signed with a key from the run's folder."""

    def __init__(self, store: TCPStore, run_id: str, key: bytes) -> None:
        super().__init__(store, run_id)
        self._secret = key
        self.closed = False  # whether this launcher has left: then it must not join again

    def get_state(self) -> tuple[bytes, Any] | None:
        """Return the state. Raises `RendezvousStateError` if its signature is wrong."""
        found = super().get_state()
        return None if found is None else (self._checked(found[0]), found[1])

    def set_state(self, state: bytes, token: Any | None = None) -> tuple[bytes, Any, bool] | None:
        """Write the signed state. Raises `RendezvousStateError` after the end, or if the state there has a wrong signature."""
        if self.closed:
            raise RendezvousStateError("this launcher has left the rendezvous")
        found = super().set_state(self._signature(state) + state, token)
        return None if found is None else (self._checked(found[0]), *found[1:])

    def _signature(self, state: bytes) -> bytes:
        return hmac.digest(self._secret, state, "sha256")

    def _checked(self, signed: bytes) -> bytes:
        signature, state = signed[:32], signed[32:]
        if not hmac.compare_digest(signature, self._signature(state)):
            raise RendezvousStateError("the state of this run's rendezvous was not written by one of its launchers")
        return state


class Rendezvous(DynamicRendezvousHandler):
    """torch's rendezvous, which also tells why workers must restart, and tolerates losing its store."""

    news = ""  # "joins", "left" or "ended", set when `num_nodes_waiting` is not 0
    machines = 0  # number of nodes in the current round
    on_lost: Callable[[], None] | None = None  # called once when the store stops answering
    backend: SignedBackend | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._calls = TimedCalls()

    def num_nodes_waiting(self) -> int:
        """
        Return 1 if the workers must restart, for any reason in `news`, else 0.

        A run continues without its store, but no node can join, and dead workers cannot be restarted.
        """
        if self.settings.max_nodes == 1:  # no other node can join or leave
            return 0
        waiting = self._calls.call(super().num_nodes_waiting, -1)
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
        """Whether `launch.nodes` nodes took part at the last check."""
        state = self._state_holder.state
        return bool(state.complete) and len(state.participants) >= self.settings.max_nodes

    def leave(self) -> None:
        """Leave the rendezvous and stop its keep-alive thread, which would otherwise hold this node's place."""
        from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _RendezvousExitOp

        self.on_lost = None

        def go() -> None:
            self._stop_heartbeats()
            self._op_executor.run(_RendezvousExitOp(), time.monotonic() + CALL_SECONDS)
            if self.backend is not None:
                self.backend.closed = True

        TimedCalls().call(go, None)


@dataclass(frozen=True)
class Ended:
    """The outcome of a run, as recorded for the other launchers."""

    code: int
    why: str


class Meeting:
    """A launcher's participation in the rendezvous of one run. `address`: the address at which others reach this node."""

    def __init__(self, store: TCPStore, config: Config, folder: str, address: str) -> None:
        """folder: a secret kept in the run's folder, so that only launchers that can read the folder meet."""
        launch = config.launch
        self.store, self.address = store, address
        digest = hashlib.sha256(f"{folder}/{launch.name}".encode()).hexdigest()
        self._run = f"shoal-{digest[:16]}"  # torch uses it in file names
        # an ended rendezvous stays closed: the next run of this name uses the next turn number in the same store
        self._turn = store.compare_set(f"{self._run}/turn", "", "0").decode()
        run_id = f"{self._run}-{self._turn}"
        backend = SignedBackend(store, run_id, folder.encode())
        self.roll: RollCall | None = None  # None on one node
        self.rendezvous = Rendezvous.from_backend(
            run_id,
            store,
            backend,
            launch.fewest_nodes,
            launch.nodes,
            local_addr=address,
            timeout=RendezvousTimeout(
                join=timedelta(seconds=launch.timeout_seconds), last_call=timedelta(seconds=launch.join_seconds)
            ),
            keep_alive_interval=SIGN_SECONDS,
            keep_alive_max_attempt=SIGNS_MISSED,
        )
        self.rendezvous.backend = backend

    @classmethod
    def open(
        cls,
        config: Config,
        folder: str,
        tell: Callable[[str], None],
        starts: Starts | None = None,
        *,
        has_met: bool = False,
        started_early: bool = False,
    ) -> Meeting:
        """
        Connect to the store at `launch.rendezvous`, or serve one on loopback if it is None.

        tell: a function called with a message if the store takes long to answer. starts: the notes of the run's launchers.
        has_met: whether this launcher was in a round before. started_early: whether the store's process was already started here,
        see `start_early`. Raises `LaunchError` if no shoal store answers there, if the
        clocks differ, or if launchers on other nodes meet at another store.
        """
        launch = config.launch
        if launch.rendezvous is None:
            return cls(_keep_store(LOOPBACK, launch.port, "launch.port"), config, folder, LOOPBACK)
        found = read_address(launch.rendezvous)
        assert found, "resolve/checks.py rejects other addresses"
        host, port = found
        _await_store(host, port, config, tell, None if has_met else starts, EARLY_SECONDS if started_early else 0.0)
        family, place = address_of(
            host, port, option="launch.rendezvous", from_afar=is_here(host, option="launch.rendezvous")
        )
        address = _address_towards(family, place)
        interface = _interface_of(address)
        if interface and not is_loopback(address):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
        store = TimedCalls().call(lambda: _connect(place[0], port), None, STORE_SECONDS / 3)
        if store is None:
            raise LaunchError(
                f"the service at launch.rendezvous {launch.rendezvous} is not a shoal rendezvous; set another port"
            )
        _compare_clocks(store, host)
        if starts is not None and not has_met:
            _compare_stores(store, f"{place[0]}:{port}", launch.rendezvous, starts)
        meeting = cls(store, config, folder, address)
        # a connection of its own: while one thread waits for an answer, its connection serves no other
        if (own := TimedCalls().call(lambda: _connect(place[0], port), None, STORE_SECONDS / 3)) is not None:
            meeting.roll = RollCall(
                own, str(launch.name), folder, str(RunFolder.of(config).path.resolve()), shared_settings(config),
                launch.fewest_nodes, max(launch.nodes, started_with()), starts.problems if starts is not None else dict,
            )  # fmt: skip
            meeting.roll.has_met = has_met
        return meeting

    def end(self, code: int, why: str) -> None:
        """Record the run's outcome and close the rendezvous. Only the first call by any launcher counts."""

        def end() -> None:
            self.store.compare_set(self._ended, "", json.dumps([code, why]))
            self.store.compare_set(f"{self._run}/turn", self._turn, str(int(self._turn) + 1))
            self.rendezvous.shutdown()

        TimedCalls().call(end, None, 3 * CALL_SECONDS)  # if the store is already gone, no launcher is left to read it

    def ended(self) -> Ended | None:
        """Return the run's outcome; None if it has not ended."""

        def look() -> Ended | None:
            return Ended(*json.loads(self.store.get(self._ended))) if self.store.check([self._ended]) else None

        return TimedCalls().call(look, None)

    @property
    def _ended(self) -> str:
        return f"{self._run}/{self._turn}/ended"


def serve(host: str, port: int, *, while_used: bool, ready: Callable[[], None]) -> None:
    """
    Serve a store at `host` until the process ends; with `while_used`, only while a launcher is connected.

    Raises `LaunchError` if it cannot listen there.
    """
    if while_used:  # a launcher that adopts orphans (as PID 1 does) forwards its signals to this process too
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    store = _keep_store(host, port, "launch.rendezvous")
    store.set(IDENTITY, uuid.uuid4().hex)
    store.set(CLOCK, str(time.time()))
    ready()
    process, idle_since, patience = psutil.Process(), time.monotonic(), FIRST_SECONDS
    while not while_used or time.monotonic() - idle_since < patience:
        time.sleep(1.0)
        store.set(CLOCK, str(time.time()))
        open_ = [c for c in process.net_connections(kind="tcp") if c.raddr]
        ours = {_plain(c.laddr) for c in open_}  # the store is its own client
        if any(c.laddr.port == store.port and _plain(c.raddr) not in ours for c in open_):
            idle_since, patience = time.monotonic(), UNUSED_SECONDS


def _plain(address: Any) -> tuple[str, int]:
    """Return (ip, port); a dual-stack socket writes IPv4 addresses as ::ffff:a.b.c.d."""
    return address.ip.removeprefix("::ffff:"), address.port


def _keep_store(host: str, port: int, option: str) -> TCPStore:
    """Serve a store in this process that listens only on the address of `host`."""
    listener = listen(host, port, option=option, from_afar=True)
    name, port = listener.getsockname()[:2]
    return TCPStore(
        name, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=STORE_SECONDS),
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def _connect(address: str, port: int) -> TCPStore | None:
    """Connect to the store; None if another service listens there."""
    store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))
    try:
        store.wait([CLOCK], timedelta(seconds=CLOCK_SECONDS))  # a store that has just begun to listen sets CLOCK next
    except DistError:
        return None
    return store


def _await_store(
    host: str, port: int, config: Config, tell: Callable[[str], None], starts: Starts | None, start_after: float
) -> None:
    """
    Wait until the store answers; start it if `host` is this node and it has not answered for `start_after` seconds.

    Raises `LaunchError` after `launch.timeout_seconds`, or after `ALONE_SECONDS` if waiting is in vain, by `starts`.
    """
    begun, told = time.monotonic(), False
    while not answers(host, port):
        waited = time.monotonic() - begun
        if waited >= start_after and _is_here_by_now(host, waited):
            start_store(host, port)
            start_after = math.inf
        if waited > 3 and not told:
            tell(f"waiting for the rendezvous at {host}:{port}")
            told = True
        if waited > ALONE_SECONDS and starts is not None:
            _check_hope(f"{host}:{port}", config.launch, starts)
        if waited > config.launch.timeout_seconds:
            raise LaunchError(
                f"launch.rendezvous {host}:{port} did not answer within {waited:.0f} s; start the run on that node too, or run "
                f"shoal rendezvous {host}:{port} there"
            )
        time.sleep(0.2)


def _is_here_by_now(host: str, waited: float) -> bool:
    """Return `is_here`; False for a name that is still unknown, as that of a new container may be in the first seconds."""
    try:
        return is_here(host, option="launch.rendezvous")
    except LaunchError:
        if waited > ALONE_SECONDS:
            raise
        return False


def _check_hope(address: str, launch: Launch, starts: Starts) -> None:
    """Raise `LaunchError` if other nodes have reached the store at `address`, or if too few nodes are left that can."""
    if others := starts.reached():
        raise LaunchError(
            f"launch.rendezvous {address} does not answer on this node, although {', '.join(others)} reached it; check the firewall "
            "and the route from this node to it"
        )
    found, started = starts.problems(), max(launch.nodes, started_with())
    if started - len(found) < launch.fewest_nodes:
        why = "; ".join(f"{host}: {text}" for host, text in sorted(found.items()))
        raise LaunchError(
            f"launch.rendezvous {address} does not answer, and {started - len(found)} of at least {launch.fewest_nodes} nodes can "
            f"start. {why}"
        )


def _compare_clocks(store: TCPStore, host: str) -> None:
    """Raise `LaunchError` if this node's clock differs from that of `host` by more than `SKEW_SECONDS`."""
    skew = time.time() - float(store.get(CLOCK))  # up to a second old
    if abs(skew) > SKEW_SECONDS:
        raise LaunchError(
            f"the clock of this node is {abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} that of {host}, so each would take "
            "the other for dead; synchronize the clocks, for example with NTP"
        )


def _compare_stores(store: TCPStore, address: str, rendezvous: str, starts: Starts) -> None:
    """Note the store that this launcher reached; raise `LaunchError` if launchers on other nodes have reached another one."""
    identity = store.get(IDENTITY).decode()
    starts.meet(identity, address)
    if others := starts.elsewhere(identity):
        there = ", ".join(f"{place} on {host}" for host, place in sorted(others.items()))
        raise LaunchError(
            f"launch.rendezvous {rendezvous} is {address} on this node but {there}, so each would train alone; set it to "
            "one node's network address"
        )


def _address_towards(family: int, place: Any) -> str:
    """Return this node's own address on the route to `place`."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)  # sends nothing
        return str(probe.getsockname()[0])


def _interface_of(address: str) -> str | None:
    found = psutil.net_if_addrs().items()
    return next((name for name, each in found if any(a.address == address for a in each)), None)
