"""Hosts without a scheduler, each with its name, address and disk: they train together, or say within seconds why they cannot."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest

import shoal
from shoal.checkpoint.saved import listed
from shoal.errors import EXIT_BAD_INPUT, EXIT_REQUEUE
from shoal.run.folder import RunFolder
from tests.cluster.host import LOCAL, Host, Switch, environment, lacking
from tests.digests import weights

RECIPE: Final = """
model: {dim: 32, num_layers: 1, num_heads: 2, max_seq_len: 16}
data: {corpus: dummy, dummy_documents: 60, tokenizer: bytes, seq_len: 16}
optim: {lr: 1e-2, warmup_steps: 2, schedule: constant}
train: {steps: 6, global_batch: 24, micro_batch: 2, dtype: float32, device: cpu, repro: bitwise, eval_every: 0}
checkpoint: {every: 5, keep: 3}
metrics: {peak_tflops: 1, report: false}
launch: {processes: 1, threads: 1, hang_seconds: 30, timeout_seconds: 600, join_seconds: 2}
"""
LIMIT_SECONDS: Final = 240.0  # of every wait: less than `launch.timeout_seconds`, the end of a hang
SHOAL: Final = (sys.executable, "-m", "shoal")
TORCHRUN: Final = (sys.executable, "-m", "torch.distributed.run")
MEET: Final = "--launch.rendezvous=node0:29400"


pytestmark = pytest.mark.skipif(bool(why := lacking()), reason=why)


class Site:
    """Hosts node0, node1, ... at one switch, which share `folder`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        self.switch = Switch("switch", folder)
        self.nodes = [Host(f"node{number}", folder, self.switch, 10 + number) for number in range(count)]
        self.addresses = {node.name: node.address for node in self.nodes}
        for node in self.nodes:
            node.know(self.addresses)
        self._open: list[subprocess.Popen[str]] = []

    def start(self, number: int, *command: str, log: str = "", **variables: str) -> subprocess.Popen[str]:
        """Start a command on a node, in the shared folder; it prints to node0.log, node1.log, ... or `log`."""
        words = ["sh", "-c", f'exec "$@" > {log or f"node{number}.log"} 2>&1', "sh", *command]
        process = self.nodes[number].start(*words, cwd=self.folder, **variables)
        self._open.append(process)
        return process

    def train(self, number: int, *options: str, **variables: str) -> subprocess.Popen[str]:
        return self.start(number, *SHOAL, "train", "recipe.yaml", "--name", "run", *options, **variables)

    def printed(self, number: int) -> str:
        log = self.folder / f"node{number}.log"
        return log.read_text("utf-8", "replace") if log.exists() else ""

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT_SECONDS
        while not true():
            assert time.monotonic() < end, "\n".join(p.read_text() for p in sorted(self.folder.glob("node*.log")))
            time.sleep(0.1)

    def codes(self, *processes: subprocess.Popen[str]) -> list[int | None]:
        """Return the exit codes; None for a process that hangs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(LIMIT_SECONDS)
        return [process.poll() for process in processes]

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "runs" / "run")

    def weights(self) -> dict[str, str]:
        return weights(listed(self.run.checkpoints)[-1].folder)

    def weights_alone(self) -> dict[str, str]:
        """Return the digests of the weights of one undisturbed process, after as many steps as the run's last checkpoint has."""
        step = listed(self.run.checkpoints)[-1].step
        command = [*SHOAL, "train", "recipe.yaml", "--name", "alone", "--train.steps", str(step)]
        subprocess.run(command, cwd=self.folder, env=environment(), check=True, capture_output=True)
        return weights(listed(self.folder / "runs" / "alone" / "checkpoints")[-1].folder)

    def close(self) -> None:
        for host in (*self.nodes, self.switch):
            host.power_off()
        for process in self._open:
            process.kill()
            process.communicate()


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    """Return two hosts, or as many as the parameter says."""
    site = Site(tmp_path, getattr(request, "param", 2))
    yield site
    site.close()


