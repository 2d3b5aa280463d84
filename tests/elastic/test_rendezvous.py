"""The rendezvous of launchers: seats, a lost or silent store, and states with a wrong signature."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import DistError, HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.api import RendezvousStateError, RendezvousTimeoutError

from shoal.config.options import Config
from shoal.elastic.rendezvous import Meeting, SignedBackend
from shoal.elastic.timed_calls import TimedCalls
from shoal.system.network import read_address

FAR = 30.0  # seconds; an upper limit for things that happen at once


def seat(store: object, folder: str = "folder", **launch: object) -> Meeting:
    """Return a launcher's seat in a run with these options."""
    config = Config().replace("launch", name="run", timeout_seconds=FAR, join_seconds=0.2, **launch)
    return Meeting(store, config, folder, "127.0.0.1")  # type: ignore[arg-type]


def meet(*seats: Meeting) -> list[threading.Thread]:
    """Let all seats join the next round; return one thread for each, which ends when its seat has joined."""

    def come(seat: Meeting) -> None:
        with contextlib.suppress(RendezvousTimeoutError, DistError):  # an unused or late spare
            seat.rendezvous.next_rendezvous()

    threads = [threading.Thread(target=come, args=(each,), daemon=True) for each in seats]
    for thread in threads:
        thread.start()
    return threads


def met(threads: list[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(FAR)
    return not any(thread.is_alive() for thread in threads)


@pytest.fixture
def seats() -> Iterator[list[Meeting]]:
    opened: list[Meeting] = []
    yield opened
    for each in opened:
        each.rendezvous.leave()


@pytest.mark.ci
def test_two_spares_for_one_seat_do_not_unseat_anybody(seats: list[Meeting]) -> None:
    store = HashStore()
    seats += [seat(store, nodes=2) for _ in range(4)]
    first, second, *spares = seats
    assert met(meet(first, second))
    first.rendezvous.machines = 2
    waiting = meet(*spares)
    until(lambda: len(first.rendezvous._state_holder.state.redundancy_list) == 2, first)
    assert first.rendezvous.num_nodes_waiting() == 0
    second.rendezvous.leave()
    until(lambda: first.rendezvous.news == "left", first)
    assert met(meet(first))
    until(lambda: sum(not thread.is_alive() for thread in waiting) == 1, first)  # one of the spares got the seat
    for _ in range(20):
        assert first.rendezvous.num_nodes_waiting() == 0
        time.sleep(0.1)


def until(true: object, seat: Meeting) -> None:
    end = time.monotonic() + FAR
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        seat.rendezvous.num_nodes_waiting()
        time.sleep(0.05)


def test_a_seat_that_is_given_back_is_free(seats: list[Meeting]) -> None:
    store = HashStore()
    seats += [seat(store, nodes=2) for _ in range(3)]
    assert met(meet(seats[0], seats[1]))
    seats[0].rendezvous.leave()
    seats[1].rendezvous.machines = 2
    until(lambda: seats[1].rendezvous.news == "left", seats[1])
    assert met(meet(seats[1], seats[2]))


def test_a_run_that_has_ended_says_how_and_the_next_one_of_its_name_meets_anew(seats: list[Meeting]) -> None:
    store = HashStore()
    seats += [seat(store, nodes=1)]
    assert seats[0].ended() is None
    seats[0].end(85, "it was asked to stop")
    seats[0].end(1, "later")
    ended = seats[0].ended()
    assert ended is not None
    assert (ended.code, ended.why) == (85, "it was asked to stop")
    seats += [seat(store, nodes=1)]
    assert seats[1].ended() is None
    assert met(meet(seats[1]))


def test_runs_of_one_name_in_two_folders_do_not_meet(seats: list[Meeting]) -> None:
    store = HashStore()
    seats += [seat(store, "one", nodes=1), seat(store, "another", nodes=1)]
    assert met(meet(*seats))


def test_what_was_not_signed_by_one_who_sees_the_folder_is_not_unpickled() -> None:
    store: Any = HashStore()
    ours, theirs = (SignedBackend(store, "run", key) for key in (b"ours", b"theirs"))
    theirs.set_state(b"a pickle that runs what it likes")
    with pytest.raises(RendezvousStateError, match="not written by one of its launchers"):
        ours.get_state()
    other = SignedBackend(store, "another", b"ours")
    other.set_state(b"ours")
    found = other.get_state()
    assert found is not None
    assert found[0] == b"ours"


def test_a_store_that_is_silent_keeps_nobody_waiting() -> None:
    calls, silent = TimedCalls(), threading.Event()
    assert calls.call(lambda: 1, 0) == 1
    assert calls.call(lambda: int(silent.wait()), 0, 0.01) == 0
    assert calls.call(lambda: 1, 0) == 0  # the previous call still hangs
    silent.set()
    until_answered = time.monotonic() + FAR
    while calls.call(lambda: 1, 0) == 0:
        assert time.monotonic() < until_answered


def test_a_store_that_has_gone_ends_no_run() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
    meeting = seat(client, nodes=2, min_nodes=1)
    assert met(meet(meeting))
    said = []
    meeting.rendezvous.on_lost = lambda: said.append("lost")
    del server
    until(lambda: bool(said), meeting)
    assert meeting.rendezvous.num_nodes_waiting() == 0
    assert said == ["lost"]
    meeting.rendezvous.leave()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("node0:29400", ("node0", 29400)),
        ("[::1]:1", ("::1", 1)),
        ("node0", None),
        (":29400", None),
        ("node0:0", None),
        ("node0:99999", None),
        ("http://node0:29400", None),
        ("me:secret@node0:29400", None),
    ],
)
def test_addresses(text: str, address: tuple[str, int] | None) -> None:
    assert read_address(text) == address
