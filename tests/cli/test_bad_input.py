"""Bad input gives one clear message, exit code 2 and no traceback, and no data is lost."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.config.options import Config
from shoal.errors import LaunchError
from shoal.launch.torchrun import plan_processes
from shoal.system.cpu import count_cores
from tests.cli.commands import Place, clean_environment
from tests.disks import small_disk

TOO_MANY = 4 * count_cores() + 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Return a folder with one finished run, `done`."""
    place = Place(tmp_path_factory.mktemp("bad"))
    place.good("train", "recipe.yaml", "--name", "done", "--train.steps", "6", "--processes", "1")
    return place


def test_config_problems_come_together_before_anything_starts(place: Place) -> None:
    output = place.refused(
        "train",
        "recipe.yaml",
        "--optim.learning_rate",
        "1",
        "--train.steps",
        "many",
        "--model.num_heads",
        "5",
        "--no",
        "x",
    )
    assert "3 problems in the config" in output
    assert "--optim.learning_rate: there is no option optim.learning_rate; did you mean optim.lr?" in output
    assert "--train.steps: train.steps must be an integer of at least 1 (steps), or null, not 'many'" in output
    assert "--no: there is no option no" in output
    output = place.refused(
        "train", "recipe.yaml", "--model.num_heads", "5", "--train.global_batch=17", "--model.vocab_size", "100"
    )
    assert "num_heads" in output
    assert "train.micro_batch 2 does not divide train.global_batch 17; set train.global_batch to 18" in output
    assert "model.vocab_size 100 is smaller than the tokenizer's 257" in output
    assert not (place.folder / "runs" / "recipe").exists()


@pytest.mark.ci
def test_memory_that_cannot_be_had_ends_a_run_once_with_what_would_fit(place: Place) -> None:
    """Two real processes allocate a matrix beyond any address space."""
    output = place.refused("train", "recipe.yaml", "--name", "huge", "--model.dim", str(2**23))
    for said in ("281,475.0 GB", "train.micro_batch 1", "train.activation_checkpointing full", "parallel.dp_shard 2"):
        assert output.count(said) == 1


RUNS_OUT = """
import sys
from shoal.training import loop
def train(config, stop, heartbeat):
    for step in range(1, 2 + int(sys.argv[1])):
        heartbeat.begin(step)
    raise MemoryError
loop.train = train
from shoal.cli import main
sys.exit(main(["train", "recipe.yaml", "--name", "out", "--processes", "1"]))
"""


# Running out of memory after successful steps is a crash: a restart may succeed. Before the first step, it is an error.
@pytest.mark.parametrize(("steps", "code"), [(0, 2), (3, 1)])
def test_memory_that_runs_out_is_a_crash_only_after_steps_that_fitted(place: Place, steps: int, code: int) -> None:
    worker = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [sys.executable, "-c", RUNS_OUT, str(steps)],
        cwd=place.folder, env=clean_environment() | worker, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert done.stderr.count("train.activation_checkpointing full") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.ci