@pytest.mark.slow
def test_two_hosts_train_what_one_process_trains(site: Site) -> None:
    nodes = [site.train(number, "--launch.nodes=2", MEET) for number in range(2)]
    assert site.codes(*nodes) == [0, 0], site.printed(0) + site.printed(1)
    table = "layout dp_replicate 2 on 2 nodes of 1 process"
    assert sum(table in site.printed(number) for number in range(2)) == 1  # the first node prints it
    assert "dp_replicate across nodes" in site.printed(0) + site.printed(1)
    assert site.weights() == site.weights_alone()


@pytest.mark.slow
@pytest.mark.parametrize("site", [4], indirect=True)
def test_four_hosts_lose_one_in_the_middle_and_get_it_back(site: Site) -> None:
    options = ("--launch.nodes=4", "--launch.min_nodes=2", MEET, "--train.steps=100000")
    nodes = [site.train(number, *options) for number in range(4)]
    site.until(lambda: site.run.last_step() >= 5)
    site.nodes[3].link("down")
    site.until(lambda: "node3 left" in site.printed(0))
    step = site.run.last_step()
    site.until(lambda: site.run.last_step() > step + 2)
    site.nodes[3].power_off()
    site.nodes[3].power_on()
    nodes[3] = site.train(3, *options)
    site.until(lambda: "node3 joined" in site.printed(0))
    step = site.run.last_step()
    site.until(lambda: site.run.last_step() > step + 2)
    ask_to_stop(nodes[0])
    assert site.codes(*nodes) == [EXIT_REQUEUE] * 4
    assert site.weights() == site.weights_alone()


