"""
Measure the tables of docs/LEARN.md: time, memory and bytes sent of each recipe in recipes/learn.

    python scripts/learn_table.py                     measure all and write the tables to docs/LEARN.md
    python scripts/learn_table.py --table sharding    one table
    python scripts/learn_table.py --results FILE      store measurements in FILE, and skip those already there

Measures the step of `shoal train` (`assemble` and `train_step`) in processes that do nothing else:

- Time: the fastest of the last steps, from barrier to barrier, which other programs' load lengthens; and the CPU time of all
  processes together, which such load hardly affects.
- Bytes: sent by the loopback interface, per step and process; gradients too, as over a network, not added in shared memory.
  If `unshare` is allowed, processes run in a separate network namespace, so that no other traffic counts.
- Memory: of the process that uses most. Held all the time: weights, gradients, moments. Peak: these, plus the process's growth
  in the second step.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import gc
import json
import os
import platform
import shlex
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from shoal.config.layout import Layout, find_layout
from shoal.config.options import Config, Model, Parallel
from shoal.config.schedules import bubble_fraction
from shoal.data.dataset import BlendRows, open_data
from shoal.mesh.mesh import Mesh, open_mesh
from shoal.metrics.machine import device_name
from shoal.parallel import reduce
from shoal.plan.estimate import parameter_count
from shoal.resolve.resolve import read_back, resolve, to_yaml
from shoal.run.console import Console
from shoal.run.folder import RunFolder
from shoal.training.assemble import assemble, open_loader
from shoal.training.finish_config import finish_config
from shoal.training.loop import set_threads
from shoal.training.step import train_step

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "LEARN.md"
# The step whose peak memory is measured; the first and last step whose time and bytes are measured
WATCHED, FIRST_TIMED, LAST = (
    2,
    3,
    6,
)
ALONE = "SHOAL_LEARN_ALONE"  # environment variable that is set in the network namespace


@dataclass(frozen=True)
class Row:
    """A table row: a recipe, the options changed in it, and a formula for the bytes that a process sends."""

    recipe: str
    options: str = ""
    label: str = field(default="", compare=False)
    formula: Callable[[], float] | None = field(default=None, compare=False)

    @property
    def config(self) -> Config:
        words = shlex.split(f"{self.options} --train.steps {LAST} --optim.warmup_steps 0")
        overrides = [(k.removeprefix("--"), v, k) for k, v in zip(words[::2], words[1::2], strict=True)]
        return resolve(ROOT / "recipes" / "learn" / f"{self.recipe}.yaml", overrides).config


@dataclass(frozen=True)
class Measured:
    """Measurements of a step: the lowest times, memory of the process that uses most, bytes that a process sends on average."""

    step_seconds: float
    cpu_seconds: float  # of all processes together
    state_bytes: int
    peak_bytes: int
    sent_bytes: float


def parameters() -> tuple[int, int]:
    """Return the model's number of parameters: all, and those in its blocks."""

    def count(layers: int) -> int:
        return parameter_count(Model(vocab_size=257, dim=128, num_layers=layers, num_heads=4, max_seq_len=256))

    return count(LAYERS), LAYERS * (count(LAYERS) - count(LAYERS - 1))


LAYERS = 4
HIDDEN = 4 * 16 * 256 * 128  # bytes of a step's hidden state: float32 [16, 256, 128]


def all_reduced(n: int, share: float = 1.0) -> float:
    """Return the bytes of an all-reduce of `share` of the gradients: reduce-scatter and all-gather, each (n - 1) / n of it."""
    return 2 * (n - 1) / n * 4 * parameters()[0] * share


def sharded(n: int, turns: int, gathers: int = 2, replicas: int = 1) -> float:
    """
    Return the bytes of FSDP over `n` processes, with `turns` micro-batches per step.

    Each micro-batch gathers the blocks `gathers` times and the other parameters once. Each step reduce-scatters the gradients
    once, and all-reduces the shards over `replicas`. gloo's reduce-scatter sends as much as an all-reduce, twice the minimum.
    """
    whole, blocks = parameters()
    gathered = turns * (gathers * blocks + whole - blocks)
    return 4 * (n - 1) / n * (gathered + 2 * whole) + all_reduced(replicas, 1 / n)


def tensor(n: int) -> float:
    """Return the bytes of tensor parallelism: two gather and reduce-scatter pairs per block and direction, and two for the rest."""
    return (n - 1) / n * HIDDEN * (LAYERS * 8 + 2 + 2)