def test_others_that_never_come(place: Place) -> None:
    """Start one process with another launcher's variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output = place.refused("train", "recipe.yaml", "--name", "alone", "--launch.timeout_seconds", "2", **worker)
    assert f"127.0.0.1:{port}" in output
    assert "rank 0 of 2" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["train", "recip.yaml"], "did you mean recipe.yaml?"),
        (["train"], "shoal train needs a recipe"),
        (["trian", "recipe.yaml"], "invalid choice: 'trian'"),
        (["eval", "nowhere"], "runs/nowhere is not a run; there are done"),
        (["train", "no\x1b[2Jsuch.yaml"], "no\\x1b[2Jsuch.yaml"),
        (["eval", "done", "--step", "77"], "has no checkpoint of step 77; it has steps 5, 6"),
        (["eval", "done", "--tokens", "3"], "shoal eval does not take --tokens"),
        (["generate", "done", "--prompt", "x" * 80], "the prompt has 80 tokens, and the model's context is 64"),
        (["generate", "done", "--prompt", ""], "an empty --prompt"),
        (["generate", "done", "--prompt", "a", "--top-p", "1.5"], "1.5; it must be above 0 and at most 1"),
        (["config"], "shoal config needs a recipe"),
        (["prepare", "recipe.yaml", "--data.corpus", "text"], "set data.paths"),
        (["train", "recipe.yaml", "--parallel.dp_replicate", "4"], "parallel.dp_replicate 4 needs 4 processes, but launch.processes is 2"),
        (["train", "recipe.yaml", "--processes", "8", "--train.micro_batch", "4"], "4 micro-batches, fewer than the 8 data-parallel ranks of launch.processes 8; set launch.processes to 4, or train.global_batch to 32, or train.micro_batch to 2"),
        (["train", "recipe.yaml", "--processes", str(TOO_MANY), "--train.global_batch", str(2 * TOO_MANY)], f"{TOO_MANY} processes are too many"),
        (["train", "recipe.yaml", "--train.device", "cuda"], "there is no CUDA device"),
        (["train", "recipe.yaml", "--train.dtype", "float16"], "a thousand times slower"),
        (["train", "recipe.yaml", "--data.seq_len", "65"], "data.seq_len 65 exceeds model.max_seq_len 64"),
    ],
)  # fmt: skip
def test_refusals(place: Place, arguments: list[str], words: str) -> None:
    assert words in place.refused(*arguments, CUDA_VISIBLE_DEVICES="")


WITHOUT_TORCH = """
import sys
from shoal.cli import _run
from shoal.errors import ShoalError
for line in sys.stdin.read().splitlines():
    try:
        _run(line.split())
    except ShoalError as error:
        print(str(error).replace(chr(10), " "))
    assert "torch" not in sys.modules, line