def ask_to_stop(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM to a command on a host, which is the child of the process that entered the host."""
    (inner,) = psutil.Process(process.pid).children()
    inner.terminate()


class Ssh:
    """A server on each node, and a client's command that reaches them from the switch, with keys of their own."""

    def __init__(self, site: Site) -> None:
        folder = site.folder / "ssh"
        folder.mkdir()
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        server = ["Port 22", "UsePAM no", "StrictModes no", "PermitRootLogin yes", f"HostKey {folder}/host",
                  f"AuthorizedKeysFile {folder}/user.pub", "PidFile none"]  # fmt: skip
        (folder / "server").write_text("\n".join(server) + "\n", encoding="utf-8")
        client = ["BatchMode yes", f"IdentityFile {folder}/user", "StrictHostKeyChecking no", "LogLevel ERROR",
                  f"UserKnownHostsFile {folder}/known", "ConnectTimeout 10"]  # fmt: skip
        (folder / "client").write_text("\n".join(client) + "\n", encoding="utf-8")
        for number, node in enumerate(site.nodes):
            site.start(number, "/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "server"), log=f"sshd{number}.log")
            site.until(functools.partial(_listens, node))
        site.switch.know(site.addresses)
        self.command = f"ssh -T -F {folder}/client"


def _listens(node: Host) -> bool:
    """Return whether the node's ssh server accepts connections."""
    probe = "import socket; socket.create_connection(('127.0.0.1', 22), 5).close()"
    return node.attempt(sys.executable, "-c", probe)[0] == 0


@pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="sshd is not installed")
def test_hosts_over_ssh_train_and_save_when_the_launcher_is_asked_to_stop(site: Site) -> None:
    ssh = Ssh(site)
    (site.folder / "hosts").write_text("node0 slots=1\nroot@node1 slots=1\n", encoding="utf-8")
    command = [*SHOAL, "launch", "hosts", "recipe.yaml", "--hosts-file", "hosts", "--name", "run", "--ssh", ssh.command]
    words = ["sh", "-c", 'exec "$@" > launcher.log 2>&1', "sh", *command, "--train.steps", "100000"]
    launcher = site.switch.start(*words, cwd=site.folder)
    log = site.folder / "launcher.log"
    site.until(lambda: site.run.last_step() >= 3 or launcher.poll() is not None)
    assert launcher.poll() is None, log.read_text()
    ask_to_stop(launcher)
    assert launcher.wait(LIMIT_SECONDS) == EXIT_REQUEUE, log.read_text()
    printed = log.read_text()
    assert re.search(r"node0: step +1/100000", printed)
    assert {"node0: ended with 85", "node1: ended with 85"} <= set(printed.splitlines())
    assert site.weights() == site.weights_alone()


@pytest.mark.slow
def test_a_head_that_is_loopback_on_one_node_is_named_on_both(site: Site) -> None:
    site.nodes[1].know({"node0": "127.0.1.1", "node1": "127.0.1.1"})
    nodes = [site.train(number, "--launch.nodes=2", MEET) for number in range(2)]
    assert site.codes(*nodes) == [EXIT_BAD_INPUT] * 2
    assert "node0 resolves to 127.0.1.1, a loopback address that other machines cannot reach" in site.printed(1)
    assert "1 of at least 2 nodes can start. node1: node0 resolves to 127.0.1.1" in site.printed(0)


def test_a_head_that_is_its_own_loopback_is_named(site: Site) -> None:
    """Debian gives a machine's own name this address."""
    site.nodes[0].know(site.addresses | {"node0": "127.0.1.1"})
    nodes = [site.train(number, "--launch.nodes=2", MEET) for number in range(2)]
    assert site.codes(*nodes) == [EXIT_BAD_INPUT] * 2
    assert "node0 resolves to 127.0.1.1, a loopback address" in site.printed(0)
    assert "node0: node0 resolves to 127.0.1.1" in site.printed(1)


@pytest.mark.slow
@pytest.mark.parametrize("fewest", [1, 2])
def test_nodes_that_all_meet_at_their_own_loopback_do_not_train_apart(site: Site, fewest: int) -> None:
    options = ("--launch.nodes=2", f"--launch.min_nodes={fewest}", "--launch.rendezvous=127.0.0.1:29400")
    first = site.train(0, *options, "--train.steps=100000")
    site.until(lambda: "waiting at" in site.printed(0) or site.run.last_step() > 0)
    second = site.train(1, *options, "--train.steps=100000")
    assert site.codes(second) == [EXIT_BAD_INPUT]
    assert "each would train alone; set it to one node's network address" in site.printed(1)
    if fewest == 2:
        assert site.codes(first) == [EXIT_BAD_INPUT]
        assert "node1: launch.rendezvous 127.0.0.1:29400" in site.printed(0)
    else:
        step = site.run.last_step()
        site.until(lambda: site.run.last_step() > step)  # it trains undisturbed


@pytest.mark.slow
def test_nodes_that_each_name_themselves_as_the_head_do_not_train_apart(site: Site) -> None:
    """As with $(hostname) in a command that each node evaluates."""
    nodes = [site.train(n, "--launch.nodes=2", f"--launch.rendezvous=node{n}:29400") for n in range(2)]
    assert site.codes(*nodes) == [EXIT_BAD_INPUT] * 2
    said = site.printed(0) + site.printed(1)
    assert "is being trained by process" in said
    assert "1 of at least 2 nodes can start" in said


@pytest.mark.slow
def test_two_launchers_without_a_rendezvous_do_not_train_one_run(site: Site) -> None:
    first = site.train(0, "--train.steps=100000")
    site.until(lambda: site.run.last_step() > 0)
    second = site.train(1, "--train.steps=100000")
    assert site.codes(second) == [EXIT_BAD_INPUT]
    assert "is being trained by process" in site.printed(1)
    assert " on node0 since " in site.printed(1)
    assert first.poll() is None


@pytest.mark.slow
def test_nodes_that_disagree_about_their_number_both_end(site: Site) -> None:
    nodes = [site.train(number, f"--launch.nodes={2 + number}", MEET) for number in range(2)]
    assert site.codes(*nodes) == [EXIT_BAD_INPUT] * 2
    said = site.printed(0) + site.printed(1)
    assert "launch.nodes is 3 here and 2 there" in said or "launch.nodes is 2 here and 3 there" in said


@pytest.mark.slow
def test_nodes_with_different_code_both_end(site: Site) -> None:
    other = site.folder / "other" / "shoal"
    shutil.copytree(Path(shoal.__file__).parent, other, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "errors.py").open("a", encoding="utf-8") as file:
        file.write("\n# edited on one node\n")
    nodes = [
        site.train(0, "--launch.nodes=2", MEET),
        site.train(1, "--launch.nodes=2", MEET, PYTHONPATH=str(other.parent)),
    ]
    assert site.codes(*nodes) == [EXIT_BAD_INPUT] * 2
    assert "shoal's code is" in site.printed(0)
    assert "shoal's code is" in site.printed(1)


def test_nodes_whose_disk_is_not_shared_both_end(site: Site) -> None:
    """Each has a disk of its own at the same path."""
    nodes = [site.train(number, "--launch.nodes=2", MEET, f"--launch.runs={LOCAL}") for number in range(2)]
    assert site.codes(*nodes) == [EXIT_BAD_INPUT] * 2
    assert f"{LOCAL}/run is not the same folder on node0 and node1" in site.printed(0)
    assert "a disk that all nodes share" in site.printed(1)


def test_a_firewall_before_the_rendezvous_is_named_on_both(site: Site) -> None:
    site.nodes[1].part_from(site.nodes[0])
    first = site.train(0, "--launch.nodes=2", MEET)
    site.until(lambda: "waiting at node0:29400 for at least 2 nodes" in site.printed(0))
    second = site.train(1, "--launch.nodes=2", MEET)
    assert site.codes(first, second) == [EXIT_BAD_INPUT] * 2
    assert "does not answer on this node, although node0 reached it; check the firewall" in site.printed(1)
    assert "node1: launch.rendezvous node0:29400 does not answer" in site.printed(0)


def ranks(number: int, size: int, head: str = "node0", **more: str) -> dict[str, str]:
    """Return the variables of one rank, as a scheduler that knows only MASTER_ADDR sets them."""
    return {"RANK": str(number), "WORLD_SIZE": str(size), "MASTER_ADDR": head, "MASTER_PORT": "29500", **more}


ONE_EACH: Final = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


@pytest.mark.slow
def test_ranks_that_know_only_the_heads_address_train(site: Site) -> None:
    nodes = [site.train(number, **ranks(number, 2, **ONE_EACH)) for number in range(2)]
    assert site.codes(*nodes) == [0, 0], site.printed(0) + site.printed(1)
    assert "layout dp_replicate 2 on 2 nodes of 1 process" in site.printed(0)
    assert site.weights() == site.weights_alone()


@pytest.mark.slow
def test_ranks_that_disagree_about_the_world_all_end(site: Site) -> None:
    nodes = [site.train(number, **ranks(number, 2 + number, **ONE_EACH)) for number in range(2)]
    assert site.codes(*nodes) == [EXIT_BAD_INPUT] * 2
    for number in range(2):
        assert "WORLD_SIZE is 3 for rank 1 on node1 but 2 for rank 0 on node0" in site.printed(number)


@pytest.mark.slow
def test_ranks_with_different_configs_all_end(site: Site) -> None:
    nodes = [site.train(n, f"--optim.lr=0.0{1 + n}", **ranks(n, 2, **ONE_EACH)) for n in range(2)]
    assert site.codes(*nodes) == [EXIT_BAD_INPUT] * 2
    for number in range(2):
        assert "optim.lr is 0.02 for rank 1 on node1 but 0.01 for rank 0 on node0" in site.printed(number)


def test_a_loopback_master_address_ends_every_rank(site: Site) -> None:
    nodes = [site.train(number, **ranks(number, 2, "localhost", **ONE_EACH)) for number in range(2)]
    assert site.codes(*nodes) == [EXIT_BAD_INPUT] * 2
    for number in range(2):
        assert f"MASTER_ADDR localhost is a loopback address on node{number}" in site.printed(number)


@pytest.mark.slow
def test_torchrun_trains_on_two_hosts(site: Site) -> None:
    command = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=node0:29600"]
    command += ["-m", "shoal", "train", "recipe.yaml", "--name", "run"]
    nodes = [site.start(n, *command, "--launch.processes=1") for n in range(2)]
    assert site.codes(*nodes) == [0, 0], site.printed(0) + site.printed(1)
    assert "started by torchrun: rank 0 of 2" in site.printed(0) + site.printed(1)
    assert site.weights() == site.weights_alone()
