"""How trackers are asked for, and what is rejected before any process starts. Keys reach no message."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.config import tracker_names
from shoal.config.tracker_names import TRACKERS, check_installed
from shoal.errors import ConfigError, ShoalError
from shoal.resolve.resolve import Resolved, resolve
from shoal.system.secrets import redacted


def asked(*flags: tuple[str, str, str]) -> Resolved:
    return resolve(None, [("train.steps", "1", "--steps"), *flags])


def test_trackers_are_a_list_and_none_is_none() -> None:
    assert asked(("track.to", "tensorboard, wandb", "--track")).config.track.to == ("tensorboard", "wandb")
    assert asked(("track.to", "[mlflow]", "--track")).config.track.to == ("mlflow",)
    assert asked(("track.to", "none", "--report-to")).config.track.to == ()
    assert asked().config.track.to == ()


def test_an_experiments_name_switches_comet_on_and_says_so() -> None:
    named = asked(("launch.name", "x", "--experiment-name"), ("track.to", "wandb", "--track"))
    assert (named.config.launch.name, named.config.track.to) == ("x", ("wandb", "comet"))
    assert named.notes == (
        "--experiment-name names the run and switches Comet on, as --track comet does; --name only names it",
    )
    both = asked(("launch.name", "x", "--experiment_name"), ("track.to", "comet", "--track"))
    assert (both.config.track.to, both.notes) == (("comet",), ())
    assert asked(("launch.name", "x", "--name")).config.track.to == ()


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tensorbord", "did you mean tensorboard?"), ("TB", "did you mean tensorboard?"), ("x", "valid: ")],
)
def test_an_unknown_tracker_is_refused_with_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"--track: there is no tracker {name}; ") as caught:
        asked(("track.to", f"wandb,{name}", "--track"))
    assert hint in str(caught.value)


def test_a_missing_package_is_one_line_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(list(TRACKERS))  # all are, here
    known = tracker_names.Known("Comet", "no_such_package")
    monkeypatch.setitem(tracker_names.TRACKERS, "comet", known)
    with pytest.raises(
        ShoalError, match=r"Comet, which is not installed: pip install 'shoal\[comet\]', or remove comet"
    ):
        check_installed(["tensorboard", "comet"])


def test_a_key_in_an_option_is_refused_and_never_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    for secret in ("0123456789abcdef", "https://me:secretword@host/x"):
        with pytest.raises(ConfigError, match=r"track.project") as caught:
            asked(("track.project", secret, "--project"))
        assert secret not in str(caught.value)
        assert "secretword" not in str(caught.value)


def test_a_librarys_message_is_shown_without_secrets(tmp_path: Path) -> None:
    said = "401 for https://me:secretword@host/api with key 0123456789abcdef"
    shown = redacted(said, {"WANDB_API_KEY": "0123456789abcdef", "HOME": "/api"})
    assert shown == "401 for https://host/api with key [WANDB_API_KEY]"
