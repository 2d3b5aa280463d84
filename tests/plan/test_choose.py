"""`shoal plan`: devices, the order of layouts, what is printed, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Train
from shoal.errors import ShoalError
from shoal.plan.choice.choose import choose
from shoal.plan.choice.table import lines
from shoal.plan.machine import GIB, find_machine

SMALL = Config(
    model=Model(dim=256, num_layers=8, num_heads=8, num_kv_heads=4, ffn_dim=768, vocab_size=2000),
    data=Data(seq_len=256),
    train=Train(global_batch=32, micro_batch=4, dtype="float32", steps=1),
)


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shoal", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_devices() -> None:
    known = find_machine("8xH100-80GB", 4)
    assert (known.world_size, known.memory_bytes, known.cuda) == (32, 81_559 * 2**20, True)
    assert find_machine("rtx4090", 1).name == "RTX4090-24GB"
    assert find_machine("2 x 40GB", 1).memory_bytes == 40 * GIB
    cpu = find_machine("2xcpu-1.5GB", 1)
    assert (cpu.usable_bytes, cpu.cuda) == (3 * GIB // 2, False)


@pytest.mark.parametrize(
    ("devices", "nodes", "words"),
    [
        ("8xH101", 1, "H101 is not in the table; give the memory of one device instead, such as 8x48GB"),
        ("8xH100-80G", 1, "did you mean H100-80GB?"),
        ("4xA100", 1, "A100 is A100-80GB or A100-40GB"),
        ("0x40GB", 1, "give a number and a device"),
        ("8x40GB", 0, "give a number and a device"),
    ],
)
def test_devices_that_are_not_known(devices: str, nodes: int, words: str) -> None:
    with pytest.raises(ShoalError) as error:
        find_machine(devices, nodes)
    assert words in str(error.value)


def test_what_fits_comes_first_and_every_layout_is_there() -> None:
    choices = choose(SMALL, find_machine("4xcpu-0.15GB", 1))
    fits = [c.need.total <= choices.machine.usable_bytes for c in choices.found]
    assert any(fits)
    assert fits == sorted(fits, reverse=True)
    found = {str(c.need.layout) for c in choices.found}
    assert {"dp_replicate 4", "dp_shard 4", "tp 4", "dp_shard 2 x tp 2", "pp 2 x dp_replicate 2", "pp 4"} <= found
    assert any("is probably the fastest" in line for line in lines(choices))


def test_replicas_come_first_if_everything_fits() -> None:
    choices = choose(SMALL, find_machine("4x80GB", 1))
    assert str(choices.found[0].need.layout) == "dp_replicate 4"


def test_what_would_make_it_fit() -> None:
    said = lines(choose(SMALL, find_machine("2xcpu-0.09GB", 1)))
    assert "nothing fits: " in said[-2] or "nothing fits: " in said[-3]
    assert said[-1].startswith("it would fit with train.")


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("train", {"repro": "bitwise"}, "train.repro bitwise"),
        ("train", {"compile": True}, "train.compile"),
        ("train", {"global_batch": 4}, "no layout of this recipe uses all 7 devices"),
    ],
)
def test_what_cannot_be_planned(section: str, values: dict[str, object], words: str) -> None:
    with pytest.raises(ShoalError, match=words):
        choose(SMALL.replace(section, **values), find_machine("7xcpu-1GB", 1))


def test_the_command_needs_no_data() -> None:
    done = plan("scale/llama-8b-64-gpus", "--devices", "8xH100-80GB", "--model.vocab_size", "128256", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == 8_030_261_248
    assert found["layouts"][0]["fits"]
    assert found["layouts"][0]["bytes"] == sum(found["layouts"][0]["parts"].values())


def test_exit_codes() -> None:
    assert plan("quickstart", "--devices", "2xcpu-12GB").returncode == 0
    nothing = plan("quickstart", "--devices", "1xcpu-0.01GB")
    assert nothing.returncode == 1
    assert "nothing fits" in nothing.stdout
    wrong = plan("quickstart", "--devices", "8xH101")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
