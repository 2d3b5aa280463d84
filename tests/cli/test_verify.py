"""`shoal verify` from the command line."""

from __future__ import annotations

import json
import platform
import re

import pytest
import torch

from tests.cli.commands import Place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place"))


def _certificate(place: Place) -> dict[str, object]:
    found: dict[str, object] = json.loads((place.folder / "runs" / "verify-recipe" / "certificate.json").read_text())
    return found


def test_pass_ends_with_0_and_leaves_a_certificate(place: Place) -> None:
    output = place.good("verify", "recipe.yaml", "--parallel.dp_shard", "2")
    assert re.search(r"^PASS$", output, re.MULTILINE)
    assert "bitwise identical" in output
    assert "FAIL" not in output
    assert "Warning" not in output
    found = _certificate(place)
    assert found["passed"] is True
    assert found["layout"] == "dp_shard 2"
    machine = found["facts"]["machine"]  # type: ignore[index]
    assert (machine["torch"], machine["python"]) == (torch.__version__, platform.python_version())
    assert machine["threads"] == 1  # from the recipe
    assert machine["instructions"].split(", ")[0] == torch.backends.cpu.get_cpu_capability()
    assert machine["processor"]
    for name, of_torch in (("mkl", "Math Kernel Library"), ("onednn", "MKL-DNN")):  # as torch reports it
        version = re.search(rf"{of_torch}\D*([\d.]+)", torch.__config__.show())
        assert machine.get(name) == (version[1] if version else None)
    assert found["config"]["parallel"]["dp_shard"] == 2  # type: ignore[index]
    kinds = [f["what"] for f in found["findings"]["float32"]]  # type: ignore[index]
    assert kinds == ["loss", "gradient norm", "gradient", "update"]
    assert [p.name for p in (place.folder / "runs" / "verify-recipe").iterdir() if p.name != "lock"] == [
        "certificate.json"
    ]


PLANTED = """
import sys
if "-m" in sys.orig_argv and "RANK" in __import__("os").environ:  # a worker
    import shoal.parallel.runnable as runnable
    plain = runnable.Runnable._publish
    def forgetful(self):
        plain(self)
        if self.mesh.world_size > 1:
            [grad] = [s.tensor.grad for s in self.shards if s.name == "blocks.0.ffn_norm.weight"]
            grad /= 2
    runnable.Runnable._publish = forgetful
"""


def test_fail_ends_with_1_and_names_the_parameter(place: Place) -> None:
    planted = place.folder / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(PLANTED)
    code, output = place.run("verify", "recipe.yaml", PYTHONPATH=str(planted))
    assert code == 1, output
    assert re.search(r"gradient .*worst in blocks\.0\.ffn_norm\.weight  FAIL$", output, re.MULTILINE), output
    assert re.search(r"^FAIL$", output, re.MULTILINE)
    assert _certificate(place)["passed"] is False


@pytest.mark.ci
def test_one_process_is_verified_too(place: Place) -> None:
    output = place.good("verify", "recipe.yaml", "--processes", "1", "--train.activation_checkpointing", "full")
    assert "PASS" in output


def test_a_layout_that_cannot_be_is_refused_before_it_starts(place: Place) -> None:
    output = place.refused("verify", "recipe.yaml", "--parallel.tp", "3", "--processes", "3")
    assert "starting" not in output
    assert "num_heads" in output
