"""The scripts of scripts/launch and scripts/setup: free of shellcheck's findings, and each runs the command that it promises."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.commands.flags import read_overrides
from shoal.commands.parser import build_parser
from shoal.hub.catalog import CATALOG
from shoal.resolve.recipe import find_recipe
from shoal.resolve.resolve import resolve
from tests.cli.commands import RECIPE, clean_environment
from tests.cli.public_datasets import datasets
from tests.hub.conftest import one_file, weights
from tests.hub.server import Hub, Repository, running_hub
from tests.packaged import make_files

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "scripts" / "launch").glob("*.sh"), *(ROOT / "scripts" / "setup").glob("*.sh")])
MODEL = "org/tiny"
SPY = '#!/bin/sh\nprintf "%s\\n" "$PWD" "$@" -- >>"$SPY"\n'
SHOAL = f'#!/bin/sh\nexec {sys.executable} -m shoal "$@"\n'


class Scripts:
    """A copy of the scripts in which `shoal` is `program`, and the folder where a user starts them."""

    def __init__(self, folder: Path, program: str) -> None:
        self.repository, self.work, self._calls = folder / "repository", folder / "work", folder / "calls"
        shutil.copytree(ROOT / "scripts", self.repository / "scripts")
        self.work.mkdir()
        (self.repository / ".venv" / "bin").mkdir(parents=True)
        write_program(self.repository / ".venv" / "bin" / "shoal", program)

    def run(self, script: str, *arguments: str, code: int = 0, **environment: str) -> str:
        """Run a script from the working folder; return its output."""
        done = subprocess.run(
            ["bash", self.repository / "scripts" / script, *arguments],
            cwd=self.work, env=clean_environment() | {"SPY": str(self._calls)} | environment,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=200,
        )  # fmt: skip
        assert done.returncode == code, done.stdout
        return done.stdout

    def calls(self, script: str, *arguments: str, **environment: str) -> list[list[str]]:
        """Return the arguments of each call of shoal, all of them from the working folder."""
        self.run(script, *arguments, code=0, **environment)
        found = [call.splitlines() for call in self._calls.read_text(encoding="utf-8").split("--\n")[:-1]]
        assert {folder for folder, *_ in found} == {str(self.work)}
        return [call for _, *call in found]


def write_program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def spied(tmp_path: Path) -> Scripts:
    """Return the scripts, with a shoal that only records its arguments."""
    return Scripts(tmp_path, SPY)


@pytest.fixture
def real(tmp_path: Path) -> Scripts:
    scripts = Scripts(tmp_path, SHOAL)
    (scripts.work / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return scripts


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """Run a hub with a small copy of each known dataset, and a model."""
    with running_hub() as hub:
        for name, files in datasets().items():
            hub.repositories[name] = Repository(files, "datasets")
        hub.repositories[MODEL] = Repository(one_file())
        yield hub


def test_shellcheck_finds_nothing() -> None:
    everything = sorted((ROOT / "scripts").glob("**/*.sh"))
    assert set(SCRIPTS) <= set(everything)
    command = [str(Path(sys.executable).with_name("shellcheck")), *map(str, everything)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("script", "asked", "expected"),
    [
        ("single_gpu.sh", {}, {"launch.processes": 1}),
        ("multi_gpu.sh", {"GPUS": "4"}, {"launch.processes": 4}),
        ("multi_gpu.sh", {}, {"launch.processes": None}),
        ("train_ddp.sh", {"GPUS": "4"}, {"parallel.dp_replicate": -1, "parallel.dp_shard": 1, "launch.processes": 4}),
        ("train_fsdp.sh", {"GPUS": "2"}, {"parallel.dp_replicate": 1, "parallel.dp_shard": -1, "launch.processes": 2}),
    ],
)
@pytest.mark.parametrize("recipe", ["", "quickstart"])
def test_a_script_trains_a_recipe_in_its_layout(
    script: str,
    asked: dict[str, str],
    expected: dict[str, object],
    recipe: str,
    spied: Scripts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Read the command with shoal's own parser, and resolve it. Without RECIPE, the script has one of its own."""
    [[verb, *arguments]] = spied.calls(
        f"launch/{script}", "--train.steps", "7", **asked, **({"RECIPE": recipe} if recipe else {})
    )
    assert verb == "train"
    args, rest = build_parser(verb).parse_known_args([verb, *arguments])
    overrides, stray = read_overrides(args, rest)
    assert not stray
    assert str(args.recipe).startswith(recipe or "scale/")
    monkeypatch.chdir(spied.work)
    make_files(find_recipe(args.recipe), spied.work)
    config = resolve(find_recipe(args.recipe), overrides).config
    assert config.train.steps == 7
    for key, value in expected.items():
        section, _, option = key.partition(".")
        assert getattr(getattr(config, section), option) == value


def test_a_batch_script_is_written_and_not_submitted(real: Scripts) -> None:
    real.run(
        "launch/slurm_multi_node.sh", "--train.steps=9", RECIPE="recipe.yaml", NODES="2", GPUS_PER_NODE="4",
        TIME_LIMIT="00:30:00", SUBMIT="0",
    )  # fmt: skip
    [written] = real.work.glob("runs/recipe/jobs/*.sbatch")
    text = written.read_text(encoding="utf-8")
    for line in ("#SBATCH --nodes=2", "#SBATCH --time=00:30:00"):
        assert line in text
    assert "--train.steps=9" in text


