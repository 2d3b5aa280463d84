"""A file of hosts, and a command that runs on all of them over ssh; scripts stand in for ssh and for Python on a host."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.commands.launch_hosts import _environment
from shoal.errors import LaunchError, ShoalError
from shoal.launch.attached import ATTACHED, task
from shoal.launch.hosts import Host, Hosts, common_slots, read_hosts
from shoal.run.starts import started_with

LIMIT_SECONDS = 60.0


def written(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_hosts_file_has_names_users_slots_and_ports(tmp_path: Path) -> None:
    text = "# two nodes\nnode0\n\n  alice@node1.lab slots=8 port=2222  # the second\n10.0.0.3 slots=8\n"
    assert read_hosts(written(tmp_path, text)) == [
        Host("node0"),
        Host("node1.lab", "alice", 2222, 8),
        Host("10.0.0.3", slots=8),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node0\nnode1 slots=many", ":2: 'slots=many' is not slots=N or port=N"),
        ("node0 gpus=8", "'gpus=8' is not slots=N"),
        ("-oProxyCommand=x", "'-oProxyCommand=x' is not a host"),
        ("-l@node0", "'-l@node0' is not a host"),
        ("node0;reboot", "is not a host"),
        ("node0\nbob@node0", ":2: node0 is there twice"),
        ("# none\n", "names no host"),
    ],
)
def test_a_line_that_is_not_a_host_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(LaunchError) as error:
        read_hosts(written(tmp_path, text))
    assert words in str(error.value)


def test_a_hosts_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"cannot read the hosts file .*No such file"):
        read_hosts(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(LaunchError, match="it is not text"):
        read_hosts(tmp_path / "binary")


def test_all_hosts_have_the_same_slots() -> None:
    assert common_slots([Host("a"), Host("b")]) is None
    assert common_slots([Host("a", slots=4), Host("b", slots=4)]) == 4
    with pytest.raises(LaunchError, match="slots differ: a 4, b none"):
        common_slots([Host("a", slots=4), Host("b")])


def test_variables_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("UNRELATED", "1")
    monkeypatch.setenv("MINE", "here")
    found = _environment(["MINE", "OTHER=a=b"], 3)
    assert (found["NCCL_DEBUG"], found["MINE"], found["OTHER"]) == ("INFO", "here", "a=b")
    assert "UNRELATED" not in found
    assert found["SHOAL_START"] != _environment([], 3)["SHOAL_START"]
    assert started_with(found) == 3
    with pytest.raises(ShoalError, match="--env NOWHERE: it is not set here"):
        _environment(["NOWHERE"], 3)


class Attached:
    """A command under `shoal.launch.attached`, as ssh would start it."""

    def __init__(self, folder: Path, code: str, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal.launch.attached"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.order(task([sys.executable, "-c", code], str(folder), variables))
        assert self.read() == ATTACHED

    def order(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


WAITS = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(85))
signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
print("ready", flush=True)
while True: signal.pause()
"""


def test_a_command_has_its_folder_and_variables_and_its_code_comes_back(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getcwd(), os.environ['TOKEN'], flush=True); sys.exit(3)"
    attached = Attached(tmp_path, code, TOKEN="secret")
    assert attached.read() == f"{tmp_path} secret"
    assert attached.process.wait(LIMIT_SECONDS) == 3


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (lambda attached: attached.order("SIGTERM\n"), 85),
        (lambda attached: attached.order("SIGINT\n"), 7),
        (lambda attached: attached.hang_up(), 85),  # the launcher is gone
        (lambda attached: attached.process.terminate(), 85),
    ],
    ids=["SIGTERM", "SIGINT", "hang up", "sshd ends it"],
)
def test_signals_and_the_end_of_the_connection_reach_the_command(
    tmp_path: Path, how: Callable[[Attached], None], code: int
) -> None:
    attached = Attached(tmp_path, WAITS)
    assert attached.read() == "ready"
    how(attached)
    assert attached.process.wait(LIMIT_SECONDS) == code


