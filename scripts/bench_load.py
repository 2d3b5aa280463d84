"""
Measure loading a safetensors file into FSDP2, relative to reading the file: `python scripts/bench_load.py`.

The model (300M parameters, 1.2 GB in float32; `--dtype bfloat16`: 600M parameters) is made in `--folder` if missing. Each turn
reads the file into an existing buffer, then loads it in all processes. Turns run first with a warm page cache, then with the
file dropped from it before each read and load. Memory is the private memory of a process (RssAnon), without pages of the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.torch import save_file

from shoal.checkpoint.convert import to_hugging_face
from shoal.config.data_options import Data
from shoal.config.layout import Layout
from shoal.config.options import Model, Parallel, Train
from shoal.config.presets import resolve_shape
from shoal.hub.shape import read_model, write_shape
from shoal.mesh.mesh import Mesh
from shoal.mesh.place import Place
from shoal.models.build import Fill, build_model, initialize
from shoal.parallel.apply import parallelize
from shoal.training.assemble import folder_weights

SHAPE = Model(
    vocab_size=32_000, dim=1024, num_heads=16, num_kv_heads=8, ffn_dim=2816, num_layers=22, max_seq_len=2048,
    tie_embeddings=False,
)  # fmt: skip
LAYERS = {"float32": 22, "bfloat16": 49}  # 1.2 GB in both


def make(folder: Path, dtype: str) -> Path:
    """Make the folder with one file of weights, if missing; return it."""
    shape = resolve_shape(dataclasses.replace(SHAPE, num_layers=LAYERS[dtype]))
    target = folder / f"load-{dtype}"
    if not (target / "model.safetensors").is_file():
        target.mkdir(parents=True, exist_ok=True)
        model = build_model(shape, compute_dtype=torch.float32)
        initialize(model, 0, "cpu")
        tensors = to_hugging_face("llama", dict(model.named_parameters()))
        save_file({k: t.detach().to(getattr(torch, dtype)) for k, t in tensors.items()}, target / "model.safetensors")
        (target / "config.json").write_text(json.dumps(write_shape(shape)))
    return target


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(path: Path, buffer: memoryview) -> float:
    begun = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - begun


def own_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def work(rank: int, size: int, store: str, target: Path, cold: bool, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = Mesh(Place(rank, size, rank, size), torch.device("cpu"), Layout(dp_shard=size))
    path = target / "model.safetensors"
    buffer = memoryview(bytearray(16 << 20))
    shape = Model(**read_model(str(target))[0].values)
    readings, loadings, held = [], [], 0
    for _ in range(repeats):
        if cold:
            forget(path)
        if rank == 0:
            readings.append(read_seconds(path, buffer))
        mesh.barrier()
        if cold:
            forget(path)
        model = build_model(shape, compute_dtype=torch.float32)
        inside = folder_weights(model, str(target))
        spent = 0.0

        def timed(*args: object, inside: Fill = inside) -> None:
            nonlocal spent
            begun = time.perf_counter()
            inside(*args)  # type: ignore[arg-type]
            spent += time.perf_counter() - begun

        before = own_bytes()
        mesh.barrier()
        runnable = parallelize(
            model, mesh, parallel=Parallel(dp_shard=size), train=Train(dtype="float32", global_batch=size, micro_batch=1),
            data=Data(), weights=timed, say=lambda _: None,
        )  # fmt: skip
        held = own_bytes() - before
        longest = torch.tensor(spent)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        loadings.append(longest.item())
        whole = 4 * sum(shape.numel() for shape in runnable.shapes.values())
        del runnable, model, inside
    if rank == 0:
        ratios = [b / a for a, b in zip(readings, loadings, strict=True)]
        print(
            f"| {target.name} | {path.stat().st_size / 1e9:.2f} | {'cold' if cold else 'warm'} | "
            f"{statistics.median(readings):.2f} | {statistics.median(loadings):.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {held / whole:.2f} |"
        )
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("build"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=LAYERS, default=None)
    args = parser.parse_args()
    print("| model | GB | cache | read (s) | load (s) | load / read | own memory / whole model |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for dtype in [args.dtype] if args.dtype else LAYERS:
        target = make(args.folder, dtype)
        for cold in (False, True):
            store = tempfile.mktemp(prefix="shoal-load-")
            multiprocessing.spawn(work, (args.processes, store, target, cold, args.repeats), args.processes, join=True)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
