"""
Secrets never reach a config, a log, a file or a command line.

A random secret is put everywhere a user may have one; every command runs; then all files and output are searched for it.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

from shoal.system.secrets import secret_in, without_password
from tests.cli.commands import Place, wait_for, workers_of
from tests.hub import small
from tests.hub.server import Repository, running_hub

CANARY = f"kanarie/{secrets.token_hex(8)}+{secrets.token_hex(8)}="  # with characters that a URL quotes
VARIABLES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY",
)  # fmt: skip
NAME = "org/tiny"
RECIPE = """
data: {corpus: dummy, dummy_documents: 60, seq_len: 48}
train: {steps: 12, global_batch: 4, micro_batch: 2, dtype: float32, device: cpu, sample_tokens: 5}
checkpoint: {every: 5}
metrics: {peak_tflops: 1, console_every: 1}
launch: {processes: 2, threads: 1}
"""


def spellings() -> list[bytes]:
    """Return the secret in plain text, URL-quoted, JSON-escaped, and in base64 at each of three offsets."""
    plain = CANARY.encode()
    in_base64 = [base64.b64encode(b"x" * shift + plain)[4 if shift else 0 : -4] for shift in range(3)]
    return [
        plain,
        quote(CANARY).encode(),
        quote(CANARY, safe="").encode(),
        json.dumps(CANARY)[1:-1].encode(),
        *in_base64,
    ]


def holds(content: bytes) -> bool:
    return any(spelling in content for spelling in spellings())


def files_with_it(folder: Path) -> list[str]:
    """Return the files below `folder` with the secret in their bytes or names."""
    return [str(p) for p in folder.rglob("*") if holds(bytes(p)) or (p.is_file() and holds(p.read_bytes()))]


class Watcher(threading.Thread):
    """Reads the command lines of this test's processes repeatedly, until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[str] = set()
        self.leaks: set[str] = set()
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                try:
                    line = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                self.seen.add(line)
                if holds(line.encode()):
                    self.leaks.add(line)

    def stop(self) -> None:
        self._end.set()
        self.join()


class Secretive(Place):
    """A folder with the secret in every possible place; it records all output of commands."""

    def __init__(self, folder: Path, hub_url: str) -> None:
        super().__init__(folder)
        self.said = b""
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        quoted = quote(CANARY, safe="")
        self.environment = dict.fromkeys(VARIABLES, CANARY) | {
            "TMPDIR": str(self.temporary),
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": hub_url,
            "HTTPS_PROXY": f"http://somebody:{quoted}@127.0.0.1:9",
            "ALL_PROXY": f"http://somebody:{quoted}@127.0.0.1:9",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return super().start(*arguments, **self.environment | environment)

    def tell(self, *arguments: str, code: int = 0, **environment: str) -> str:
        found, output = self.run(*arguments, **environment)
        self.said += output.encode()
        assert found == code, output
        return output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secretive]:
    source = small.save("llama", tmp_path_factory.mktemp("source"), shard="10MB")
    with running_hub() as hub:
        hub.repositories[NAME] = Repository({p.name: p.read_bytes() for p in source.iterdir()}, token=CANARY)
        yield Secretive(tmp_path_factory.mktemp("place"), hub.url)


