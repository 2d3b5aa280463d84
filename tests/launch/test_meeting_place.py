"""Where the launchers of a Slurm job meet."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from shoal.errors import LaunchError
from shoal.launch import meeting_place
from shoal.launch.meeting_place import first_host, meeting_host

HERE = socket.gethostname()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-005,009],login1", "gpu003"),
        ("b,a[1-2]", "b"),
        ("rack[7,9]-ib", "rack7-ib"),
        ("a-b.example.org", "a-b.example.org"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def resolving(monkeypatch: pytest.MonkeyPatch, names: dict[str, str]) -> None:
    """Let names resolve as in this table; other names do not resolve."""

    def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        address = names.get(host, host)
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise socket.gaierror(-2, "Name or service not known") from None
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "getfqdn", lambda: HERE)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    """Give this node two addresses, on eth0 and ib0; return that of eth0."""
    monkeypatch.setattr(meeting_place, "_own_addresses", lambda: iter([("10.0.0.5", "eth0"), ("10.1.0.5", "ib0")]))
    monkeypatch.setattr("psutil.net_if_addrs", lambda: {"lo": [], "eth0": [], "ib0": []})
    return "10.0.0.5"


def job(**others: str) -> dict[str, str]:
    return {"SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1", "SLURM_JOB_ID": "12", **others}


def test_a_name_that_others_can_reach_is_used(monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    resolving(monkeypatch, {"n1": own})
    assert meeting_host(job()) == "n1"


@pytest.mark.parametrize("address", ["127.0.1.1", "10.0.0.77"], ids=["loopback", "another machine's"])
def test_a_name_that_leads_elsewhere_is_replaced_by_an_address(
    monkeypatch: pytest.MonkeyPatch, own: str, address: str
) -> None:
    resolving(monkeypatch, {"n1": address})
    assert meeting_host(job()) in (own, "10.1.0.5")


def test_nodes_meet_on_the_chosen_interface(monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    resolving(monkeypatch, {"n1": own})
    assert meeting_host(job(NCCL_SOCKET_IFNAME="ib0")) == "10.1.0.5"
    assert meeting_host(job(NCCL_SOCKET_IFNAME="^docker0")) == "n1"
    with pytest.raises(LaunchError, match="this node has no network interface ib7; it has eth0, ib0"):
        meeting_host(job(GLOO_SOCKET_IFNAME="ib7"))


def test_a_node_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_place, "_own_addresses", lambda: iter([]))
    resolving(monkeypatch, {"n1": "127.0.1.1"})
    with pytest.raises(LaunchError, match="no network address other than loopback"):
        meeting_host(job())


def test_a_shell_of_salloc_knows_only_the_name(monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    resolving(monkeypatch, {"n1": "10.0.0.9", HERE: own})
    assert meeting_host({"SLURM_JOB_NODELIST": "n[1-2]"}) == "n1"
    resolving(monkeypatch, {"n1": "127.0.1.1", HERE: own})
    with pytest.raises(LaunchError, match=r"n1 resolves to 127\.0\.1\.1, a loopback address"):
        meeting_host({"SLURM_JOB_NODELIST": "n[1-2]"})


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_place, "meeting_host", lambda environment: "127.0.0.1")
    place = meeting_place.meeting_place(job(SLURM_JOB_ID="39999"))
    host, _, port = place.rpartition(":")
    assert int(port) >= 10000 + 19999
    with socket.socket() as taken:
        taken.bind((host, int(port)))
        taken.listen()
        assert meeting_place.meeting_place(job(SLURM_JOB_ID="39999")) == f"{host}:{int(port) + 1}"
