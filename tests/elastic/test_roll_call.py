"""Launchers that would never meet, or not agree, find each other in the rendezvous's store."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from shoal.config.options import Config
from shoal.elastic.agreement import code_digest, difference, most_common, shared_settings
from shoal.elastic.roll_call import FRESH_SECONDS, ODD_SECONDS, PATIENCE_SECONDS, RollCall
from shoal.errors import LaunchError

SETTINGS = {"torch": "2.13.0", "launch.nodes": 2, "optim.lr": 0.1}


class Nodes:
    """Several launchers on nodes of their own, at one store and with one clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._store, self._monkeypatch, self._now = HashStore(), monkeypatch, 0.0
        self._calls: dict[str, RollCall] = {}
        self.ended: dict[str, str] = {}
        self.problems: dict[str, str] = {}

    def start(
        self,
        host: str,
        *,
        folder: str = "id",
        path: str = "/runs/run",
        fewest: int = 2,
        launchers: int = 0,
        settings: dict[str, object] | None = None,
    ) -> RollCall:
        self._monkeypatch.setattr(socket, "gethostname", lambda: host)
        self._calls[host] = RollCall(
            self._store, "run", folder, path, SETTINGS | (settings or {}), fewest, launchers,
            self._problems_elsewhere(host), lambda: self._now
        )  # fmt: skip
        return self._calls[host]

    def _problems_elsewhere(self, host: str) -> Callable[[], dict[str, str]]:
        return lambda: {name: text for name, text in self.problems.items() if name != host}

    def stop(self, host: str) -> None:
        del self._calls[host]

    def wait(self, seconds: float, *running: str) -> None:
        """Let time pass; each waiting launcher looks once a second, those in `running` only show that they live."""
        for _ in range(int(seconds)):
            self._now += 1.0
            for host, call in list(self._calls.items()):
                try:
                    call.beat() if host in running else call.look()
                except LaunchError as error:
                    self.ended[host] = str(error)
                    self.stop(host)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    return Nodes(monkeypatch)


SECONDS = 3 + FRESH_SECONDS  # within which all see each other, and who has left


def test_nodes_that_agree_wait_for_the_others(nodes: Nodes) -> None:
    for host in "abc":
        nodes.start(host, fewest=4)
    nodes.wait(10 * PATIENCE_SECONDS)
    assert nodes.ended == {}


def test_a_folder_that_is_not_shared_ends_both(nodes: Nodes) -> None:
    nodes.start("a", folder="one")
    nodes.start("b", folder="another")
    nodes.wait(SECONDS)
    assert nodes.ended.keys() == {"a", "b"}
    assert "/runs/run is not the same folder on a and b" in nodes.ended["a"]
    assert "a disk that all nodes share" in nodes.ended["b"]


def test_a_folder_at_another_path_ends_both_if_all_else_is_equal(nodes: Nodes) -> None:
    nodes.start("a", folder="one")
    nodes.start("b", folder="another", path="/scratch/runs/run")
    nodes.wait(SECONDS)
    assert "this run's folder is /runs/run on a but /scratch/runs/run on b" in nodes.ended["a"]
    assert nodes.ended.keys() == {"a", "b"}


def test_another_run_of_the_same_name_is_left_alone(nodes: Nodes) -> None:
    nodes.start("a", folder="one")
    nodes.start("b", folder="another", path="/elsewhere/run", settings={"optim.lr": 0.2})
    nodes.wait(10 * PATIENCE_SECONDS)
    assert nodes.ended == {}


def test_a_new_launcher_without_the_running_ones_folder_ends(nodes: Nodes) -> None:
    nodes.start("a", folder="one", fewest=1).has_met = True
    nodes.start("b", folder="another", fewest=1)
    nodes.wait(SECONDS, "a")
    assert nodes.ended.keys() == {"b"}


@pytest.mark.parametrize(("key", "value"), [("launch.nodes", 3), ("torch", "2.14.1"), ("optim.lr", 0.2)])
def test_two_nodes_that_disagree_both_end_and_say_about_what(nodes: Nodes, key: str, value: object) -> None:
    nodes.start("a")
    nodes.start("b", settings={key: value})
    nodes.wait(SECONDS + ODD_SECONDS + PATIENCE_SECONDS)
    assert f"differ from those of a: {key} is {value} here and {SETTINGS[key]} there" in nodes.ended["b"]
    assert f"1 of at least 2 nodes can start. b: {key} is {SETTINGS[key]} here and {value} there" in nodes.ended["a"]


