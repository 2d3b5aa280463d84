"""Out of memory: real errors are recognized, and the advice is valid."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from shoal.config.data_options import Data
from shoal.config.options import Config, Model, Optim, Parallel, Train
from shoal.plan.estimate import parameter_count
from shoal.plan.fit import what_ran_out, what_would_fit

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 12.94 MiB is free. "
    "Including non-PyTorch memory, this process has 79.08 GiB memory in use. See documentation for Memory Management."
)


def config(**train: object) -> Config:
    return Config(
        model=Model(dim=64, num_layers=4, num_heads=4, vocab_size=256),
        data=Data(seq_len=1024),
        train=Train(**{"global_batch": 48, "micro_batch": 8, "dtype": "float32", **train}),  # type: ignore[arg-type]
    )


def error_of(work: object) -> BaseException:
    assert callable(work)
    with pytest.raises((RuntimeError, MemoryError)) as found:
        work()
    return found.value


def test_the_cpus_allocators_are_believed() -> None:
    assert what_ran_out(error_of(lambda: torch.empty(1 << 50, dtype=torch.uint8))) == (
        "1,125,899.9 GB more could not be allocated"
    )
    assert "Unable to allocate" in (what_ran_out(error_of(lambda: np.empty(1 << 60, dtype=np.uint8))) or "")
    assert what_ran_out(MemoryError())
    assert what_ran_out(OSError(errno.ENOMEM, "Cannot allocate memory"))


def test_a_gpus_allocator_is_believed_with_its_numbers_also_inside_a_compilers_error() -> None:
    outer = RuntimeError("backend failed")
    outer.__cause__ = torch.OutOfMemoryError(CUDA)
    for error in (torch.OutOfMemoryError(CUDA), outer):
        said = what_ran_out(error)
        assert said is not None
        assert "20.00 GiB" in said
        assert "79.10 GiB" in said
        assert "See documentation" not in said
    assert what_ran_out(RuntimeError("CUDA error: out of memory\nCompile with ...")) == "CUDA error: out of memory"


def test_other_errors_are_not_about_memory() -> None:
    for error in (RuntimeError("CUDA error: an illegal memory access was encountered"), OSError(errno.ENOSPC, "full")):
        assert what_ran_out(error) is None


def test_what_is_advised_is_what_is_not_done_yet() -> None:
    text = what_would_fit(config(), 4)
    for option in ("train.micro_batch 4", "48", "train.activation_checkpointing full", "parallel.dp_shard 4"):
        assert option in text
    done = config(micro_batch=1, activation_checkpointing="full").replace("parallel", dp_shard=4)
    assert "micro_batch" not in what_would_fit(done, 4)
    assert "activation_checkpointing" not in what_would_fit(done, 4)
    assert "parallel.dp_shard" in what_would_fit(done, 4)  # sharded over more processes
    assert "parallel.dp_replicate 1" in what_would_fit(config().replace("parallel", dp_replicate=2, dp_shard=2), 4)


def test_nothing_is_advised_that_would_be_refused() -> None:
    pipelined = config().replace("parallel", pp=2, pp_schedule="zbv")
    assert "activation_checkpointing" not in what_would_fit(pipelined, 2)  # zbv supports no checkpointing
    assert "micro_batch" in what_would_fit(pipelined, 2)


@pytest.mark.parametrize(
    ("parallel", "world", "share"),
    [
        (Parallel(), 4, 1),
        (Parallel(dp_shard=4), 4, 4),
        (Parallel(dp_shard=2, cp=2), 4, 4),
        (Parallel(cp=2), 2, 1),
        (Parallel(tp=2), 4, 2),
    ],
)
def test_what_a_process_holds_is_its_share(parallel: Parallel, world: int, share: int) -> None:
    big = Model(dim=1024, num_layers=8, num_heads=8, vocab_size=32000)
    held = 16 * parameter_count(big) / share / 1e9
    settled = Config(model=big, data=Data(seq_len=1024), train=Train(global_batch=48, micro_batch=8), parallel=parallel)
    assert f" {held:,.1f} GB " in what_would_fit(settled, world)
    assert f" {held * 12 / 16:,.1f} GB " in what_would_fit(
        Config(**{**vars(settled), "optim": Optim(name="muon")}), world
    )


def test_an_unknown_vocabulary_is_left_out_of_the_count() -> None:
    assert "at least" in what_would_fit(config().replace("model", vocab_size=None), 1)
