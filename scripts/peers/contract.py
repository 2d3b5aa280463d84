"""
The contract of `scripts/bench_peers.py` with its workers: a JSON spec in, a JSON answer out.

A worker runs in its peer's own environment and imports nothing of shoal: only torch and its peer.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

TURNS: Final = "PEERS_TURNS"  # path of the socket of the benchmark, which lets one contender work at a time


@dataclass(frozen=True, kw_only=True)
class Spec:
    """
    What every contender trains: a Llama without biases and with as many key heads as query heads, by AdamW, on a CPU.

    The learning rate is constant. Weight decay applies to matrices only. There is no dropout and no document mask. Weights,
    gradients and moments are float32.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    norm_eps: float
    rope_theta: float
    tie_embeddings: bool
    batch: int  # sequences of one step, in one forward
    seq_len: int
    dtype: str  # of matrix products: float32 or bfloat16
    threads: int
    steps: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    tokens: str  # path of int32 [steps, batch, seq_len + 1]
    weights: str  # path of the initial weights: a safetensors file, with the names of transformers' Llama

    @classmethod
    def read(cls, file: Path) -> Spec:
        """Return the spec in a JSON file."""
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def write(self, file: Path) -> None:
        """Write the spec as JSON."""
        file.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch * self.seq_len


class Turns:
    """The turns of this process: between two steps it waits for the benchmark, if there is one."""

    def __init__(self) -> None:
        self._benchmark: socket.socket | None = None
        if TURNS in os.environ:
            self._benchmark = socket.socket(socket.AF_UNIX)
            self._benchmark.connect(os.environ[TURNS])

    def wait(self) -> None:
        """End this turn and wait for the next; end the process if the benchmark has ended."""
        if self._benchmark is not None:
            self._benchmark.sendall(b".")
            if not self._benchmark.recv(1):
                os._exit(1)


@dataclass
class Recorder:
    """
    Each step's seconds and loss. A step lasts from the end of the step before it, so that it includes reading its batch.

    The time between two turns is not counted.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _turns: Turns = field(default_factory=Turns)
    _last: float = 0.0

    def start(self) -> None:
        """Begin the first step."""
        self._turns.wait()
        self._last = time.perf_counter()

    def step(self, loss: Tensor) -> None:
        """End a step whose mean loss per token is `loss`."""
        self.losses.append(loss.item())
        self.tick()

    def tick(self) -> None:
        """End a step."""
        self.seconds.append(time.perf_counter() - self._last)
        self.start()


class Rows(Dataset[dict[str, Tensor]]):
    """The shared tokens as rows of {"input_ids", "labels"}, both int64 [seq_len]; a label is the next token."""

    def __init__(self, spec: Spec) -> None:
        shape = spec.steps * spec.batch, spec.seq_len + 1
        self._rows = torch.from_file(spec.tokens, dtype=torch.int32, size=math.prod(shape)).view(shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index].long()
        return {"input_ids": row[:-1], "labels": row[1:]}


def batches(spec: Spec) -> DataLoader[dict[str, Tensor]]:
    """Return torch's loader of the shared rows in their order, `spec.steps` batches."""
    return DataLoader(Rows(spec), batch_size=spec.batch)


def read_weights(file: str) -> dict[str, Tensor]:
    """Return the float32 tensors of a safetensors file, by name."""
    stored = torch.from_file(file, dtype=torch.uint8, size=os.path.getsize(file))
    begin = 8 + int.from_bytes(bytes(stored[:8].tolist()), "little")
    header: dict[str, Any] = json.loads(bytes(stored[8:begin].tolist()))
    return {
        name: stored[begin:][slice(*entry["data_offsets"])].view(torch.float32).view(entry["shape"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into `model`. A tied head may be absent from `weights`; raises ValueError for any other difference."""
    report = model.load_state_dict(weights, strict=False)
    missing = [name for name in report.missing_keys if not name.endswith("lm_head.weight")]
    if missing or report.unexpected_keys:
        raise ValueError(f"missing weights: {missing}; unexpected: {report.unexpected_keys}")


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def adamw(model: nn.Module, spec: Spec) -> torch.optim.AdamW:
    """Return torch's fused AdamW for `model`."""
    groups = decay_groups(model, spec.weight_decay)
    return torch.optim.AdamW(groups, lr=spec.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps, fused=True)


def steps(spec: Spec, recorder: Recorder, loader: Iterator[Any] | DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of all steps; the first step begins with reading its batch."""
    recorder.start()
    yield from loader


def answer(train: Callable[[Spec, Recorder], nn.Module], packages: Sequence[str]) -> None:
    """
    Run a worker: `python -m scripts.peers.NAME SPEC ANSWER`. Exits without Python's own teardown, which peers' threads can stall.

    train: trains by a spec and returns the trained model. packages: those whose versions the answer names.
    """
    spec = Spec.read(Path(sys.argv[1]))
    torch.set_num_threads(spec.threads)
    recorder = Recorder()
    model = train(spec, recorder)
    parameters = count_parameters(model)
    write_answer(Path(sys.argv[2]), recorder, parameters=parameters, versions=versions(("torch", *packages)))
    sys.stdout.flush()
    os._exit(0)


def write_answer(file: Path, recorder: Recorder, **more: Any) -> None:
    """Write what was measured in this process. more: further keys."""
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    told = {"seconds": recorder.seconds, "losses": recorder.losses, "memory_bytes": memory, **more}
    file.write_text(json.dumps(told), encoding="utf-8")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the installed versions."""
    return {name: importlib.metadata.version(name) for name in packages}
