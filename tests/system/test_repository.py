"""The user's repository, made by the real git."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from shoal.system.repository import Look

WHO = {f"GIT_{role}_{what}": "someone@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder: Path, *words: str) -> str:
    env = os.environ | WHO | {"GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(
        ["git", *words], cwd=folder, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_branch_and_changes(tmp_path: Path) -> None:
    assert Look.at(tmp_path).found() is None
    assert Look.at(tmp_path / "gone").found() is None
    git(tmp_path, "init", "-q", "-b", "work")
    assert Look.at(tmp_path).found() == {"commit": None, "branch": "work", "dirty": False}
    (tmp_path / "model.py").write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    inside, clean = (
        tmp_path / "inside",
        {"commit": git(tmp_path, "rev-parse", "HEAD"), "branch": "work", "dirty": False},
    )
    inside.mkdir()
    (inside / "notes").write_text("untracked")
    assert Look.at(inside).found() == clean
    (tmp_path / "model.py").write_text("b")
    assert Look.at(tmp_path).found() == clean | {"dirty": True}
    git(tmp_path, "checkout", "-q", "--detach", "--force")
    assert Look.at(tmp_path).found() == clean | {"branch": None}


def test_without_git_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Look.at(Path(__file__).parent).found() is None


def test_no_program_that_the_repository_names_is_run(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "hook").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "hook").chmod(0o755)
    git(tmp_path, "config", "core.fsmonitor", str(tmp_path / "hook"))
    assert Look.at(tmp_path).found() is not None
    assert not (tmp_path / "ran").exists()
