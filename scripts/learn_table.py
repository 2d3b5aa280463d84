"""
The tables of docs/LEARN.md, measured: time, memory and bytes sent of each recipe in recipes/learn.

    python scripts/learn_table.py                     measure all, and write the tables into docs/LEARN.md
    python scripts/learn_table.py --table sharding    one table
    python scripts/learn_table.py --results FILE      keep each measurement in FILE; what is there is not measured again

Time: `shoal train` of `--steps` steps, the median of `step_seconds` in metrics.jsonl after the first three, the lowest
of `--repeats` runs. Bytes: what the loopback interface sent in that run, less what it sent in one of fewer steps, by
step and process; in a network namespace of its own where `unshare` may make one, so that nobody else's traffic counts.
Memory: what torch's allocator had given out at its peak, in a process that takes two steps under torch's profiler
(no Python, no libraries), the process with most. A process holds of it all the time: weights, gradients, moments.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "LEARN.md"
SHORT, WARM_UP, HELD_STEPS = 3, 3, 2  # steps of the shorter run; steps not timed; steps under the profiler
ALONE = "SHOAL_LEARN_ALONE"  # set in the network namespace


@dataclass(frozen=True)
class Row:
    """One line of a table: a recipe, what is changed in it, and the bytes that a formula says a process sends."""

    label: str
    recipe: str
    options: str = ""
    formula: Callable[[], float] | None = None


@dataclass(frozen=True)
class Measured:
    """Of a process in a step. Bytes are None where there is one process."""

    processes: int
    step_seconds: float
    state_bytes: int
    peak_bytes: int
    sent_bytes: float | None


def parameters() -> tuple[int, int]:
    """Of the learner's model: all, and those in its blocks."""
    from shoal.config import Model
    from shoal.plan.estimate import parameter_count

    def count(layers: int) -> int:
        return parameter_count(Model(vocab_size=257, dim=128, num_layers=layers, num_heads=4, max_seq_len=256))

    return count(LAYERS), LAYERS * (count(LAYERS) - count(LAYERS - 1))


LAYERS = 4
HIDDEN = 4 * 16 * 256 * 128  # bytes of what flows between blocks, of a whole step: float32 [16, 256, 128]


def all_reduced(n: int, share: float = 1.0) -> float:
    return 2 * (n - 1) / n * 4 * parameters()[0] * share


def sharded(n: int, turns: int, gathers: int = 2, replicas: int = 1) -> float:
    """Blocks gathered `gathers` times a micro-batch, the rest once; gradients summed and cut once a step."""
    whole, blocks = parameters()
    within = 4 * (n - 1) / n * (turns * (gathers * blocks + whole - blocks) + whole)
    return within + all_reduced(replicas, 1 / n)


def tensor(n: int) -> float:
    """Two pairs of gather and sum-scatter a block, and backward as much; one pair for the embedding and for the head."""
    return (n - 1) / n * HIDDEN * (LAYERS * 8 + 2 + 2)


def pipeline(crossings: int, n: int) -> float:
    """Forward sends what flows once over each border between processes, backward its gradient."""
    return 2 * HIDDEN * crossings / n


def context(n: int, method: str) -> float:
    """Of all blocks, and the gradients' sum over all processes."""
    part = HIDDEN / n  # a key or a value or a query of this process's places
    sent = {
        "allgather": 2 * 2 * (n - 1) * part,
        "ulysses": 2 * 4 * (n - 1) / n * part,
        "ring": 2 * (3 * n - 2) * part,
    }
    return LAYERS * sent[method] + all_reduced(n)


