"""
Alerts: watches the files of a run, and posts a message when a rule is broken. No torch.

The launcher watches, in a thread: it lives on when workers hang or die. Without a launcher of shoal, the first rank does.
Each alert is a line of `events.jsonl`. So a resumed run knows which rules are broken, and posts none of them again until it
has recovered.
"""

from __future__ import annotations

import fcntl
import math
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, Final

from shoal.config.options import Config
from shoal.errors import ShoalError
from shoal.run.console import Console
from shoal.run.events import Events, read_json_lines
from shoal.run.folder import RunFolder
from shoal.run.goodput import Accounting
from shoal.run.records import StepRecord
from shoal.run.tail import Tail
from shoal.system.signals import Asked
from shoal.trackers.alert_rules import Finding, Rules, Seen
from shoal.trackers.webhook import Webhook

FAILED: Final = "the run failed"
STOPPED: Final = "the run stopped before its end; the same command resumes it"
LOOK_SECONDS: Final = 2.0
HEALTHY: Final = {"no_step_for": 1, "crashed": 1, "ended": 1}  # findings in a row after which a rule has recovered
USUALLY_HEALTHY: Final = 10  # for the other rules: a loss near its limit must not post at each step
LAST_SECONDS: Final = 15.0  # longest wait for the last messages when the run has ended


@contextmanager
def watched(config: Config, console: Console, *, look_seconds: float = LOOK_SECONDS) -> Iterator[Callable[[str], None]]:
    """
    Watch a run while the block lasts, if its config has rules. Call the yielded function with how the run ended.

    Raises `ShoalError` if the webhook's address is invalid.
    """
    if not config.alerts.any_rule:
        yield lambda how: None
        return
    webhook = Webhook.from_environment(config.alerts.webhook_env)
    if webhook is None:
        console.warn(
            f"alerts are only printed and recorded: {config.alerts.webhook_env} is not set; set it to a webhook's address, or "
            "alerts.webhook_env to the variable that has it"
        )
    watch = AlertWatch(config, webhook, console)
    watch.start(look_seconds)
    try:
        yield watch.ends
    except BaseException as error:
        watch.ends(STOPPED if isinstance(error, Asked | KeyboardInterrupt) else FAILED)
        raise
    finally:
        watch.close()


class AlertWatch:
    """Looks at a run's files every few seconds. Of several processes that watch a run, the one that holds a lock acts."""

    def __init__(self, config: Config, webhook: Webhook | None, console: Console) -> None:
        self._folder, self._console = RunFolder.of(config), console
        self._rules = Rules(config.alerts)
        self._eyes = _Eyes(self._folder, needs_account=config.alerts.goodput_below is not None)
        self._post = None if webhook is None else _Post(webhook, self._folder, self._record, console)
        self._broken: dict[str, int] = {}  # by broken rule: findings in a row that it is not
        self._lock: IO[str] | None = None
        self._ended = ""
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, look_seconds: float) -> None:
        """Look from a thread until `close`."""
        self._thread = threading.Thread(target=self._look_on, args=(look_seconds,), name="alerts", daemon=True)
        self._thread.start()

    def ends(self, how: str) -> None:
        """Tell how the run ended: the last look reports it."""
        self._ended = how

    def close(self) -> None:
        """Look once more, and wait a while for the messages to be posted. May be called twice."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(LAST_SECONDS)
            self._thread = None
        if self._post is not None:
            self._post.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def look(self) -> None:
        """Look once, and act on what the rules find."""
        if self._lock is None and not self._begin():
            self._eyes.look("")  # another process acts on what is new
            return
        for finding in self._rules.judge(self._eyes.look(self._ended)):
            self._note(finding)

    def _look_on(self, look_seconds: float) -> None:
        try:
            while not self._closed.wait(look_seconds):
                self.look()
            self.look()
        except Exception as error:  # any: a run matters more than its alerts
            self._console.warn(f"alerts have ended: {type(error).__name__}: {error}")

    def _begin(self) -> bool:
        """Become the process that acts, unless there is one; take over what earlier ones found."""
        try:
            self._folder.path.mkdir(parents=True, exist_ok=True)
            file = (self._folder.path / "alerts.lock").open("a", encoding="utf-8")
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        self._lock = file
        for line in unrecovered(read_json_lines(self._folder.events_file)):
            self._broken[line["rule"]] = 0
            if line.get("state") == "raised" and self._post is not None:  # a process died before it had posted this
                self._post.send(line)
        return True

    def _note(self, finding: Finding) -> None:
        """Raise an alert if a rule is broken that was not, or end it if the rule has recovered."""
        rule = finding.rule
        if finding.broken:
            if rule not in self._broken:
                self._raise(finding)
            self._broken[rule] = 0
        elif rule in self._broken:
            self._broken[rule] += 1
            if self._broken[rule] >= HEALTHY.get(rule, USUALLY_HEALTHY):
                del self._broken[rule]
                self._record(rule=rule, state="recovered", step=finding.step)
                self._console.say(f"alert is over: {rule}")

    def _raise(self, finding: Finding) -> None:
        alert = {
            "rule": finding.rule, "state": "raised", "text": finding.text, "step": finding.step,
            "value": _finite(finding.value), "limit": _finite(finding.limit),
        }  # fmt: skip
        self._record(**alert)
        self._console.say(f"alert: {finding.text}", "bold red")
        if self._post is not None:
            self._post.send(alert)

    def _record(self, **facts: Any) -> None:
        events = Events(self._folder.events_file)
        events.say("alert", **{name: value for name, value in facts.items() if value is not None})
        events.close()


def unrecovered(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the alerts that have not recovered; "state" is that of the last line: raised, posted or not posted."""
    found: dict[str, dict[str, Any]] = {}
    for line in events:
        if line.get("event") == "alert" and "rule" in line:
            if line.get("state") == "recovered":
                found.pop(line["rule"], None)
            else:
                found[line["rule"]] = found.get(line["rule"], {}) | line
    return list(found.values())