def pipeline(crossings: int, n: int) -> float:
    """Return the bytes of a pipeline of `n` processes: each crossing sends the hidden state forward, its gradient backward."""
    return 2 * HIDDEN * crossings / n


def context(n: int, method: str) -> float:
    """Return the bytes of context parallelism in all blocks, plus the gradients' all-reduce."""
    part = HIDDEN / n  # bytes of the keys, values or queries at one process's positions
    sent = {
        "allgather": 2 * 2 * (n - 1) * part,
        "ulysses": 2 * 4 * (n - 1) / n * part,
        "ring": 2 * (3 * n - 2) * part,
    }
    return LAYERS * sent[method] + all_reduced(n)


ONE, TWO, THREE, FOUR = "01-one-device", "02-accumulation", "03-data-parallel", "04-sharding"
FIVE, SIX, SEVEN, EIGHT = "05-tensor-parallel", "06-pipeline", "07-context-parallel", "08-precision-recompute"
NINE = "09-same-bits"
ON_4, OF_2, OF_4, OF_8 = (
    "--launch.processes 4",
    "--train.micro_batch 2",
    "--train.micro_batch 4",
    "--train.micro_batch 8",
)
ALL_KEPT, PARTLY = "--train.activation_checkpointing none", "--train.activation_checkpointing selective"
EXACT = "--train.dtype float32"
NEVER, ORDER = "--parallel.reshard_after_forward never", "--parallel.pp_schedule"


def cut_rows(method: str, n: int) -> Row:
    options = f"--parallel.cp_method {method} --parallel.cp {n} --launch.processes {n}"
    return Row(SEVEN, options, f"{method} over {n}", lambda: context(n, method))


ROWS = {
    "01": Row(ONE, "", "one process, one micro-batch"),
    "02": Row(TWO, "", "one process"),
    "03": Row(THREE, "", "step 3, 2 processes", lambda: all_reduced(2)),
    "03x4": Row(THREE, ON_4, "step 3, 4 processes", lambda: all_reduced(4)),
    "ddp": Row(THREE, OF_8, "data parallel, 2 processes", lambda: all_reduced(2)),
    "04": Row(FOUR, "", "FSDP2 over 2", lambda: sharded(2, 1)),
    "never": Row(FOUR, NEVER, "FSDP2 over 2, blocks kept until backward", lambda: sharded(2, 1, gathers=1)),
    "turns": Row(FOUR, OF_2, "FSDP2 over 2, four micro-batches", lambda: sharded(2, 4)),
    "fsdp4": Row(FOUR, f"--parallel.dp_shard 4 {OF_4} {ON_4}", "FSDP2 over 4", lambda: sharded(4, 1)),
    "hsdp": Row(FOUR, f"--parallel.dp_replicate 2 {OF_4} {ON_4}", "HSDP: 2 times 2", lambda: sharded(2, 1, replicas=2)),
    "05": Row(FIVE, "", "tensor parallel over 2", lambda: tensor(2)),
    "tp4": Row(FIVE, f"--parallel.tp 4 {ON_4}", "tensor parallel over 4", lambda: tensor(4)),
    "06": Row(SIX, "", "1f1b", lambda: pipeline(1, 2)),
    "gpipe": Row(SIX, f"{ORDER} gpipe", "gpipe", lambda: pipeline(1, 2)),
    "interleaved_1f1b": Row(SIX, f"{ORDER} interleaved_1f1b", "interleaved_1f1b", lambda: pipeline(3, 2)),
    "zbv": Row(SIX, f"{ORDER} zbv", "zbv", lambda: pipeline(2, 2)),
    "few": Row(SIX, OF_8, "1f1b, two micro-batches", lambda: pipeline(1, 2)),
    "07": Row(SEVEN, "", "allgather over 2", lambda: context(2, "allgather")),
    **{f"{m}{n}": cut_rows(m, n) for n in (2, 4) for m in ("allgather", "ulysses", "ring")},
    "kept": Row(ONE, "", "float32, all kept"),
    "some": Row(EIGHT, f"{EXACT} {PARTLY}", "float32, selective"),
    "full": Row(EIGHT, EXACT, "float32, full"),
    "bf16": Row(EIGHT, ALL_KEPT, "bfloat16, all kept"),
    "08": Row(EIGHT, "", "bfloat16, full"),
    "09": Row(NINE, "", "bitwise, 2 processes", lambda: all_reduced(2)),
    "09x4": Row(NINE, ON_4, "bitwise, 4 processes", lambda: all_reduced(4)),
}

