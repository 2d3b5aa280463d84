"""The pods of docs/kubernetes/job.yaml as hosts: names, addresses and processes of their own, all gone with the pod's command."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
import yaml

from shoal.checkpoint.saved import listed
from shoal.errors import EXIT_REQUEUE
from shoal.run.folder import RunFolder
from tests.cluster.host import Host, Switch, environment, lacking
from tests.digests import weights

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(why := lacking()), reason=why),
]

JOB: Final[dict[str, Any]] = list(
    yaml.safe_load_all((Path(__file__).parents[2] / "docs" / "kubernetes" / "job.yaml").read_text(encoding="utf-8"))
)[1]
POD: Final = JOB["spec"]["template"]["spec"]
RECIPE: Final = """
model: {dim: 32, num_layers: 1, num_heads: 2, max_seq_len: 16}
data: {corpus: dummy, dummy_documents: 60, tokenizer: bytes, seq_len: 16}
optim: {lr: 1e-2, warmup_steps: 2, schedule: constant}
train: {steps: 30, global_batch: 8, micro_batch: 2, dtype: float32, device: cpu, repro: bitwise, eval_every: 0}
checkpoint: {every: 10, keep: 3}
metrics: {peak_tflops: 1, report: false}
launch: {threads: 1, join_seconds: 2}
"""
SECONDS: Final = 250.0  # of every wait
SHOAL: Final = (sys.executable, "-m", "shoal")


class Pods:
    """The Job's pods, which share `folder`, and Kubernetes' part: names, addresses, and new pods for those that ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        self.switch = Switch("switch", folder)
        self._address = 10  # of the next pod: a new pod has a new address
        self.pods: list[Host] = []

    def start(self) -> list[subprocess.Popen[str]]:
        """Start a pod for each index, with the manifest's commands; return the commands, first pod first."""
        [container], [first] = POD["containers"], POD["initContainers"]
        name = JOB["metadata"]["name"]
        names = [f"{name}-{index}" for index in range(JOB["spec"]["completions"])]
        self.pods = [Host(each, self.folder, self.switch, self._next_address()) for each in names]
        addresses = {f"{pod.name}.{POD['subdomain']}": pod.address for pod in self.pods}
        for pod in self.pods:
            pod.know({**addresses, pod.name: pod.address})
            pod.run(*first["command"], seconds=SECONDS)
        return [self._train(pod, container["args"]) for pod in self.pods]

    def _train(self, pod: Host, arguments: list[str]) -> subprocess.Popen[str]:
        """Run the container's command with a small recipe, and one process instead of a GPU each."""
        verb, _, *options = arguments
        mine = [option for option in options if not option.startswith("--launch.processes")]
        assert len(mine) == len(options) - 1
        command = [*SHOAL, verb, "recipe.yaml", "--name=run", "--processes=1", *mine]
        interface = {e["name"]: e["value"] for e in POD["containers"][0]["env"] if e["name"].endswith("IFNAME")}
        return pod.start(*command, cwd=self.folder, **interface)

    def ended(self, commands: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
        """Return each command's exit code and output. As in a container, a pod's other processes die when its command ends."""

        def end(pod: Host, command: subprocess.Popen[str]) -> tuple[int, str]:
            output, _ = command.communicate(timeout=SECONDS)
            pod.power_off()
            return command.returncode, output

        with ThreadPoolExecutor(len(commands)) as threads:
            return list(threads.map(end, self.pods, commands))

    def _next_address(self) -> int:
        self._address += 1
        return self._address

    def close(self) -> None:
        for host in (*self.pods, self.switch):
            host.power_off()


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Pods]:
    pods = Pods(tmp_path)
    yield pods
    pods.close()


def wait_for_lines(path: Path, count: int, command: subprocess.Popen[str]) -> None:
    """Wait until a file has this many lines. Raises AssertionError, with the command's output, if the command ends before."""
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(0.1)
            raise AssertionError(command.communicate()[0])


def weights_of(folder: Path, run: str) -> dict[str, str]:
    """Return the digests of the weights after the recipe's last step."""
    last = listed(RunFolder(folder / "runs" / run).checkpoints)[-1]
    assert last.step == yaml.safe_load(RECIPE)["train"]["steps"]
    return weights(last.folder)


@pytest.mark.slow
def test_a_drained_pod_is_replaced_and_the_run_ends_with_the_same_bits(pods: Pods) -> None:
    """Drain a node: its pod gets SIGTERM, all pods save and end, and new ones with new addresses resume the run."""
    commands = pods.start()
    drained = commands[1]
    wait_for_lines(RunFolder(pods.folder / "runs" / "run").path / "metrics.jsonl", 5, drained)
    [launcher] = psutil.Process(drained.pid).children()
    launcher.send_signal(signal.SIGTERM)
    for code, output in pods.ended(commands):
        assert code == EXIT_REQUEUE, output

    for code, output in pods.ended(pods.start()):
        assert code == 0, output
    command = [*SHOAL, "train", "recipe.yaml", "--name", "alone", "--processes", "1"]
    subprocess.run(command, cwd=pods.folder, env=environment(), check=True, capture_output=True)
    assert weights_of(pods.folder, "run") == weights_of(pods.folder, "alone")
