"""The arguments and help of `shoal bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from shoal.commands import bench
from shoal.commands.flags import add_options

OWN: Final[dict[str, Collection[str]]] = {"scaling": ["processes"], "memory": ["processes"]}
REPEATS: Final = {"speed": 5, "scaling": 3, "memory": 1, "io": 3, "save": 5, "generate": 5}
METHODS: Final = "ddp,fsdp"


def add_bench(make: Callable[..., argparse.ArgumentParser], action: str | None) -> None:
    """
    Add the benchmarks.

    make: makes a benchmark's parser from its name, its function and its help. action: the benchmark asked for, which alone gets
    the options of all config sections.
    """
    timed = (
        "time the training step: tokens/s, memory, loss, time by phase, MFU, and FLOP/s relative to a matrix product"
    )
    speed = make("speed", bench.speed, timed, "[RECIPE] [--peers]")
    peers = "also time transformers.Trainer on the same architecture (needs shoal[peers])"
    speed.add_argument("--peers", action="store_true", help=peers)

    grown = "time the training step on 1, 2, 4 and 8 processes: speedup and efficiency, strong and weak"
    scaling = make(
        "scaling", bench.scaling, grown, "[RECIPE] [--processes 1,2,4,8] [--strong | --weak] [--method ddp,fsdp]"
    )
    counts = "numbers of processes (default: 1,2,4,8, up to the GPUs or, on CPUs, up to 4 for each core)"
    scaling.add_argument("--processes", metavar="N,...", help=counts)
    mode = scaling.add_mutually_exclusive_group()
    mode.add_argument(
        "--strong", action="store_true", help="only with the recipe's global batch on any number of processes"
    )
    mode.add_argument("--weak", action="store_true", help="only with a global batch that grows with the processes")
    methods = f"which of ddp, fsdp, tp, cp and pp, separated by commas (default: {METHODS})"
    scaling.add_argument("--method", default=METHODS, metavar="NAME,...", help=methods)

    held = "measure the peak memory of a process under DDP and FSDP2, beside what `shoal plan` predicts"
    memory = make("memory", bench.memory, held, "[RECIPE] [--processes 2,4]")
    memory.add_argument("--processes", metavar="N,...", help="numbers of processes (default: 2,4, up to the GPUs)")

    reading = "time reading batches against what a training step needs, and preparing the corpus against its tokenizer"
    io = make("io", bench.io, reading, "[RECIPE]")
    save = make(
        "save", bench.save, "time a checkpoint: what a step waits, and the whole save, against torch.save", "[RECIPE]"
    )

    written = "time generation with a KV cache: prefill and decode, against transformers.generate if it is installed"
    generate = make("generate", bench.generate, written, "[RECIPE] [--batches 1,16]")
    batches = "numbers of prompts in a batch, separated by commas (default: 1,16)"
    generate.add_argument("--batches", default="1,16", metavar="N,...", help=batches)
    generate.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="tokens of a prompt (default: 64)")
    generate.add_argument("--new-tokens", type=int, default=128, metavar="N", help="tokens to generate (default: 128)")

    shorter = "prompts of half of --prompt-tokens up to all of them, padded on the left"
    generate.add_argument("--unequal", action="store_true", help=shorter)

    parsers = {"speed": speed, "scaling": scaling, "memory": memory, "io": io, "save": save, "generate": generate}
    for name, sub in parsers.items():
        _add_common(sub, REPEATS[name])
        if name == action:
            add_options(sub, own=OWN.get(name, ()))


def _add_common(parser: argparse.ArgumentParser, repeats: int) -> None:
    """Add what every benchmark takes."""
    own = "a YAML file or a built-in recipe (default: a small model on generated text)"
    parser.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE", help=own)
    runs = f"runs of each case, in turn; a figure is their median (default: {repeats})"
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help=runs)
    out = "write the result, with every repeat, for shoal compare"
    parser.add_argument("--out", type=Path, metavar="FILE.json", help=out)
    drawn = "draw the result as PNG and SVG into this folder (needs shoal[plots])"
    parser.add_argument("--pictures", type=Path, metavar="DIR", help=drawn)
    disk = "work in a temporary folder in this folder, on the disk to measure (default: the system's)"
    parser.add_argument("--disk", type=Path, metavar="DIR", help=disk)
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead; progress goes to stderr")
