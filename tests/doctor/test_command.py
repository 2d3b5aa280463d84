"""`shoal doctor` on the command line: this machine, and bad input."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from shoal.commands.doctor import read_hosts, read_ports
from shoal.errors import LaunchError
from tests.cli.commands import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_this_machine(place: Place) -> None:
    code, output = place.run("doctor", "--quick", "--json", "--shared", ".")
    found = json.loads(output)
    # a machine may lack something, but what it has is told with its name
    assert code == (1 if any(not f["warning"] for f in found["findings"]) else 0), output
    assert found["nodes"] == [socket.gethostname()]
    assert list(found["figures"]) == [f"writing to {place.folder}"]


def test_a_port_in_use_and_too_few_gpus(place: Place) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        options = ("--quick", "--ports", str(port), "--gpus-per-node", "640", "--leave-out")
        code, output = place.run("doctor", *options)
    assert code == 1
    assert "port-in-use" in output
    assert "gpu-count" in output


def test_hosts_that_cannot_be_reached(place: Place) -> None:
    code, output = place.run("doctor", "--hosts", "n1,n2", "--ssh", "false {host}")
    assert code == 1
    assert "n1: unreachable: the command ended with 1 and printed nothing" in output
    assert "2 faults found on 2 of 2 nodes" in output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--hosts", "a,a"), "a is named twice"),
        (("--hosts", ","), "names no node"),
        (("--hosts", "-oProxyCommand=x"), "expected one argument"),
        (("--hosts=-oProxyCommand=x",), "is not a host's name"),
        (("--hosts-file", "none"), "No such file"),
        (("--hosts-file", "empty"), "names no node"),
        (("--hosts", "a", "--hosts-file", "empty"), "give one of them"),
        (("--hosts", "a", "--ssh", "ssh"), "has no {host}"),
        (("--hosts", "a", "--ssh", "no-such-program {host}"), "no-such-program is not installed here"),
        (("--ports", "0"), "is not a port"),
        (("--ports", "29400-29300"), "is not a port"),
        (("--ports", "1000-2000"), "64 at most"),
        (("--run", "none"), "none"),
    ],
)
def test_bad_input(place: Place, options: tuple[str, ...], words: str) -> None:
    (place.folder / "empty").write_text("# no hosts\n\n")
    code, output = place.run("doctor", *options)
    assert code == 2, output
    assert words in output
    assert "Traceback" not in output


def test_a_file_of_hosts(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("n1 slots=8\n# n2\n  user@n3   # the last\n")
    assert read_hosts(None, file) == ["n1", "user@n3"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(LaunchError, match="--hosts-file"):
        read_hosts(None, file)


def test_ports() -> None:
    assert read_ports("29500,29400-29402") == [29400, 29401, 29402, 29500]