"""


def test_names_files_and_options_are_judged_before_torch_is_imported(place: Place) -> None:
    """In one process: a typo should not cost the seconds that importing torch takes."""
    (place.folder / "taken").mkdir(exist_ok=True)
    (place.folder / "taken" / "file").touch()
    wrong = {
        "eval doen": "did you mean done?",
        "generate doen --prompt a": "did you mean done?",
        "export doen --out out": "did you mean done?",
        "eval done --step 77": "no checkpoint of step 77",
        "eval done --text gone.txt": "cannot read gone.txt",
        "eval done --tasks a --include-path gone": "there is no folder gone",
        "eval --model.from taken": "config.json",
        "generate done --prompt a --top-p 2": "--top-p is 2.0",
        "generate --model.from gone --prompt a": "there is no folder gone",
        "export done --out taken": "taken already exists",
    }
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input="\n".join(wrong), cwd=place.folder, env=clean_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(wrong), said
    for line, (command, words) in zip(said, wrong.items(), strict=True):
        assert words in line, command


def test_names_of_files_do_not_reach_the_terminal_as_they_are(place: Place) -> None:
    folder = place.folder / "hostile"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"the good text number {number} " * 20, encoding="utf-8")
    (folder / "a\x1b]0;owned\x07\nshoal: all is well.txt").write_bytes(b"\xff\xff")
    output = place.good("prepare", "recipe.yaml", "--data.corpus", "text", "--data.paths", "hostile")
    assert "\x1b" not in output
    assert "a\\x1b]0;owned\\x07\\nshoal: all is well.txt" in output
    assert not any(line.startswith("shoal: all is well") for line in output.splitlines())


def test_a_port_that_is_taken(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        output = place.refused("train", "recipe.yaml", "--name", "port", "--launch.port", str(port))
    assert f"port {port} is in use" in output


def test_a_corpus_that_is_empty_or_not_text(place: Place) -> None:
    folder = place.folder / "texts"
    folder.mkdir()
    arguments = ["prepare", "recipe.yaml", "--data.corpus", "text", "--data.paths", "texts"]
    assert "texts" in place.refused(*arguments)
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    for number in range(30):
        (folder / f"good{number}.txt").write_text(f"the good text number {number} " * 20, encoding="utf-8")
    output = place.good(*arguments)
    assert "bad.txt" in output
    assert "UTF-8" in output
    (folder / "good0.txt").write_text("another text " * 20, encoding="utf-8")
    output = place.refused(*arguments)
    assert "good0.txt" in output
    assert "--data.rebuild true" in output
    assert "documents" in place.good(*arguments, "--data.rebuild", "true")


def test_a_shard_that_was_altered_or_cut_short(place: Place) -> None:
    shard = next((place.folder / "data").glob("dummy-*/train-00000.safetensors"))
    whole = shard.read_bytes()
    try:
        shard.write_bytes(whole[:-100])
        assert shard.name in place.refused("train", "recipe.yaml", "--name", "shard")
        altered = bytearray(whole)
        altered[len(whole) // 2] ^= 1
        shard.write_bytes(bytes(altered))
        output = place.refused("train", "recipe.yaml", "--name", "shard")
        assert shard.name in output
        assert output.count("--data.rebuild true") == 1  # both workers find the damage; one prints it
        assert "--data.rebuild true" in output
    finally:
        shard.write_bytes(whole)


def test_a_checkpoint_that_was_cut_short_or_is_of_another_model(place: Place) -> None:
    copy = place.folder / "runs" / "broken"
    shutil.copytree(place.folder / "runs" / "done", copy, symlinks=True)
    shard = next((copy / "checkpoints" / "latest").glob("*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    assert "was cut short or grew" in place.refused("eval", copy.name)
    shard.write_bytes(whole)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("  dim: 32", "  dim: 48"))
    assert "belongs to another model" in place.refused("eval", copy.name)
    assert len(list((copy / "checkpoints").glob("step-*"))) == 2  # nothing was deleted


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(place: Place) -> None:
    copy = place.folder / "runs" / "torn"
    shutil.copytree(place.folder / "runs" / "done", copy, symlinks=True)
    shard = next((copy / "checkpoints" / "latest").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    output = place.good("train", "recipe.yaml", "--name", copy.name, "--train.steps", "6", "--processes", "1")
    assert "was cut short or grew" in output
    assert "and the one before it is used" in output
    assert "resumed from runs/torn/checkpoints/step-00000005" in output
    assert "damaged" in place.events(copy.name)
    assert len(list((copy / "checkpoints").glob("damaged-step-*"))) == 1


def test_the_runs_cannot_be_written(place: Place) -> None:
    (place.folder / "file").write_text("")
    assert "cannot be written" in place.refused("train", "recipe.yaml", "--launch.runs", "file/runs")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "1m") as disk:
        yield disk


def test_a_disk_that_is_full_while_preparing(place: Place, disk: Path) -> None:
    (disk / "filler").write_bytes(b"x" * 1_000_000)
    output = place.refused(
        "prepare", "recipe.yaml", "--data.folder", str(disk / "data"), "--data.dummy_documents", "500"
    )
    assert "free" in output


@pytest.mark.ci
def test_a_disk_that_is_full_while_saving_costs_the_checkpoint_and_not_the_run(place: Place, disk: Path) -> None:
    code, output = place.run(
        "train", "recipe.yaml", "--name", "full", "--launch.runs", str(disk), "--processes", "1", "--train.steps", "12",
        "--model.dim", "64",
    )  # fmt: skip
    assert code == 2, output  # it trained to the end, and could not save the result
    assert "the disk is full: no checkpoint of step 5" in output
    assert (
        "step 12/12" in output
    )  # training continued; the message may come with the last step: the save runs beside training
    assert "the last checkpoint could not be written" in output
    assert "Traceback" not in output


def test_more_processes_than_gpus_are_refused_without_one() -> None:
    config = Config().replace("launch", processes=4).replace("train", steps=1, device="cuda")
    with pytest.raises(LaunchError, match="4 processes need 4 GPUs, but there are 2"):
        plan_processes(config, gpus=2)
    assert plan_processes(Config().replace("train", steps=1), gpus=8).launch.processes == 8
    assert plan_processes(Config().replace("train", steps=1, device="cpu"), gpus=8).launch.processes in (1, 2)


def test_a_gpu_without_bfloat16_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from shoal.mesh.mesh import check_dtype

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(LaunchError, match=r"Tesla T4 does not support bfloat16; set train\.dtype to float32"):
        check_dtype("bfloat16", torch.device("cuda", 0))
    check_dtype("float32", torch.device("cuda", 0))
    check_dtype("bfloat16", torch.device("cpu"))
