"""Real servers of trackers, on this machine, for tests that ask them what they hold."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Run MLflow's server on a database in `folder`; yield its address."""
    port = free_port()
    store = [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store]
    with _served(command, folder, f"http://127.0.0.1:{port}", "/health"):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def tensorboard_server(logs: Path) -> Iterator[str]:
    """Run TensorBoard's server, which keeps all values of a small run, on a folder; yield its address."""
    port = free_port()
    command = ["-m", "tensorboard.main", "--logdir", str(logs), "--host", "127.0.0.1", "--port", str(port)]
    sampling = ["--samples_per_plugin", "scalars=100000,text=1000", "--reload_interval", "1"]
    with _served([*command, *sampling], logs, f"http://127.0.0.1:{port}", "/data/environment"):
        yield f"http://127.0.0.1:{port}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def _served(command: list[str], folder: Path, address: str, path: str) -> Iterator[None]:
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = (folder.parent / f"{folder.name}.server.log").open("w+")
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder.parent, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        tick = threading.Event()
        while True:
            with contextlib.suppress(OSError):
                ask(address, path)
                break
            log.seek(0)
            assert process.poll() is None, log.read()
            tick.wait(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def ask(address: str, path: str, **query: Any) -> Any:
    """Ask a server; return its answer, from JSON if it is that. A query is sent as JSON, by POST."""
    request = urllib.request.Request(address + path)
    if query:
        request.data = json.dumps(query).encode()
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        body = answer.read().decode()
    try:
        return json.loads(body)
    except ValueError:
        return body