TABLES = {
    "sharding": ("ddp", "04", "never", "turns", "fsdp4", "hsdp"),
    "tensor": ("01", "05", "tp4"),
    "pipeline": ("02", "06", "gpipe", "interleaved_1f1b", "zbv", "few"),
    "context": ("01", "07", "ulysses2", "ring2", "allgather4", "ulysses4", "ring4"),
    "memory": ("kept", "some", "full", "bf16", "08"),
    "bits": ("03", "09", "03x4", "09x4"),
    "costs": ("01", "02", "03", "04", "05", "06", "07", "08", "09"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="append", choices=TABLES, help="only this table (may be repeated)")
    parser.add_argument("--results", type=Path, help="JSON file of measurements, extended by this run")
    parser.add_argument("--held", nargs="+", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.held:
        held(args.held)
        return
    go_alone()
    names = args.table or list(TABLES)
    results = read(args.results)
    rows = {ROWS[key] for name in names for key in TABLES[name]}
    try:
        for count in (1, 2, 4):
            due = [row for row in ROWS.values() if row in rows and row.config.launch.processes == count]
            measure([row for row in dict.fromkeys(due) if row not in results], count, results)
    finally:
        write(args.results, results)
    page = PAGE.read_text(encoding="utf-8")
    for name in names:
        page = with_table(page, name, table(name, results))
    PAGE.write_text(page, encoding="utf-8")


def go_alone() -> None:
    """Restart this script in a network namespace with a separate loopback interface, if allowed."""
    if ALONE in os.environ:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS: up
        return
    unshare = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    allowed = os.system(f"{' '.join(unshare)} true 2>/dev/null") == 0
    if allowed:
        os.environ[ALONE] = "1"
        os.execvp(unshare[0], [*unshare, sys.executable, *sys.argv])
    print("cannot make a network namespace: other traffic on the loopback interface is counted too")


def measure(rows: Sequence[Row], processes: int, results: dict[Row, Measured]) -> None:
    """Measure these rows one after another, in the same `processes` processes, and add the measurements to `results`."""
    if not rows:
        return
    with tempfile.TemporaryDirectory(prefix="shoal-learn-") as name:
        folder = Path(name)
        configs = [folder / f"{number}.yaml" for number in range(len(rows))]
        for path, row in zip(configs, rows, strict=True):
            path.write_text(to_yaml(row.config.replace("data", folder=str(folder / "data"))), encoding="utf-8")
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, "-m", *launcher, __file__, "--held", *map(str, configs)]
        peaks: dict[Row, int] = {}
        # memory first, with an allocator that returns freed memory at once, which is slow; then time and bytes
        for returning in ({"MALLOC_MMAP_THRESHOLD_": "65536"}, {}):
            env = os.environ | {"OMP_NUM_THREADS": "1"} | returning
            with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as running:
                assert running.stdout is not None
                for row, line in zip(rows, (line for line in running.stdout if line[0] == "["), strict=True):
                    found = Measured(*json.loads(line))
                    peaks.setdefault(row, found.peak_bytes)
                    results[row] = replace(found, peak_bytes=peaks[row])
                    print(row.label, results[row], flush=True)


def figure(path: str, name: str, column: int) -> int:
    """Return the number in this column of the line that begins with `name:`, in a /proc file."""
    [line] = [x for x in Path(path).read_text().splitlines() if x.strip().startswith(f"{name}:")]
    return int(line.partition(":")[2].split()[column])


def loopback_bytes() -> int:
    """Return the bytes that the loopback interface has sent: payload and headers."""
    return figure("/proc/net/dev", "lo", 8)


def held(recipes: Sequence[Path]) -> None:
    """Measure the recipes, as one of the launched processes. Rank 0 prints one line per recipe."""
    setattr(reduce, "shared_buffers", lambda *_: None)  # noqa: B010 - not exported; gradients are sent, as over a network
    first = read_back(recipes[0])
    set_threads(first)
    with open_mesh("cpu", 600.0, Parallel()) as world:
        if world.is_first:
            open_data(first.data, Console(speaks=False))
        world.barrier()
        for recipe in recipes:
            config = read_back(recipe)
            dataset = open_data(config.data, Console(speaks=False))
            layout = find_layout(config.parallel, world.world_size)
            assert isinstance(layout, Layout)
            mesh = Mesh(world.place, world.device, layout)
            config = finish_config(config, RunFolder(recipe.parent / "none"), dataset, mesh)
            rows = dataset.rows("train")
            line = json.dumps(take_steps(config, mesh, rows))
            if mesh.is_first:
                print(line, flush=True)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive Python's shutdown


def take_steps(config: Config, mesh: Mesh, rows: BlendRows) -> list[float]:
    """Return the fields of `Measured`, equal on all ranks. Runs collectives over the world."""
    gc.collect()  # free the last recipe's model
    libc = ctypes.CDLL(None)
    seconds, peak = [], 0
    runnable, state = assemble(config, mesh, lambda _: None)
    loader = open_loader(config, mesh, rows)
    for step in range(1, LAST + 1):
        if step == WATCHED:
            libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
            at_rest = 1024 * figure("/proc/self/status", "VmHWM", 0)
        if step == WATCHED + 1:
            peak = 1024 * figure("/proc/self/status", "VmHWM", 0) - at_rest
        if step == FIRST_TIMED:
            mesh.barrier()
            before = loopback_bytes()
        mesh.barrier()
        begun, spent = time.perf_counter(), time.process_time()
        train_step(runnable, state, loader.next_step(), step=step, lr=1e-4, clip_norm=1.0)
        cpu = torch.tensor(time.process_time() - spent, dtype=torch.float64)
        mesh.barrier()
        seconds.append((time.perf_counter() - begun, cpu))
    sent = (loopback_bytes() - before) / (LAST - FIRST_TIMED + 1) / mesh.world_size if mesh.world_size > 1 else 0.0
    loader.close()
    used = [float(mesh.sum(cpu)) for _, cpu in seconds[FIRST_TIMED - 1 :]]
    own = sum(part.tensor.nbytes for part in state.tensors().values())
    own += sum(s.tensor.grad.nbytes for s in runnable.shards if s.tensor.grad is not None)
    most = torch.tensor([own, own + peak], dtype=torch.int64)
    if mesh.world_size > 1:
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return [min(wall for wall, _ in seconds[FIRST_TIMED - 1 :]), min(used), *most.tolist(), sent]


def table(name: str, results: dict[Row, Measured]) -> str:
    """Return the table as Markdown, with the machine it was measured on."""
    heads = ["", "step", "CPU time of all", "held all the time", "peak", "sent", "by the formula"]
    if name == "memory":
        heads = heads[:5]
    if name == "pipeline":
        heads.append("idle, by the formula")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for key in TABLES[name]:
        row, found = ROWS[key], results[ROWS[key]]
        label = f"{int(key)}. {row.recipe[3:].replace('-', ' ')}" if name == "costs" else row.label
        cells = [
            label,
            *(f"{1000 * s:.0f} ms" for s in (found.step_seconds, found.cpu_seconds)),
            mb(found.state_bytes),
            mb(found.peak_bytes),
        ]
        if len(heads) > 5:
            cells += [mb(found.sent_bytes, 2), mb(row.formula(), 2) if row.formula else "0"]
        if name == "pipeline":
            order = key if ORDER in row.options else "1f1b"
            stages, turns = 2 if order in ("interleaved_1f1b", "zbv") else 1, 2 if key == "few" else 8
            idle = 0 if row.config.launch.processes == 1 else bubble_fraction(order, 2, stages, turns)  # type: ignore[arg-type]
            cells.append(f"{idle:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", where()])


def mb(size: float, digits: int = 1) -> str:
    return f"{size / 1e6:.{digits}f} MB" if size else "0"


def where() -> str:
    name = device_name(torch.device("cpu")).partition(" (")[0]
    return (
        f"*{name}, {os.cpu_count()} cores, one thread a process; torch {torch.__version__.partition('+')[0]}, Python "
        f"{platform.python_version()}; `scripts/learn_table.py`.*"
    )


def with_table(page: str, name: str, text: str) -> str:
    """Return `page` with the table between its marks replaced. Raises ValueError if a mark is missing."""
    begin, end = f"<!-- table: {name} begin -->", f"<!-- table: {name} end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"docs/LEARN.md lacks {begin!r} or {end!r}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def read(path: Path | None) -> dict[Row, Measured]:
    """Return stored measurements; rows with the same recipe and options are one row, whatever their labels."""
    found = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    return {Row(**row): Measured(**measured) for row, measured in found}


def write(path: Path | None, results: dict[Row, Measured]) -> None:
    if path:
        pairs = [({"recipe": row.recipe, "options": row.options}, asdict(found)) for row, found in results.items()]
        path.write_text(json.dumps(pairs, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
