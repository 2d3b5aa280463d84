"""Alerts: one post per rule, to a real server, over kills and resumes; a hang is seen by the launcher; no secret in a file."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shoal.config.alert_options import Alerts
from shoal.config.options import Config
from shoal.config.run_options import Launch
from shoal.errors import ShoalError
from shoal.run.console import Console
from shoal.run.events import Events, read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.goodput import Account
from shoal.run.jsonl import PatientLines
from shoal.run.records import StepRecord
from shoal.trackers.alert_rules import GIB, Finding, Rules, Seen
from shoal.trackers.alerts import AlertWatch, send_test
from shoal.trackers.webhook import Webhook
from tests.cli.commands import Place

PATH = "/services/T0000/not-for-any-log"


class Receiver:
    """A webhook's server on this machine. answers: status codes for the first posts; then 200."""

    def __init__(self) -> None:
        self.posts: list[dict[str, Any]] = []
        self.answers: list[int] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                code = receiver.answers.pop(0) if receiver.answers else 200
                if code == 200:
                    assert self.path == PATH
                    assert self.headers["Content-Type"] == "application/json"
                    receiver.posts.append(json.loads(body))
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "http://127.0.0.1:1/")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}{PATH}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def rules(self) -> list[str]:
        return [post["rule"] for post in self.posts]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


def config_of(folder: Path, **rules: Any) -> Config:
    return Config(launch=Launch(name="run", runs=str(folder)), alerts=Alerts(**rules))


def watch_of(folder: Path, receiver: Receiver | None, **rules: Any) -> AlertWatch:
    webhook = Webhook("SHOAL_WEBHOOK", receiver.address) if receiver else None
    return AlertWatch(config_of(folder, **rules), webhook, Console(speaks=False))


def record(step: int, loss: float, score: float | None = None) -> StepRecord:
    return StepRecord(
        step=step, tokens=step, time=time.time(), loss=loss, lr=1.0, grad_norm=1.0, tokens_per_second=1.0, step_seconds=1.0,
        mfu=None, memory_bytes=1, spike_score=score,
    )  # fmt: skip


def add_losses(folder: Path, first: int, *losses: float) -> None:
    (folder / "run").mkdir(exist_ok=True)
    lines = PatientLines(RunFolder(folder / "run").metrics_file)
    lines.add(*(record(step, loss).as_line() for step, loss in enumerate(losses, first)))
    lines.close()


def findings(rules: Rules, **seen: Any) -> list[Finding]:
    return list(rules.judge(Seen(**{"now": 0.0} | seen)))


def broken(rules: Rules, **seen: Any) -> list[str]:
    return [each.rule for each in findings(rules, **seen) if each.broken]