@pytest.mark.ci
def test_a_secret_is_nowhere_after_all_that_shoal_does(place: Secretive) -> None:
    watcher = Watcher()
    watcher.start()
    token_file = place.folder / "hf" / "token"
    token_file.parent.mkdir()
    token_file.write_text(CANARY)
    place.tell("fetch", "model", NAME)  # sends the token, which the hub requires
    place.tell("fetch", "model", NAME, "--force", HF_TOKEN="", HUGGING_FACE_HUB_TOKEN="")  # sends the token in the file
    place.tell("fetch", "model", "org/none", code=2)
    # A hub address that answers, and one that does not, each with the secret as its password.
    for endpoint in (place.environment["HF_ENDPOINT"], "http://127.0.0.1:9"):
        address = endpoint.replace("://", f"://somebody:{quote(CANARY, safe='')}@")
        assert "shoal: " in place.tell("fetch", "model", NAME, "--to", "elsewhere", HF_ENDPOINT=address, code=2)
    token_file.unlink()
    train = ["train", "recipe.yaml", "--name", "mine", "--model.from", f"models/{NAME}"]
    (place.folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    place.tell("prepare", *train[1:])
    crash = json.dumps([{"step": 7, "phase": "forward", "rank": 1, "fault": "exception"}])
    assert "Traceback" in place.tell(*train, SHOAL_FAULTS=crash)
    stopped = place.start(*train, "--train.steps", "9000", "--launch.hang_seconds", "3", "--checkpoint.every", "100000")
    place.said += wait_for(stopped, "step   20/9000").encode()
    workers_of(stopped)[1].suspend()
    place.said += wait_for(stopped, "stacks in").encode()
    stopped.send_signal(signal.SIGKILL)
    place.said += stopped.communicate()[0].encode()
    place.tell("export", "mine", "--out", "out")
    for command in ("eval", "goodput", "ledger"):
        place.tell(command, "mine", code=0)
    place.tell("generate", "mine", "--prompt", "a", "--tokens", "3")
    for arguments in (["env"], ["config", "recipe.yaml"], ["train", "--help"]):
        place.tell(*arguments)
    place.tell("train", "recipe.yaml", "--data.tokenizer", "tiktoken:gpt2", "--name", "none", code=2)
    watcher.stop()
    assert len(list((place.folder / "runs" / "mine" / "stacks").iterdir())) == 1
    assert any("--launch.processes=2" in line for line in watcher.seen)  # the watcher did see workers
    assert watcher.leaks == set()
    assert not holds(place.said)
    assert files_with_it(place.folder) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "recipe.yaml", "--model.from", f"https://somebody:{CANARY}@hub.example/org/tiny"],
        ["train", "recipe.yaml", f"--data.paths=https://{CANARY}@host.example/x"],
        ["train", "recipe.yaml", "--train.hf_token", CANARY],
        ["train", "recipe.yaml", "--data.tokenizer", CANARY],
        ["train", "secret.yaml"],
        ["fetch", "model", f"https://somebody:{CANARY}@hub.example/org/tiny"],
        ["fetch", "model", NAME, "--token", "hf_" + "a1B2" * 9],
        ["export", "mine", "--out", "x", "--token", CANARY],
    ],
    ids=lambda arguments: " ".join(arguments[:4]).replace(CANARY, "SECRET"),
)
def test_one_in_an_option_is_refused_and_not_repeated(place: Secretive, arguments: list[str]) -> None:
    (place.folder / "secret.yaml").write_text(
        f"model: {{from: 'https://a:{CANARY}@host/m'}}\ntrain: {{steps: 'https://b:{CANARY}@host'}}\n"
    )
    output = place.refused(*arguments)
    (place.folder / "secret.yaml").unlink()
    assert "HF_TOKEN" in output
    assert "would be stored" in output
    assert not holds(output.encode())
    assert "a1B2" not in output
    assert not any(holds(p.read_bytes()) for p in (place.folder / "runs").rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("https://me:pass@host/x", "password in a URL"),
        ("s3://key@bucket/x", "password in a URL"),
        ("before WORD123456 after", "value of MY_API_KEY"),
        ("hf_" + "x" * 34, "Hugging Face token"),
        ("https://host/x@main", ""),
        ("org/model@main", ""),
        ("mail@host.example", ""),
        ("short", ""),
        ("hf_model", ""),
    ],
)
def test_what_is_a_secret(text: str, why: str) -> None:
    environment = {"MY_API_KEY": "WORD123456", "SOME_TOKEN": "short", "TOKENIZERS_PARALLELISM": "org/model@main"}
    found = secret_in(text, environment)
    assert (why in found) if why else found == ""


def test_an_address_without_its_password() -> None:
    assert without_password("https://me:pass@host:1/x") == "https://host:1/x"


def test_the_test_finds_a_secret(tmp_path: Path) -> None:
    for number, content in enumerate(
        (CANARY, quote(CANARY, safe=""), base64.b64encode(f"user:{CANARY}".encode()).decode())
    ):
        (tmp_path / str(number)).write_text(f"before {content} after")
    assert len(files_with_it(tmp_path)) == 3
    script = "import sys, time; sys.stdin.read()"
    watcher = Watcher()
    watcher.start()
    process = subprocess.Popen([sys.executable, "-c", script, CANARY], stdin=subprocess.PIPE, env=os.environ)
    while not watcher.leaks:
        pass
    process.communicate(b"")
    watcher.stop()
