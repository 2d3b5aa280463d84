"""The Kubernetes Job and the image of docs/kubernetes: valid by the published schemas, and consistent with shoal."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shoal.commands.flags import read_overrides
from shoal.commands.parser import build_parser
from shoal.config.options import Config
from shoal.errors import EXIT_BAD_INPUT, EXIT_REQUEUE
from shoal.resolve.layout_checks import refusals_of_machines
from shoal.resolve.recipe import find_recipe
from shoal.resolve.resolve import resolve
from tests.packaged import make_files

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "kubernetes"
SERVICE, JOB = yaml.safe_load_all((FOLDER / "job.yaml").read_text(encoding="utf-8"))
POD = JOB["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]
VERSIONS = ["1.31", "1.33", "1.35", "1.37"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", [SERVICE, JOB], ids=lambda m: m["kind"])
def test_the_published_schema_accepts_it(manifest: dict[str, Any], version: str) -> None:
    assert kubernetes_validate.validate(manifest, version, strict=True) == version


@pytest.mark.parametrize(
    ("place", "value"),
    [("completionMode", 1), ("completion", 2), ("parallelism", "two"), ("podFailurePolicy", {"rules": [{"act": "x"}]})],
)
def test_the_published_schema_rejects_mistakes(place: str, value: object) -> None:
    broken = copy.deepcopy(JOB)
    broken["spec"][place] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_the_pods_find_each_other() -> None:
    job, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["publishNotReadyAddresses"] is True
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": job}  # Kubernetes gives pods this label
    assert JOB["spec"]["completionMode"] == "Indexed"
    assert POD["subdomain"] == service
    first = f"{job}-0.{service}"  # an indexed Job's pods have the host names JOB-0, JOB-1, ...
    assert asked_config().launch.rendezvous == f"{first}:29400"
    [waiting] = POD["initContainers"]
    assert first in waiting["command"][-1]
    assert waiting["image"] == CONTAINER["image"]


def asked_config() -> Config:
    """Return the config of the container's command."""
    args, rest = build_parser("train").parse_known_args(CONTAINER["args"])
    overrides, stray = read_overrides(args, rest)
    assert not stray
    return resolve(find_recipe(args.recipe), overrides).config


@pytest.fixture(autouse=True)
def with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_files(find_recipe(Path(CONTAINER["args"][1])), tmp_path)


def test_the_command_fits_the_pods() -> None:
    config = asked_config()
    assert config.launch.nodes == JOB["spec"]["completions"] == JOB["spec"]["parallelism"]
    assert config.launch.processes == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert not list(refusals_of_machines(config, config.launch.processes))


def test_exit_codes_mean_what_shoal_means() -> None:
    assert POD["restartPolicy"] == "Never"  # required by podFailurePolicy
    rules = JOB["spec"]["podFailurePolicy"]["rules"]
    codes = {tuple(rule["onExitCodes"]["values"]): rule["action"] for rule in rules if "onExitCodes" in rule}
    assert codes == {(EXIT_BAD_INPUT,): "FailJob", (EXIT_REQUEUE,): "Ignore"}
    assert all(r["onExitCodes"]["containerName"] == CONTAINER["name"] for r in rules if "onExitCodes" in r)
    assert [r["action"] for r in rules if "onPodConditions" in r] == ["Ignore"]


def test_the_user_of_the_image_is_the_pods_user() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    [user] = re.findall(r"^USER (\d+)$", text, re.MULTILINE)
    assert POD["securityContext"]["runAsUser"] == POD["securityContext"]["fsGroup"] == int(user)
    assert f"--uid {user} " in text
    [mount] = [m["mountPath"] for m in CONTAINER["volumeMounts"] if m["name"] == "work"]
    assert text.count(f"WORKDIR {mount}\n") == 1


@pytest.mark.ci
def test_the_image_gets_all_files_that_its_installation_needs(tmp_path: Path) -> None:
    """Copy what the Dockerfile copies, and build shoal's wheel from that alone."""
    place = tmp_path / "image"
    place.mkdir()
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    for names in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in names.split():
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, place / name)
    assert (place / "constraints.txt").is_file()
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    subprocess.run(build, cwd=place, check=True, capture_output=True)
    [wheel] = (tmp_path / "wheel").glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {"shoal/cli.py", "shoal/recipes/scale/llama-1b.yaml"} <= packed
