"""`shoal setup`: folders, environment, caches, and what jobs read."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.errors import LaunchError
from shoal.launch.setup import make, plan_project
from shoal.launch.site import Site
from tests.cli.commands import Place


def shell(script: Path, command: str) -> str:
    """Return what a command prints in a shell that has read the script."""
    return subprocess.run(
        ["sh", "-c", f". {shlex.quote(str(script))}; {command}"], capture_output=True, text=True, check=True
    ).stdout


def test_the_active_conda_environment_is_used(tmp_path: Path) -> None:
    project = plan_project(tmp_path, "mine", {"CONDA_PREFIX": "/opt/conda/envs/x"}, prefix="/opt/conda/envs/x")
    assert (project.environment, project.is_new) == (Path("/opt/conda/envs/x"), False)
    # another environment runs this command than the active one
    other = plan_project(tmp_path, "mine", {"CONDA_PREFIX": "/opt/conda/envs/x"}, prefix="/usr")
    assert (other.environment, other.is_new) == (tmp_path / "mine" / "env", True)


def test_an_environment_on_the_shared_disk_is_used(tmp_path: Path) -> None:
    ours = tmp_path / "envs" / "a"
    ours.mkdir(parents=True)
    assert plan_project(tmp_path, "mine", {}, prefix=str(ours)).environment == ours
    done = tmp_path / "mine" / "env" / "bin"
    done.mkdir(parents=True)
    (done / "shoal").touch()
    assert plan_project(tmp_path, "mine", {}, prefix="/usr").is_new is False


def test_what_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "a disk"
    shared.mkdir()
    said: list[str] = []
    project = plan_project(shared, "mine", {"CONDA_PREFIX": sys.prefix}, prefix=sys.prefix)
    make(project, said.append)
    assert shell(project.folder / "activate.sh", "command -v python; echo $HF_HUB_CACHE").splitlines() == [
        f"{sys.prefix}/bin/python", f"{project.folder}/cache/huggingface/hub",
    ]  # fmt: skip
    monkeypatch.chdir(project.folder)
    site = Site.read(None)
    assert site.setup == (f". '{project.folder}/activate.sh'",)
    assert site.partition is None
    (project.folder / "cluster.yaml").write_text("partition: mine\n")
    make(project, said.append)  # again: what exists is kept
    assert Site.read(None).partition == "mine"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-x"])
def test_names_that_are_no_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(LaunchError, match="folder's name"):
        plan_project(tmp_path, name, {})


def test_bad_input(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "file").touch()
    for shared in ("none", "file"):
        code, output = place.run("setup", "--shared", shared, "--project", "mine")
        assert (code, "is not a folder" in output) == (2, True), output


def test_this_environment_then_the_node(tmp_path: Path) -> None:
    place = Place(tmp_path)
    code, output = place.run("setup", "--shared", ".", "--project", "mine", CONDA_PREFIX=sys.prefix)
    assert code in (0, 1), output
    assert "Traceback" not in output
    assert f"environment: {sys.prefix}" in output
    assert "1 node: " in output or "of 1 node" in output


def test_a_new_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installer is the one of `make setup`; here it only says where it would install."""
    bash = tmp_path / "bin" / "bash"
    bash.parent.mkdir()
    bash.write_text(f'#!/bin/sh\necho "$1" >{tmp_path}/called\nmkdir -p "$VENV/bin" && touch "$VENV/bin/python"\n')
    bash.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bash.parent}:/usr/bin:/bin")
    project = plan_project(tmp_path, "mine", {}, prefix="/usr")
    make(project, print)
    assert Path((tmp_path / "called").read_text().strip()).name == "install.sh"
    assert project.python == tmp_path / "mine" / "env" / "bin" / "python"
    assert project.python.exists()
    bash.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(LaunchError, match="ended with 3"):
        make(plan_project(tmp_path, "other", {}, prefix="/usr"), print)