TWO, FOUR = "--parallel.dp_replicate 2", "--processes 4"
ROWS = {
    "01": Row("one process, one micro-batch", "01-one-device"),
    "02": Row("one process, eight micro-batches", "02-accumulation"),
    "03": Row("data parallel, 2 processes", "03-data-parallel", "", lambda: all_reduced(2)),
    "03x4": Row("data parallel, 4 processes", "03-data-parallel", FOUR, lambda: all_reduced(4)),
    "ddp": Row("data parallel", "03-data-parallel", "--train.micro_batch 8", lambda: all_reduced(2)),
    "04": Row("FSDP2 over 2", "04-sharding", "", lambda: sharded(2, 1)),
    "never": Row(
        "FSDP2 over 2, blocks kept until backward",
        "04-sharding",
        "--parallel.reshard_after_forward never",
        lambda: sharded(2, 1, gathers=1),
    ),
    "turns": Row(
        "FSDP2 over 2, four micro-batches", "04-sharding", "--train.micro_batch 2", lambda: sharded(2, turns=4)
    ),
    "fsdp4": Row(
        "FSDP2 over 4", "04-sharding", f"--parallel.dp_shard 4 --train.micro_batch 4 {FOUR}", lambda: sharded(4, 1)
    ),
    "hsdp": Row(
        "HSDP, 2 replicas over 2", "04-sharding", f"{TWO} --train.micro_batch 4 {FOUR}",
        lambda: sharded(2, 1, replicas=2),
    ),
    "05": Row("tensor parallel over 2", "05-tensor-parallel", "", lambda: tensor(2)),
    "tp4": Row("tensor parallel over 4", "05-tensor-parallel", f"--parallel.tp 4 {FOUR}", lambda: tensor(4)),
    "06": Row("1f1b", "06-pipeline", "", lambda: pipeline(1, 2)),
    "gpipe": Row("gpipe", "06-pipeline", "--parallel.pp_schedule gpipe", lambda: pipeline(1, 2)),
    "inter": Row(
        "interleaved_1f1b", "06-pipeline", "--parallel.pp_schedule interleaved_1f1b", lambda: pipeline(3, 2)
    ),
    "zbv": Row("zbv", "06-pipeline", "--parallel.pp_schedule zbv", lambda: pipeline(2, 2)),
    "few": Row("1f1b, two micro-batches of 8 rows", "06-pipeline", "--train.micro_batch 8", lambda: pipeline(1, 2)),
    "07": Row("allgather over 2", "07-context-parallel", "", lambda: context(2, "allgather")),
    **{
        f"{method}{n}": Row(
            f"{method} over {n}",
            "07-context-parallel",
            f"--parallel.cp_method {method} --parallel.cp {n} --processes {n}",
            lambda method=method, n=n: context(n, method),  # type: ignore[misc]
        )
        for n, method in ((2, "ulysses"), (2, "ring"), (4, "allgather"), (4, "ulysses"), (4, "ring"))
    },
    "kept": Row("float32, all kept", "01-one-device"),
    "some": Row(
        "float32, selective", "08-precision-recompute",
        "--train.dtype float32 --train.activation_checkpointing selective",
    ),
    "full": Row("float32, full", "08-precision-recompute", "--train.dtype float32"),
    "bf16": Row("bfloat16, all kept", "08-precision-recompute", "--train.activation_checkpointing none"),
    "08": Row("bfloat16, full", "08-precision-recompute"),
    "09": Row("bitwise, 2 processes", "09-same-bits", "", lambda: all_reduced(2)),
    "09x4": Row("bitwise, 4 processes", "09-same-bits", FOUR, lambda: all_reduced(4)),
}  # fmt: skip

