"""Nothing listens on an interface other than the configured one."""

from __future__ import annotations

import ipaddress
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from shoal.errors import LaunchError
from shoal.system.network import is_loopback, listen
from tests.cli.commands import Place, clean_environment, wait_for


def listening(process: psutil.Process) -> list[str]:
    """Return the addresses on which a process and its children listen (TCP) or are bound (UDP)."""
    return [
        connection.laddr.ip
        for each in (process, *process.children(recursive=True))
        for connection in each.net_connections("inet")
        if connection.laddr and (connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM)
    ]


def test_a_run_on_one_machine_listens_on_loopback_alone(tmp_path: Path) -> None:
    place = Place(tmp_path)
    process = place.start("train", "recipe.yaml", "--name", "mine", "--train.steps", "9000")
    wait_for(process, "step    3/")
    found = listening(psutil.Process(process.pid))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert len(found) >= 3  # the launcher's store and its workers' sockets, so the test does find sockets
    assert [address for address in found if not ipaddress.ip_address(address).is_loopback] == []


WORKER = """
import os, sys
from shoal.config.options import Parallel
from shoal.mesh.mesh import open_mesh
with open_mesh("cpu", 60.0, Parallel()) as mesh:
    print("ready", flush=True)
    sys.stdin.read()
os._exit(0)
"""


def test_processes_that_others_started_listen_on_the_address_that_they_were_told(tmp_path: Path) -> None:
    """As under srun, rank 0 makes the store itself; 127.0.0.2 represents one of several addresses."""
    port = free_port("127.0.0.2")
    told = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=clean_environment() | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        wait_for(worker, "ready")
    found = [listening(psutil.Process(worker.pid)) for worker in workers]
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.communicate(timeout=60)
    assert "127.0.0.2" in found[0]
    assert {address for each in found for address in each} <= {"127.0.0.1", "127.0.0.2"}


def free_port(host: str) -> int:
    with listen(host, 0, option="launch.port") as listener:
        return int(listener.getsockname()[1])


def test_a_port_that_is_taken_is_one_message() -> None:
    with listen("127.0.0.1", 0, option="launch.port") as first:
        port = first.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"port {port} is in use .*set launch.port to another"):
            listen("127.0.0.1", port, option="launch.port")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(LaunchError, match=r"cannot listen on 192.0.2.1.*set MASTER_ADDR"):
        listen("192.0.2.1", 0, option="MASTER_ADDR")


def test_a_name_that_is_loopback_on_its_own_machine_does_not_do_for_several() -> None:
    for host in ("localhost", "127.0.1.1"):
        with pytest.raises(
            LaunchError, match=rf"{host} resolves to .*other machines cannot reach; set launch.rendezvous"
        ):
            listen(host, 0, from_afar=True, option="launch.rendezvous")


@pytest.mark.parametrize(
    ("host", "answer"), [("127.0.0.1", True), ("localhost", True), ("127.1.2.3", True), ("0.0.0.0", False)]
)
def test_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer
