"""`shoal report`, and the report that a run leaves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shoal.commands.flags import read_overrides
from shoal.commands.parser import build_parser
from shoal.commands.report import leave_report
from shoal.errors import ShoalError
from shoal.run.console import Console
from tests.report.made_runs import make_run


def report(*arguments: str) -> int:
    """Run `shoal report ARGUMENTS` in this process, and return its exit code."""
    argv = ["report", *arguments]
    args, rest = build_parser("report").parse_known_args(argv)
    overrides, _ = read_overrides(args, rest)
    code: int = args.run(args, overrides, argv) or 0
    return code


def test_a_report_of_one_run_lies_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "a", 30)
    assert report("a", "--format", "html,md") == 0
    assert "wrote runs/a/report.html (" in capsys.readouterr().out
    assert (tmp_path / "runs/a/report.html").read_bytes().startswith(b"<!doctype html>")
    assert "| a | finished | 30 of 30 |" in (tmp_path / "runs/a/report.md").read_text()


def test_a_report_of_several_runs_lies_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        make_run(tmp_path / "runs" / name, 30)
    assert report("runs/a", "b") == 0
    assert (tmp_path / "runs/report.html").is_file()
    assert report("a", "b", "--out", "out/both.md") == 0
    assert "## What differs" in (tmp_path / "out/both.md").read_text()


@pytest.mark.ci
def test_a_report_as_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "a", 30)
    assert report("a", "--format", "png,svg") == 0
    assert (tmp_path / "runs/a/report.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "runs/a/report.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "runs/nothing is not a run"),
        (["a", "--format", "pdf"], "--format must be some of html, md, png, svg, not pdf"),
        (["a", "--out", "runs/a/config.yaml/x.html"], "cannot be written: "),
    ],
)
def test_what_cannot_be_reported_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs" / "a", 30)
    with pytest.raises(ShoalError, match=re.escape(words)):
        report(*arguments)


def test_a_run_leaves_its_report_and_never_fails_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", 30)
    leave_report(run.path, Console())
    assert (run.path / "report.html").is_file()
    (run.path / "report.html").unlink()
    (run.path / "report.html").mkdir()
    leave_report(run.path, Console())
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("report: ")
    assert second.startswith("no report was written: ")
