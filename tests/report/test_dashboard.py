"""`shoal dashboard`, really started: who is let in, what is served, and that it follows running runs."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.report.synthetic import write_run


class Started:
    """A dashboard in a process of its own."""

    def __init__(self, runs: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal", "dashboard", str(runs), *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if "Ctrl-C" in line:
                break
        found = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+)", "".join(self.said))
        assert found is not None, self.said
        self.port, self.token = int(found[1]), found[2]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False)

    def get(self, path: str, **query: Any) -> Any:
        """Return the JSON of an address."""
        answer = self.client.get(path, params=query, headers={"Cookie": f"shoal-{self.port}={self.token}"})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def status(self, path: str, method: str = "GET", token: bool = True, **headers: str) -> int:
        """Return the status of a request with exactly this path."""
        with socket.create_connection(("127.0.0.1", self.port)) as to:
            lines = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"} | headers
            lines |= {"Cookie": f"shoal-{self.port}={self.token}"} if token else {}
            head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
            to.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode())
            data = b""
            while part := to.recv(1 << 16):
                data += part
        self.body = data.partition(b"\r\n\r\n")[2]
        return int(data.split()[1])

    def stop(self) -> tuple[int, str]:
        """Press Ctrl-C; return the exit code and the lines printed then."""
        self.client.close()
        self.process.send_signal(signal.SIGINT)
        said = self.process.communicate(timeout=60)[0]
        return self.process.returncode, said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("served") / "runs"
    write_run(runs / "a", 1500, seed=1, spikes=[777], ranks=4, slow={2: "forward"}, finished=False)
    write_run(runs / "b", 300, seed=2, options={"optim.lr": "1e-4"})
    (runs / "a" / "samples").mkdir()
    (runs / "a" / "samples" / "step-10.txt").write_text("Once upon a time")
    (runs.parent / "secret.txt").write_text("a secret")
    (runs.parent / "config.yaml").write_text("a secret")
    return runs


@pytest.fixture(scope="module")
def dashboard(runs: Path) -> Iterator[Started]:
    started = Started(runs)
    yield started
    if started.process.poll() is None:
        started.stop()


def test_the_token_lets_in(dashboard: Started) -> None:
    client = dashboard.client
    assert client.get("/").status_code == 401
    assert client.get("/", params={"token": "wrong"}).status_code == 401
    assert client.get("/", params={"token": dashboard.token[:-1]}).status_code == 401
    assert client.get("/?token=%00%ff").status_code == 401
    assert client.get(f"/?token={dashboard.token}&token=x").status_code == 401
    assert "token" not in client.get("/", params={"token": "wrong"}).headers.get("set-cookie", "")
    assert dashboard.status("/", token=False, Cookie=f"shoal-{dashboard.port}=wrong") == 401
    assert dashboard.status("/", token=False, Cookie=f"other={dashboard.token}") == 401
    answer = client.get("/", params={"token": dashboard.token})
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    client.cookies.set(f"shoal-{dashboard.port}", dashboard.token)
    assert client.get("/").status_code == 200
    client.cookies.clear()
    assert len(answer.content) < 500_000
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_it_only_reads(dashboard: Started, method: str) -> None:
    for path in ("/", "/api/runs", "/api/run/a"):
        assert dashboard.status(path, method) == 405


def test_other_hosts_and_origins_are_refused(dashboard: Started) -> None:
    here = f"127.0.0.1:{dashboard.port}"
    assert dashboard.status("/") == 200
    assert dashboard.status("/", Host=f"localhost:{dashboard.port}") == 200
    assert dashboard.status("/", Host="localhost:9000") == 200  # an ssh tunnel from another port
    for host in (
        "evil.example",
        f"evil.example:{dashboard.port}",
        "127.0.0.1.evil.example",
        "localhost:1@evil.example",
        "[::1]:80",
    ):
        assert dashboard.status("/", Host=host) == 421, host
        assert dashboard.status("/api/runs", Host=host) == 421, host
    assert dashboard.status("/", Host="") in (400, 421)
    assert dashboard.status("/api/runs", Origin=f"http://{here}") == 200
    for origin in (
        "http://evil.example",
        "null",
        f"https://{here}",
        "http://127.0.0.1:1",
        f"http://localhost:{dashboard.port}",
    ):
        assert dashboard.status("/api/runs", Origin=origin) == 403, origin


def test_nothing_outside_the_folder_is_served(dashboard: Started, runs: Path) -> None:
    for path in (
        "/../secret.txt", "/api/run/..", "/api/run/../..", "/api/run/%2e%2e", "/api/run/..%2f..%2fsecret.txt", "/api/run//etc",
        "/api/run/a/../../", "/api/run/a%00", "/api/curve?run=..", "/api/ranks?run=../../etc", "/secret.txt", "/static/../../x",
        "/api/run/" + str(runs.parent).replace("/", "%2f"), "//etc/passwd", "/api/run/.",
    ):  # fmt: skip
        assert dashboard.status(path) == 404, path
        assert b"a secret" not in dashboard.body
    assert dashboard.status("/api/curve?run=a&first=x") == 400
    assert dashboard.status("/api/curve?run=a&columns=-1") == 200


def test_links_that_lead_outside_are_not_followed(dashboard: Started, runs: Path, tmp_path: Path) -> None:
    outside = write_run(tmp_path / "outside", 20, seed=3).path
    (runs / "link").symlink_to(outside)
    stolen = write_run(runs / "stolen", 20, seed=3).path
    (stolen / "samples").mkdir()
    (stolen / "samples" / "x.txt").symlink_to(runs.parent / "secret.txt")
    parts = write_run(runs / "parts", 20, seed=3).path
    (parts / "samples").symlink_to(runs.parent)
    inside = write_run(runs / "inside", 20, seed=3).path
    (inside / "samples").symlink_to(runs / "a" / "samples")
    assert [each["id"] for each in dashboard.get("/api/runs")["runs"]] == ["a", "b", "inside"]
    for name in ("link", "stolen", "parts"):
        assert dashboard.status(f"/api/run/{name}") == 404
    assert dashboard.get("/api/run/inside")["samples"][0]["text"] == "Once upon a time"
    (inside / "model.txt").symlink_to(runs.parent / "secret.txt")  # after it was found
    assert dashboard.status("/api/run/inside") == 404
    profiled = write_run(runs / "profiled", 20, seed=3).path
    (profiled / "profiles").mkdir()
    (profiled / "profiles" / "deep").symlink_to(runs.parent)
    (profiled / "checkpoints").symlink_to(tmp_path)  # not read
    assert "profiled" not in [each["id"] for each in dashboard.get("/api/runs")["runs"]]
    (profiled / "profiles" / "deep").unlink()
    assert "profiled" in [each["id"] for each in dashboard.get("/api/runs")["runs"]]
    for each in (inside, stolen, parts, profiled):
        (each / "config.yaml").unlink()
    (runs / "link").unlink()


def test_runs_and_their_data(dashboard: Started, runs: Path) -> None:
    found = dashboard.get("/api/runs")
    assert [each["id"] for each in found["runs"]] == ["a", "b"]
    assert {each["option"] for each in found["differences"]} == {"optim.lr", "train.steps", "train.seed"}
    assert "loss" in found["runs"][0]["curves"]
    window = dashboard.get("/api/curve", run="a", name="loss", first=1, last=1500, columns=100)
    assert len(window["step"]) <= 100
    assert sum(window["count"]) == 1500
    records = [json.loads(line) for line in (runs / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = np.array([each["loss"] for each in records if "loss" in each])
    np.testing.assert_allclose(max(window["high"]), losses.max(), rtol=1e-5)
    assert dashboard.get("/api/curve", run="a", name="loss", first=700, last=800, columns=5)["high"][3] > 7
    assert dashboard.get("/api/curve", run="a", name="none")["step"] == []
    assert dashboard.get("/api/ranks", run="a")["slow"][0]["phase"] == "forward"
    assert dashboard.get("/api/ranks", run="b") is None
    assert dashboard.get("/api/run/a")["samples"][0]["text"] == "Once upon a time"


def windows_of(dashboard: Started, *wanted: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]] | None]:
    """Return the header and the arrays of each window, read as `curve_bytes.py` describes them."""
    data = dashboard.client.get(
        "/api/curves",
        params={"of": json.dumps(wanted)},
        headers={"Cookie": f"shoal-{dashboard.port}={dashboard.token}"},
    ).content
    at = 4 + int.from_bytes(data[:4], "little")
    found: list[tuple[dict[str, Any], dict[str, Any]] | None] = []
    for header in json.loads(data[4:at]):
        arrays: dict[str, Any] = {}
        for name in ("step", "tokens", "seconds", "low", "high", "mean", "count", "gaps") if header else ():
            kind = "<f8" if name in ("step", "tokens", "seconds") else "<f4"
            arrays[name] = np.frombuffer(data, kind, header["buckets"], at)
            at += arrays[name].nbytes
        at += -at % 8
        found.append((header, arrays) if header else None)
    assert at == len(data)
    return found


def test_only_new_buckets_are_sent(dashboard: Started, runs: Path, tmp_path: Path) -> None:
    lines = write_run(runs / "grows", 700, seed=6).metrics_file.read_text().splitlines(keepends=True)
    log = runs / "grows" / "metrics.jsonl"
    rest = [line for line in lines if json.loads(line)["step"] > 500]
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= 500))
    dashboard.get("/api/runs")
    wanted = [
        {"run": "grows", "name": name, "first": 0, "last": 2**53, "columns": 90} for name in ("loss", "lr", "val_loss")
    ]
    before = windows_of(dashboard, *wanted, {"run": "no", "name": "loss", "first": 0, "last": 1, "columns": 1})
    assert before.pop() is None
    asked = [each | {"had": found[0]["had"]} for each, found in zip(wanted, before, strict=True) if found]
    for found, old in zip(windows_of(dashboard, *asked), before, strict=True):
        assert found
        assert old
        assert (found[0]["keep"], found[0]["buckets"]) == (old[0]["buckets"], 0)
    with log.open("a") as file:
        file.writelines(rest)
    dashboard.get("/api/runs")
    for found, old, whole in zip(windows_of(dashboard, *asked), before, windows_of(dashboard, *wanted), strict=True):
        assert found
        assert old
        assert whole
        assert 0 < found[0]["keep"] <= old[0]["buckets"]
        assert found[0]["buckets"] < whole[0]["buckets"]
        for name, values in whole[1].items():
            assert np.array_equal(np.concatenate([old[1][name][: found[0]["keep"]], found[1][name]]), values), name
    log.write_text("".join(lines[:-9]))  # rewritten: nothing is kept
    dashboard.get("/api/runs")
    again = windows_of(dashboard, *asked)
    assert [found and found[0]["keep"] for found in again] == [0, 0, 0]
    for bad in (
        "x",
        "[1]",
        '[{"run": "a"}]',
        '[{"run": "a", "name": "loss", "first": 1.5, "last": 1, "columns": 1}]',
        "1",
    ):
        assert dashboard.status(f"/api/curves?of={bad.replace(' ', '')}") == 400, bad
    (runs / "grows" / "config.yaml").unlink()


def test_it_follows_runs_that_go_on_and_new_ones(dashboard: Started, runs: Path, tmp_path: Path) -> None:
    before = {each["id"]: each for each in dashboard.get("/api/runs")["runs"]}
    lines = write_run(tmp_path / "longer", 1600, seed=1).metrics_file.read_text().splitlines(keepends=True)
    with (runs / "a" / "metrics.jsonl").open("a") as file:
        file.writelines(line for line in lines if json.loads(line)["step"] > 1500)
    write_run(runs / "new", 50, seed=9)
    after = {each["id"]: each for each in dashboard.get("/api/runs")["runs"]}
    assert sorted(after) == ["a", "b", "new"]
    assert after["a"]["version"] != before["a"]["version"]
    assert after["b"]["version"] == before["b"]["version"]
    assert after["a"]["step"] == 1600
    assert dashboard.get("/api/curve", run="a", name="loss", first=1501)["step"] == list(range(1501, 1601))


def test_a_long_log_is_read_in_the_background(dashboard: Started, runs: Path) -> None:
    write_run(runs / "long", 6000, seed=4, spikes=[1234])
    assert (runs / "long" / "metrics.jsonl").stat().st_size > 1 << 20
    found: dict[str, Any] = {"read": 0.0}
    while found["read"] is not None:
        found = next(each for each in dashboard.get("/api/runs")["runs"] if each["id"] == "long")
    assert sum(dashboard.get("/api/curve", run="long", name="loss")["count"]) == 6000
    assert (runs / "long" / "cache" / "curves" / "metrics").is_file()


def test_another_port(dashboard: Started, runs: Path) -> None:
    flags = [sys.executable, "-m", "shoal", "dashboard"]
    taken = subprocess.run([*flags, str(runs), "--port", str(dashboard.port)], capture_output=True, text=True)
    assert taken.returncode == 2
    assert re.fullmatch(rf".*port {dashboard.port} cannot be used: .* choose another with --port.*\n", taken.stderr)
    none = subprocess.run([*flags, str(runs / "nothing")], capture_output=True, text=True)
    assert (none.returncode, none.stderr.count("\n")) == (2, 1)


def test_ctrl_c_ends_it_with_one_line(dashboard: Started) -> None:
    """Must be the last test with this dashboard."""
    code, said = dashboard.stop()
    assert (code, said.strip()) == (0, "the dashboard has ended")


def test_the_extra_is_named() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from shoal.cli import main; main(['dashboard', '.'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "pip install 'shoal[dashboard]'" in done.stderr