TABLES = {
    "sharding": ("ddp", "04", "never", "turns", "fsdp4", "hsdp"),
    "tensor": ("01", "05", "tp4"),
    "pipeline": ("02", "06", "gpipe", "inter", "zbv", "few"),
    "context": ("01", "07", "ulysses2", "ring2", "allgather4", "ulysses4", "ring4"),
    "memory": ("kept", "some", "full", "bf16", "08"),
    "bits": ("03", "09", "03x4", "09x4"),
    "costs": ("01", "02", "03", "04", "05", "06", "07", "08", "09"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="append", choices=TABLES, help="only this one (may be repeated)")
    parser.add_argument("--results", type=Path, help="a JSON file of measurements, added to")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--again", action="store_true", help="time once more what --results holds; the lowest counts")
    parser.add_argument("--held", nargs=2, type=Path, metavar=("CONFIG", "ANSWER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.held:
        held(*args.held)
        return
    go_alone()
    names = args.table or list(TABLES)
    results = read(args.results)
    with tempfile.TemporaryDirectory(prefix="shoal-learn-") as folder:
        for key in dict.fromkeys(key for name in names for key in TABLES[name]):
            twin = next(
                (k for k in results if ROWS[k].recipe == ROWS[key].recipe and ROWS[k].options == ROWS[key].options),
                None,
            )
            if twin is not None and (twin != key or not args.again):
                results[key] = results[twin]
                continue
            found = measure(ROWS[key], Path(folder), steps=args.steps, repeats=args.repeats)
            if key in results:
                found["step_seconds"] = min(found["step_seconds"], results[key]["step_seconds"])
            results[key] = found
            print(key, found, flush=True)
            if args.results:
                args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    for name in names:
        page = with_table(page, name, table(name, results))
    PAGE.write_text(page, encoding="utf-8")


def go_alone() -> None:
    """Start anew in a network namespace where lo is ours alone, if that is allowed."""
    if ALONE in os.environ:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 1))  # SIOCSIFFLAGS: up
        return
    unshare = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    try:
        allowed = subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if allowed:
        os.environ[ALONE] = "1"
        os.execvp(unshare[0], [*unshare, sys.executable, *sys.argv])
    print("no network namespace to be had: whatever else uses the loopback interface now is counted too")


def measure(row: Row, folder: Path, *, steps: int, repeats: int) -> dict[str, float]:
    """Run it; as a dict of `Measured`."""
    sent, seconds, processes = {}, [], 1
    for number, length in enumerate([SHORT, *[steps] * repeats]):
        before = loopback_bytes()
        run = folder / "runs" / f"{row.recipe}-{number}"
        command = [*train_command(row, folder, length), "--launch.name", run.name]
        run_quietly(command)
        sent[length] = loopback_bytes() - before
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        times = [line["step_seconds"] for line in lines if "loss" in line]
        seconds.append(statistics.median(times[WARM_UP:]))
        processes = json.loads((run / "events.jsonl").read_text().splitlines()[0])["processes"]
        subprocess.run(["rm", "-r", str(run)], check=True)
    by_step = (sent[steps] - sent[SHORT]) / (steps - SHORT)
    state, peak = hold(row, folder, processes)
    return asdict(Measured(processes, min(seconds[1:]), state, peak, by_step / processes if processes > 1 else None))


def train_command(row: Row, folder: Path, steps: int) -> list[str]:
    return [
        sys.executable, "-m", "shoal", "train", f"recipes/learn/{row.recipe}.yaml", *row.options.split(),
        "--train.steps", str(steps), "--optim.warmup_steps", "0", "--train.sample_prompt=",
        "--launch.runs", str(folder / "runs"), "--data.folder", str(folder / "data"),
    ]  # fmt: skip


def run_quietly(command: list[str]) -> None:
    """Raises RuntimeError with what the command said, where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


def loopback_bytes() -> int:
    """What lo has sent since it was made: payload and headers of everything between processes here."""
    [line] = [x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:")]
    return int(line.partition(":")[2].split()[8])


def hold(row: Row, folder: Path, processes: int) -> tuple[int, int]:
    """(bytes held all the time, bytes at the peak) of the process with most."""
    config, answer = folder / "config.yaml", folder / "answer.json"
    shown = [*train_command(row, folder, HELD_STEPS)]
    shown[3] = "config"
    config.write_text(subprocess.run(shown, check=True, cwd=ROOT, capture_output=True, text=True).stdout)
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", __file__]
    command = [sys.executable, "-m", *launcher] if processes > 1 else [sys.executable, __file__]
    run_quietly([*command, "--held", str(config), str(answer)])
    state, peak = json.loads(answer.read_text())
    return state, peak


def held(recipe: Path, answer: Path) -> None:
    """In one of the processes: two steps under torch's profiler, then what the allocator said."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from shoal.data.open import open_data
    from shoal.metrics.console import Console
    from shoal.metrics.meter import no_phases
    from shoal.parallel.mesh import open_mesh
    from shoal.resolve import read_back
    from shoal.runs import RunFolder
    from shoal.train.assemble import assemble, open_loader
    from shoal.train.loop import set_threads, settle
    from shoal.train.step import train_step

    config = read_back(recipe)
    set_threads(config)
    with open_mesh(config.train.device, 300.0, config.parallel) as mesh:
        prepared = open_data(config.data, Console(speaks=False))
        config = settle(config, RunFolder(answer.parent / "none"), prepared, mesh)
        rows = prepared.split("train", seq_len=config.data.seq_len, document_mask=False)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            runnable, state = assemble(config, mesh, lambda _: None)
            loader = open_loader(config, mesh, rows)
            for step in range(1, HELD_STEPS + 1):
                train_step(
                    runnable, state.optimizer, loader.next_step(), step=step, lr=1e-4, clip_norm=1.0,
                    bitwise=config.train.repro == "bitwise", stop_asked=False, phases=no_phases, scaler=None,
                )  # fmt: skip
        loader.close()
        own = sum(part.tensor.nbytes for part in state.tensors().values())
        own += sum(s.tensor.grad.nbytes for s in runnable.shards if s.tensor.grad is not None)
        trace = answer.with_suffix(f".{mesh.place.rank}.trace")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        peak = max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")
        most = torch.tensor([own, peak], dtype=torch.int64)
        if mesh.world_size > 1:
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        if mesh.is_first:
            answer.write_text(json.dumps(most.tolist()))
    sys.stdout.flush()
    os._exit(0)


def table(name: str, results: dict[str, dict[str, float]]) -> str:
    """As Markdown, with where it was measured."""
    from shoal.pipeline_plan import bubble_fraction

    heads = ["", "step", "held all the time", "peak", "sent", "by the formula"]
    if name == "memory":
        heads = heads[:4]
    if name == "pipeline":
        heads.append("idle, by the formula")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for key in TABLES[name]:
        row, found = ROWS[key], Measured(**results[key])  # type: ignore[arg-type]
        label = f"{int(key)}. {row.label}" if name == "costs" else row.label
        cells = [label, f"{1000 * found.step_seconds:.0f} ms", mb(found.state_bytes), mb(found.peak_bytes)]
        if len(heads) > 4:
            cells += [mb(found.sent_bytes or 0, 2), mb(row.formula(), 2) if row.formula else "0"]
        if name == "pipeline":
            schedule = "1f1b" if key in ("06", "few") else "interleaved_1f1b" if key == "inter" else key
            stages = 2 if key in ("inter", "zbv") else 1
            idle = 0 if key == "02" else bubble_fraction(schedule, 2, stages, 2 if key == "few" else 8)  # type: ignore[arg-type]
            cells.append(f"{idle:.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", where()])


def mb(size: float, digits: int = 1) -> str:
    return f"{size / 1e6:.{digits}f} MB" if size else "0"


def where() -> str:
    import torch

    from shoal.metrics.meter import device_name

    name = device_name(torch.device("cpu")).partition(" (")[0]
    return (
        f"*{name}, {os.cpu_count()} cores, one thread a process; torch {torch.__version__.partition('+')[0]}, Python "
        f"{platform.python_version()}; `scripts/learn_table.py`.*"
    )


def with_table(page: str, name: str, text: str) -> str:
    """`page` with what stands between this table's marks replaced. Raises ValueError where a mark is missing."""
    begin, end = f"<!-- table: {name} begin -->", f"<!-- table: {name} end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"docs/LEARN.md lacks {begin!r} or {end!r}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def read(path: Path | None) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path and path.is_file() else {}
    return found


if __name__ == "__main__":
    main()