def test_a_run_is_submitted_where_sbatch_is_and_else_started_here(spied: Scripts, tmp_path: Path) -> None:
    slurm, without = tmp_path / "slurm", tmp_path / "without"
    for folder in (slurm, without):
        folder.mkdir()
        for tool in ("bash", "dirname", "env", "sh"):
            (folder / tool).symlink_to(shutil.which(tool) or tool)
    write_program(slurm / "sbatch", SPY)
    here = {"RECIPE": "mine", "GPUS": "2", "PATH": str(without)}
    train = ["train", "mine", "--processes", "2", "--seed", "3"]
    assert spied.calls("launch/submit.sh", "--seed", "3", **here) == [train]
    job = ["launch", "slurm", "mine", "--nodes", "2", "--time", "24:00:00", "--submit", "--seed", "3"]
    assert spied.calls("launch/submit.sh", "--seed", "3", **here | {"PATH": str(slurm)})[1:] == [job]
    hosts = ["launch", "hosts", "mine", "--hosts-file", "hosts.txt", "--seed", "3"]
    assert spied.calls("launch/submit.sh", "--seed", "3", **here, HOSTS_FILE="hosts.txt")[2:] == [hosts]


@pytest.mark.ci
@pytest.mark.parametrize("script", ["single_gpu.sh", "train_fsdp.sh"])
def test_a_script_trains(script: str, real: Scripts) -> None:
    real.run(f"launch/{script}", "--train.steps", "3", RECIPE="recipe.yaml", GPUS="2")
    records = [json.loads(line) for line in (real.work / "runs/recipe/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]


@pytest.mark.ci
def test_what_has_changed_on_the_hub_is_downloaded_only_on_request(real: Scripts, hub: Hub) -> None:
    asked = {
        "DATA": "tinystories wikitext-103", "MODEL": MODEL, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(real.work / "home"),
    }  # fmt: skip
    file, model = real.work / "models" / MODEL / "model.safetensors", hub.repositories[MODEL]
    real.run("launch/download_data_model.sh", code=0, **asked)
    for dataset in asked["DATA"].split():
        first = CATALOG[dataset].files[0].split("*")[0]
        assert any(first in name for name in hub.asked)
    old = file.read_bytes()
    assert old == model.files[file.name]

    model.files[file.name] = new = weights("a", 300_000, 7)
    model.commit = "f" * 40
    for again, expected in (("0", old), ("1", new)):
        real.run("launch/download_data_model.sh", code=0, **asked, FORCE_REFRESH=again)
        assert file.read_bytes() == expected


def test_nothing_is_downloaded_of_an_empty_name(spied: Scripts) -> None:
    assert spied.calls("launch/download_data_model.sh", DATA="", MODEL="a/b", RECIPE="mine") == [
        ["fetch", "model", "a/b"],
        ["prepare", "mine"],
    ]


def test_a_script_without_shoal_names_the_one_that_installs_it(spied: Scripts, tmp_path: Path) -> None:
    (spied.repository / ".venv" / "bin" / "shoal").unlink()
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    output = spied.run("launch/single_gpu.sh", code=2, PATH=str(tools))
    assert output == (f"shoal is not installed; run bash {spied.repository}/scripts/setup/install_dependencies.sh\n")


class Machine:
    """A machine whose programs are links, and whose package manager "installs" by making such links."""

    def __init__(self, folder: Path, *programs: str) -> None:
        self.bin, self.installed = folder / "bin", folder / "installed"
        self.bin.mkdir()
        for program in ("bash", "dirname", "echo", "ln", "sed", "sh", *programs):
            (self.bin / program).symlink_to(shutil.which(program) or program)
        (self.bin / "python3").symlink_to(sys.executable)
        write_program(self.bin / "id", "#!/bin/sh\necho 0\n")

    def with_apt(self) -> None:
        links = f'for p; do case $p in -*|install|update) ;; *) ln -s "$(PATH=$REAL command -v "$p")" {self.bin}/"$p";; esac; done'
        write_program(self.bin / "apt-get", f'#!/bin/sh\necho "$@" >>{self.installed}\n{links}\n')


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository whose `make setup` only reports that it ran."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "scripts" / "setup", folder / "scripts" / "setup")
    (folder / "Makefile").write_text("setup:\n\t@echo made\nclean:\n\t@echo cleaned\n", encoding="utf-8")
    return folder


def install(repository: Path, machine: Machine, code: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [machine.bin / "bash", repository / "scripts" / "setup" / "install_dependencies.sh"],
        env={"PATH": str(machine.bin), "REAL": os.environ["PATH"]} | environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def test_missing_programs_are_installed_and_others_are_not(repository: Path, tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git")
    machine.with_apt()
    assert install(repository, machine).endswith("install: installing make from the system's packages\nmade\n")
    assert machine.installed.read_text(encoding="utf-8").splitlines()[-1].split()[-1] == "make"
    before = machine.installed.read_bytes()
    assert install(repository, machine) == "made\n"
    assert install(repository, machine, FORCE_REFRESH="1") == "cleaned\nmade\n"
    assert machine.installed.read_bytes() == before


def test_a_machine_without_a_package_manager_is_told_what_is_missing(repository: Path, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert "missing: git make; install them" in install(repository, machine, code=2)


def test_an_active_conda_environment_is_used(repository: Path, tmp_path: Path) -> None:
    machine = Machine(tmp_path, "git", "make")
    write_program(machine.bin / "python", '#!/bin/sh\necho "python $@"\n')
    output = install(repository, machine, CONDA_PREFIX="/opt/conda/envs/lab")
    assert "/opt/conda/envs/lab" in output
    assert output.endswith("python -m pip install -q --constraint constraints.txt --editable .\n")