def test_one_odd_node_of_four_leaves_and_the_others_wait_for_a_fourth(nodes: Nodes) -> None:
    nodes.start("odd", fewest=3, settings={"torch": "2.11.0"})
    for host in "abc":
        nodes.start(host, fewest=3)
    nodes.wait(SECONDS + ODD_SECONDS + 5 * PATIENCE_SECONDS)
    assert nodes.ended.keys() == {"odd"}


def test_a_spare_takes_the_place_of_an_odd_node(nodes: Nodes) -> None:
    nodes.start("a")
    nodes.start("odd", settings={"torch": "2.11.0"})
    nodes.wait(SECONDS)
    nodes.start("spare")
    nodes.wait(5 * PATIENCE_SECONDS)
    assert nodes.ended.keys() == {"odd"}


def test_a_node_with_other_settings_than_the_running_ones_ends(nodes: Nodes) -> None:
    nodes.start("a", fewest=1).has_met = True
    nodes.start("b", fewest=1, settings={"optim.lr": 0.2})
    nodes.start("c", fewest=1, settings={"optim.lr": 0.2})
    nodes.wait(SECONDS + ODD_SECONDS, "a")
    assert nodes.ended.keys() == {"b", "c"}
    assert "optim.lr is 0.2 here and 0.1 there" in nodes.ended["c"]


def test_a_launcher_that_was_killed_long_ago_disturbs_nobody_now(nodes: Nodes) -> None:
    nodes.start("a", folder="of another day", settings={"torch": "2.0.0"})
    nodes.wait(3)
    nodes.stop("a")
    nodes.wait(2 * FRESH_SECONDS)
    nodes.start("b")
    nodes.start("c")
    nodes.wait(5 * PATIENCE_SECONDS)
    assert nodes.ended == {}


def test_an_error_on_another_node_ends_the_wait_for_it(nodes: Nodes) -> None:
    nodes.problems["b"] = "there is no CUDA device"
    nodes.start("a")
    nodes.wait(PATIENCE_SECONDS - 1)
    assert nodes.ended == {}
    nodes.wait(3)
    assert nodes.ended == {"a": "1 of at least 2 nodes can start. b: there is no CUDA device"}


def test_a_slow_spare_is_waited_for_in_place_of_a_failed_node(nodes: Nodes) -> None:
    nodes.problems["b"] = "there is no CUDA device"
    nodes.start("a", launchers=3)
    nodes.wait(5 * PATIENCE_SECONDS)
    assert nodes.ended == {}
    nodes.problems["c"] = "there is none either"
    nodes.wait(PATIENCE_SECONDS + 3)
    assert "c: there is none either" in nodes.ended["a"]


def test_a_run_that_has_begun_waits_for_another_node(nodes: Nodes) -> None:
    nodes.problems["b"] = "there is no CUDA device"
    nodes.start("a").has_met = True
    nodes.wait(10 * PATIENCE_SECONDS)
    assert nodes.ended == {}


def test_who_met_and_differs_is_waited_for_no_longer(nodes: Nodes) -> None:
    nodes.start("a").differs("b", "optim.lr is 0.1 here and 0.2 there")
    nodes.wait(PATIENCE_SECONDS + 3)
    assert "b: optim.lr is 0.1 here" in nodes.ended["a"]


def test_the_settings_hold_the_world_the_versions_and_the_code() -> None:
    found: Mapping[str, object] = shared_settings(Config())
    assert {
        "shoal",
        "shoal's code",
        "torch",
        "the device",
        "launch.nodes",
        "launch.min_nodes",
        "launch.processes",
    } <= set(found)
    assert not {"launch.threads", "launch.runs", "data.folder"} & set(found)


def test_code_is_equal_if_its_bytes_are(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / "one.py").write_text("x = 1\n")
        (tmp_path / folder / "sub" / "two.py").write_text("y = 2\n")
    (tmp_path / "b" / "notes.txt").write_text("not code")
    assert code_digest(tmp_path / "a") == code_digest(tmp_path / "b") != code_digest()
    (tmp_path / "b" / "sub" / "two.py").write_text("y = 3\n")
    assert code_digest(tmp_path / "a") != code_digest(tmp_path / "b")


def test_differences_are_few_and_counted() -> None:
    mine, theirs = {f"key{number}": number for number in range(9)}, {f"key{number}": 9 for number in range(9)}
    assert difference(mine, theirs).endswith("key3 is 3 here and 9 there, and 5 more differ")
    assert difference({"a": 1, "b": 2}, {"b": 2}) == "a is 1 here and None there"
    assert most_common([{"a": 1}, {"a": 2}, {"a": 2}]) == 1
    assert most_common([{"a": 1}, {"a": 2}]) == 0