def message(folder: RunFolder, alert: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is posted: `text`, as Slack expects it, and the facts."""
    name, host = folder.path.resolve().name, socket.gethostname()
    facts = {key: alert.get(key) for key in ("rule", "state", "step", "value", "limit")}
    when = alert.get("time") or round(time.time(), 3)
    return {"text": f"{name} on {host}: {alert.get('text')}", "run": name, "host": host, "time": when, **facts}


def send_test(config: Config) -> str:
    """Post a test message; return a sentence about it. Raises `ShoalError` if there is no webhook or it does not accept it."""
    variable = config.alerts.webhook_env
    webhook = Webhook.from_environment(variable)
    if webhook is None:
        raise ShoalError(f"{variable} is not set; set it to the webhook's address: export {variable}=https://...")
    alert = {"rule": "test", "state": "test", "text": "this is a test of the alerts; no rule is broken"}
    if problem := webhook.post(message(RunFolder.of(config), alert)):
        raise ShoalError(f"the webhook in {variable} did not accept a test message: {problem}")
    return f"posted a test message to the webhook in {variable}"


class _Eyes:
    """Reads what is new in a run's files."""

    def __init__(self, folder: RunFolder, *, needs_account: bool) -> None:
        self._folder = folder
        self._metrics, self._events = Tail(folder.metrics_file, last_bytes=0), Tail(folder.events_file, last_bytes=0)
        self._clock = Tail(folder.time_file, last_bytes=None if needs_account else 0)
        self._accounting = Accounting() if needs_account else None
        self._since = time.monotonic()  # of the last step
        self._life: Any = None
        self._step = 0
        self._looked = time.time()
        for each in (self._metrics, self._events):
            each.skip()
        self._read_clock()
        self._clock.skip()

    def look(self, ended: str) -> Seen:
        """Return what is new."""
        stepped = self._read_clock()
        if stepped:
            self._since = time.monotonic()
        before, self._looked = self._looked, time.time()
        steps = [StepRecord.of_line(line) for line in self._metrics.read() if "loss" in line]
        if self._metrics.rewritten:  # a resume removed lines: those it kept were judged already
            steps = [record for record in steps if record.time is not None and record.time >= before]
        return Seen(
            now=time.time(),
            step=self._step,
            stepless_seconds=time.monotonic() - self._since,
            stepped=stepped,
            steps=steps,
            events=self._events.read(),
            account=self._accounting.account() if self._accounting is not None else None,
            free_bytes=_free_bytes(self._folder),
            ended=ended,
        )

    def _read_clock(self) -> bool:
        """Read `time.jsonl`, which names the last step every second; return whether a step was taken."""
        stepped = False
        for line in self._clock.read():
            if self._accounting is not None:
                self._accounting.add(line)
            step, life = line.get("step"), line.get("life")
            if step is None:
                continue
            # The first line of a life, and the one after a rollback, name a step that was taken before
            stepped |= life == self._life and step > self._step and "begin" not in line
            self._life, self._step = life, step
        return stepped


class _Post:
    """Posts messages from a thread, in order; says once that it fails."""

    def __init__(self, webhook: Webhook, folder: RunFolder, record: Callable[..., None], console: Console) -> None:
        self._webhook, self._folder, self._record, self._console = webhook, folder, record, console
        self._failing = False
        self._waiting: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        self._thread.start()

    def send(self, alert: Mapping[str, Any]) -> None:
        """Post an alert soon."""
        self._waiting.put(alert)

    def close(self) -> None:
        """Wait a while for the messages."""
        self._waiting.put(None)
        self._thread.join(LAST_SECONDS)
        self._stopped.set()

    def _work(self) -> None:
        while (alert := self._waiting.get()) is not None:
            problem = self._webhook.post(message(self._folder, alert), self._stopped)
            if not problem:
                self._record(rule=alert["rule"], state="posted")
            else:
                self._record(rule=alert["rule"], state="not posted", why=problem)
            if problem and not self._failing:
                self._console.warn(
                    f"an alert could not be posted to the webhook in {self._webhook.variable}: {problem}"
                )
            self._failing = bool(problem)


def _free_bytes(folder: RunFolder) -> int | None:
    try:
        return shutil.disk_usage(folder.path).free
    except OSError:
        return None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
