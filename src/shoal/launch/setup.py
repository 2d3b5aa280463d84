"""
`shoal setup`: a project's folder on the shared disk, with an environment, caches, and a script that every job reads. No torch.

    DIR/NAME/env/           the virtual environment, unless a conda environment is active
    DIR/NAME/runs/, data/, models/, datasets/, cache/
    DIR/NAME/activate.sh    puts the environment on PATH, and caches on the shared disk
    DIR/NAME/cluster.yaml   the facts of the cluster, for `shoal launch`

What exists is kept, so that the command may be repeated.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import shoal
from shoal.errors import LaunchError
from shoal.launch.site import FILE, Site
from shoal.system.disk import write_whole
from shoal.system.output import on_one_line

FOLDERS: Final = ("runs", "data", "models", "datasets", "cache/huggingface/hub", "cache/tiktoken")
ACTIVATE: Final = "activate.sh"
_CACHES: Final = {"HF_HUB_CACHE": "cache/huggingface/hub", "TIKTOKEN_CACHE_DIR": "cache/tiktoken"}


@dataclass(frozen=True)
class Project:
    """A project's folder on the shared disk, and the environment that its jobs use."""

    folder: Path
    environment: Path  # sys.prefix of its Python
    is_new: bool  # whether `make` creates the environment

    @property
    def python(self) -> Path:
        return self.environment / "bin" / "python"


def plan_project(
    shared: Path, name: str, variables: Mapping[str, str] = os.environ, prefix: str = sys.prefix
) -> Project:
    """
    Return the project that `make` will create: in the active conda environment, in this one if it is on the shared disk, else in
    a new one.

    Raises `LaunchError` if `shared` is not a writable folder, or the name cannot be a folder's.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise LaunchError(
            f"--project {name!r} is not a folder's name; use letters, digits, dots, dashes and underscores"
        )
    if not shared.is_dir():
        raise LaunchError(f"--shared {on_one_line(shared)} is not a folder; make it on a disk that all nodes share")
    if not os.access(shared, os.W_OK):
        raise LaunchError(f"--shared {on_one_line(shared)} cannot be written by this user")
    folder = shared.absolute() / name
    here = Path(prefix)
    is_conda = variables.get("CONDA_PREFIX") == prefix
    if is_conda or here.resolve().is_relative_to(shared.resolve()):
        return Project(folder, here, is_new=False)
    environment = folder / "env"
    return Project(folder, environment, is_new=not (environment / "bin" / "shoal").is_file())


def make(project: Project, say: Callable[[str], None]) -> None:
    """
    Create what the project lacks. say: called with a line for each thing.

    Raises `LaunchError` if the disk cannot be written, or the environment cannot be made.
    """
    try:
        for name in FOLDERS:
            (project.folder / name).mkdir(parents=True, exist_ok=True)
        say(f"folders: {project.folder}")
        if project.is_new:
            say(f"environment: installing into {project.environment}")
            make_environment(project.environment)
        say(f"environment: {project.environment}")
        write_whole(project.folder / ACTIVATE, [activation(project).encode()])
        say(f"every shell and job: . {project.folder / ACTIVATE}")
        site = project.folder / FILE
        if not site.exists():
            write_whole(site, [site_text(project).encode()])
            say(f"facts of the cluster: {site}; set partition and account there if your cluster needs them")
    except OSError as error:
        raise LaunchError(f"{on_one_line(error.filename or project.folder)}: {error.strerror}") from None


def make_environment(folder: Path) -> None:
    """
    Make a virtual environment with shoal and its pinned dependencies, as `make setup` does in the sources' own folder.

    Raises `LaunchError` if shoal does not run from its sources, or the installation fails.
    """
    sources = Path(shoal.__file__).parents[2]
    installer = sources / "scripts" / "install.sh"
    if not installer.is_file():
        raise LaunchError(
            f"shoal runs from {Path(shoal.__file__).parent}, not from its sources, so it cannot install itself; make an "
            f"environment with python -m venv {folder}, install the shoal wheel there, and repeat this command with "
            f"{folder}/bin/shoal; or activate a conda environment that has shoal"
        )
    ours = {"VENV": str(folder), "PYTHON": getattr(sys, "_base_executable", sys.executable)}
    done = subprocess.run(["bash", str(installer)], env=os.environ | ours, stdout=sys.stderr, check=False)
    if done.returncode:
        raise LaunchError(f"{installer} ended with {done.returncode}; its messages are above")


def activation(project: Project) -> str:
    """Return the script that every shell and job of the project reads."""
    folder = shlex.quote(str(project.folder))
    lines = [
        f"# Read this in a shell or a job: . {folder}/{ACTIVATE}",
        f'export PATH={shlex.quote(str(project.environment / "bin"))}:"$PATH"',
        "# Downloads are kept on the shared disk, so that each is fetched once. Compiled code is not: it fits one kind of CPU.",
        *(f"export {name}={shlex.quote(str(project.folder / below))}" for name, below in _CACHES.items()),
    ]
    return "\n".join(lines) + "\n"


def site_text(project: Project) -> str:
    """Return a `cluster.yaml` that reads the project's script in every job, and describes all other keys in comments."""
    lines = ["# The facts of this cluster that all its jobs share. Remove the # before a key to set it."]
    for key in dataclasses.fields(Site):
        if key.name == "setup":
            lines += [f"setup:  # {key.metadata['help']}", f"  - . {shlex.quote(str(project.folder / ACTIVATE))}"]
        else:
            lines.append(f"# {key.name}:  # {key.metadata['help']}")
    return "\n".join(lines) + "\n"