def test_each_rule_has_its_limit() -> None:
    steps = [record(1, 2.0, 3.0), record(2, 5.0, 9.0), record(3, float("nan"))]
    found = findings(Rules(Alerts(loss_above=4.0, spike_above=8.0)), steps=steps)
    assert [(f.rule, f.step) for f in found if f.broken] == [("loss_above", 2), ("spike_above", 2), ("loss_above", 3)]

    silent = Rules(Alerts(no_step_for=60.0))
    assert broken(silent, stepless_seconds=59.0) == []
    assert broken(silent, stepless_seconds=61.0) == ["no_step_for"]
    assert broken(silent, stepless_seconds=61.0, ended="the run finished") == []

    spent = {"step": 400_000_000, "start": 600_000_000, "data": 1}
    slow = Rules(Alerts(goodput_below=0.5, goodput_grace=900.0))
    assert broken(slow, account=Account(spent, 1, 1)) == ["goodput_below"]
    assert broken(slow, account=Account({each: ms // 2 for each, ms in spent.items()}, 1, 1)) == []  # too young
    [finding] = findings(slow, account=Account(spent, 1, 1))
    assert finding.text == "goodput 40.0%; the limit is 50%. The largest other part is start, 10m00s"

    assert broken(Rules(Alerts(disk_free_below=10)), free_bytes=9 * GIB) == ["disk_free_below"]
    crashed = {"event": "crashed", "rank": 3, "how": "was killed", "step": 7}
    [finding] = findings(Rules(Alerts(crashed=True)), events=[crashed, {"event": "saved"}], stepped=True)
    assert (finding.text, finding.step) == ("worker 3 was killed at step 7", 7)
    assert broken(Rules(Alerts(ended=True)), ended="the run finished", step=9) == ["ended"]
    assert broken(Rules(Alerts(ended=True))) == []


def test_a_disk_that_fills_is_full_in_time() -> None:
    rules = Rules(Alerts(disk_full_within=2.0))
    # 1 GiB a minute: 200 GiB last for 200 minutes, 100 GiB for less than two hours
    hours: dict[int, Any] = {}
    for minute in range(120):
        [finding] = findings(rules, now=60.0 * minute, free_bytes=(200 - minute) * GIB)
        hours[minute] = (finding.value, finding.broken)
    assert hours[2] == (float("inf"), False)  # too early
    assert hours[50] == (pytest.approx(150 / 60), False)
    assert hours[110] == (pytest.approx(90 / 60), True)
    assert not any(f.broken for f in findings(rules, now=7200.0, free_bytes=400 * GIB))


def test_a_rule_posts_once_until_it_recovers(tmp_path: Path, receiver: Receiver) -> None:
    watch = watch_of(tmp_path, receiver, loss_above=4.0)
    add_losses(tmp_path, 1, 3.0, 5.0, 6.0)
    watch.look()
    add_losses(tmp_path, 4, *[3.0] * 9, 7.0, *[3.0] * 9)  # never ten good ones in a row
    watch.look()
    add_losses(tmp_path, 23, 3.0, 8.0)
    watch.look()
    watch.close()
    assert [(post["rule"], post["step"], post["value"], post["limit"]) for post in receiver.posts] == [
        ("loss_above", 2, 5.0, 4.0), ("loss_above", 24, 8.0, 4.0),
    ]  # fmt: skip
    assert receiver.posts[0]["text"].endswith(": loss 5.0000 at step 2; the limit is 4")
    assert receiver.posts[0]["run"] == "run"
    events = read_json_lines(RunFolder(tmp_path / "run").events_file)
    assert [e["state"] for e in events if e["state"] != "posted"] == ["raised", "recovered", "raised"]


def test_a_later_process_knows_what_was_posted(tmp_path: Path, receiver: Receiver) -> None:
    for first in (1, 4):
        watch = watch_of(tmp_path, receiver, loss_above=4.0)
        add_losses(tmp_path, first, 5.0, 5.0, 5.0)
        watch.look()
        watch.close()
    assert receiver.rules == ["loss_above"]


def test_an_alert_whose_process_died_before_the_post_is_posted(tmp_path: Path, receiver: Receiver) -> None:
    (tmp_path / "run").mkdir()
    events = Events(RunFolder(tmp_path / "run").events_file)
    events.say("alert", rule="loss_above", state="raised", text="loss 9", step=3)
    events.close()
    watch = watch_of(tmp_path, receiver, loss_above=4.0)
    watch.look()
    watch.close()
    assert [(post["rule"], post["step"]) for post in receiver.posts] == [("loss_above", 3)]


def test_of_two_watches_one_posts(tmp_path: Path, receiver: Receiver) -> None:
    watches = [watch_of(tmp_path, receiver, loss_above=4.0) for _ in range(2)]
    for watch in watches:
        watch.look()
    add_losses(tmp_path, 1, 5.0)
    for watch in watches:
        watch.look()
    watches[0].close()  # its node is gone: the other one takes over
    watches[1].look()
    add_losses(tmp_path, 2, *[1.0] * 10, 6.0)
    watches[1].look()
    watches[1].close()
    assert [post["step"] for post in receiver.posts] == [1, 12]


@pytest.mark.parametrize(("answers", "problem"), [([503], ""), ([404], "it answered 404"), ([302], "it answered 302")])
def test_only_errors_that_may_pass_are_tried_again(receiver: Receiver, answers: list[int], problem: str) -> None:
    receiver.answers = list(answers)
    stopped = threading.Event()
    webhook = Webhook("HOOK", receiver.address)
    assert webhook.post({"rule": "test"}, stopped) == problem
    assert len(receiver.posts) == (not problem)


def test_a_webhook_that_is_gone_is_named_by_its_variable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = Receiver()
    gone.server.shutdown()
    gone.server.server_close()
    stopped = threading.Event()
    stopped.set()  # no second attempt
    assert Webhook("HOOK", gone.address).post({}, stopped) == "Connection refused"
    watch = AlertWatch(config_of(tmp_path, loss_above=1.0, spike_above=1.0), Webhook("HOOK", gone.address), Console())
    assert watch._post is not None
    watch._post._stopped.set()
    lines = PatientLines(RunFolder(tmp_path / "run").metrics_file)
    (tmp_path / "run").mkdir(exist_ok=True)
    lines.add(record(1, 9.0, 9.0).as_line())
    lines.close()
    watch.look()
    watch.close()
    said = capsys.readouterr().out
    assert said.count("could not be posted to the webhook in HOOK: Connection refused") == 1
    written = RunFolder(tmp_path / "run").events_file.read_text()
    assert written.count('"not posted"') == 2
    assert "not-for-any-log" not in said + written


@pytest.mark.parametrize(
    "address",
    [
        "http://example.org/s3cr3t",
        "ftp://127.0.0.1/s3cr3t",
        "https://",
        "//127.0.0.1/s3cr3t",
        "http://[::1",
        "https://a:s3cr3t",
    ],
)
def test_only_https_or_this_machine(address: str) -> None:
    with pytest.raises(ShoalError, match="the address in HOOK is not a webhook") as raised:
        Webhook.from_environment("HOOK", {"HOOK": address})
    assert "s3cr3t" not in str(raised.value)
    assert Webhook.from_environment("HOOK", {}) is None
    assert Webhook.from_environment("HOOK", {"HOOK": "https://example.org/x"}) is not None


def test_a_test_message(tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShoalError, match="SHOAL_WEBHOOK is not set"):
        send_test(config_of(tmp_path))
    monkeypatch.setenv("SHOAL_WEBHOOK", receiver.address)
    assert send_test(config_of(tmp_path)) == "posted a test message to the webhook in SHOAL_WEBHOOK"
    assert receiver.rules == ["test"]


def test_an_address_in_the_config_is_rejected_and_not_quoted(tmp_path: Path) -> None:
    said = Place(tmp_path).refused(
        "alert", "recipe.yaml", "--alerts.webhook_env", "https://hooks.example.org/T1/B2/s3cr3t"
    )
    assert "alerts.webhook_env is the name of an environment variable" in said
    assert "s3cr3t" not in said


@pytest.mark.ci
def test_one_post_per_rule_over_a_hang_a_kill_and_a_resume(tmp_path: Path, receiver: Receiver) -> None:
    """Rank 0 hangs, and later dies; the launcher posts each rule once, and again only what happened again."""
    place = Place(tmp_path)
    faults = [
        {"step": 12, "phase": "forward", "rank": 0, "fault": "hang"},
        {"step": 20, "phase": "forward", "rank": 1, "fault": "kill", "life": 1},
    ]
    place.good(
        "train", "recipe.yaml", "--alerts.no_step_for", "2", "--alerts.loss_above", "0.1", "--alerts.crashed", "true",
        "--alerts.ended", "true", "--launch.hang_seconds", "6", "--launch.timeout_seconds", "60",
        SHOAL_FAULTS=json.dumps(faults), SHOAL_WEBHOOK=receiver.address,
    )  # fmt: skip
    rules = receiver.rules
    assert rules.count("loss_above") == 1  # all losses are above it, in three lives
    assert rules.count("crashed") == 2
    assert rules.count("ended") == 1
    [*_, silence] = [post for post in receiver.posts if post["rule"] == "no_step_for" and post["step"] == 11]
    assert silence["value"] > 2
    order = [(post["rule"], post["step"]) for post in receiver.posts]
    assert order.index(("no_step_for", 11)) < rules.index("crashed")  # before the launcher gave up on the hung worker
    for path in (tmp_path / "runs").rglob("*"):
        assert not path.is_file() or b"not-for-any-log" not in path.read_bytes(), path