def test_a_folder_that_a_host_lacks_is_named(tmp_path: Path) -> None:
    attached = subprocess.run(
        [sys.executable, "-m", "shoal.launch.attached"], input=task(["true"], str(tmp_path / "none"), {}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert attached.returncode == 2
    assert f"cannot start true in {tmp_path / 'none'}: No such file or directory" in attached.stderr


SSH = """#!/bin/sh
# the last two words are the host and the command
for word; do host=$command; command=$word; done
case $host in
    *gone) echo "ssh: Could not resolve hostname gone" >&2; exit 255;;
    *bare) echo "bash: python: command not found" >&2; exit 127;;
esac
HOST=$host exec sh -c "$command"
"""


def group(folder: Path, *names: str) -> Hosts:
    """Return hosts that a script plays."""
    script = folder / "ssh"
    script.write_text(SSH, encoding="utf-8")
    script.chmod(0o755)
    return Hosts([Host(name) for name in names], str(script))


def test_every_line_has_its_hosts_name_and_no_secret_is_an_argument(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hosts = group(tmp_path, "a", "b")
    code = "import os, sys; print('out', os.environ['KEY']); print('err', file=sys.stderr)"
    hosts.start(["-c", code], str(tmp_path), {"KEY": "hf_secret"})
    assert all("hf_secret" not in " ".join(map(str, p.args)) for p in hosts._processes.values())  # type: ignore[arg-type]
    assert hosts.wait(2) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["a: out hf_secret", "b: out hf_secret"]
    assert sorted(err.splitlines()) == ["a: ended with 0", "a: err", "b: ended with 0", "b: err"]


EXIT_AS_NAMED = "import os, sys; sys.exit(int(os.environ['HOST'][1:]))"


@pytest.mark.parametrize(
    ("names", "code"),
    [
        (("a0", "b0"), 0),
        (("a0", "b85"), 0),
        (("a85", "b85"), 85),
        (("a1", "b85"), 1),
        (("a2", "b1", "c0"), 2),
        (("a139", "b85"), 1),
    ],
    ids=str,
)
def test_the_whole_ends_with_the_gravest_code(tmp_path: Path, names: tuple[str, ...], code: int) -> None:
    hosts = group(tmp_path, *names)
    hosts.start(["-c", EXIT_AS_NAMED], str(tmp_path), {})
    assert hosts.wait(len(names)) == code


@pytest.mark.parametrize(
    ("name", "words"), [("gone", "Could not resolve hostname"), ("bare", "python: command not found")]
)
def test_a_host_that_cannot_be_reached_ends_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    hosts = group(tmp_path, "a", name)
    hosts.start(["-c", WAITS], str(tmp_path), {})
    assert hosts.wait(2) == 2
    assert f"{name}: cannot be reached: " in (err := capfd.readouterr().err)
    assert words in err
    assert f"the run needs 2 hosts, but {name} cannot be reached" in err


def test_a_host_too_few_is_no_loss_if_enough_are_left(tmp_path: Path) -> None:
    hosts = group(tmp_path, "a0", "b0", "gone")
    hosts.start(["-c", EXIT_AS_NAMED], str(tmp_path), {})
    assert hosts.wait(2) == 0


def test_a_signal_reaches_all_hosts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hosts = group(tmp_path, "a", "b")
    hosts.start(["-c", WAITS], str(tmp_path), {})
    asked = threading.Event()

    def ask() -> None:
        while not asked.wait(0.05):
            if "a: ready" in (out := out_so_far()) and "b: ready" in out:
                hosts.signal("SIGTERM")
                return

    seen: list[str] = []

    def out_so_far() -> str:
        seen.append(capfd.readouterr().out)
        return "".join(seen)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert hosts.wait(2) == 85
    finally:
        asked.set()
        thread.join()


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot run /nowhere/ssh: No such file"):
        Hosts([Host("a")], "/nowhere/ssh").start(["-c", ""], str(tmp_path), {})


def test_the_first_line_is_json() -> None:
    assert json.loads(task(["a", "b"], "/f", {"K": "v"})) == {
        "command": ["a", "b"],
        "folder": "/f",
        "environment": {"K": "v"},
    }
