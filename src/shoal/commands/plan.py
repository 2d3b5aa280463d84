"""`shoal plan`: which layouts of a recipe fit given devices, and how fast they are, without torch and without a GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.commands.flags import Override
from shoal.commands.models import narrated
from shoal.commands.recipes import recipe_asked, resolve_with_auto
from shoal.commands.seeing_parser import add_recipe
from shoal.errors import ShoalError
from shoal.system.disk import write_whole
from shoal.system.output import on_one_line

if TYPE_CHECKING:
    from shoal.config.layout import Layout
    from shoal.config.options import Config
    from shoal.plan.choice.choose import Choice, Choices
    from shoal.plan.choice.price import Price
    from shoal.plan.fits import Need
    from shoal.plan.machine import Machine

SECONDS: Final = 40.0  # of a calibration's measuring, with all numbers of processes together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `shoal plan`, which also takes the options of all config sections."""
    add_recipe(parser)
    devices = (
        "devices of each node: 8xH100-80GB, 8x40GB by memory alone, or 2xcpu-12GB for processes on CPUs; several kinds, "
        "separated by commas, are compared"
    )
    parser.add_argument("--devices", metavar="NxDEVICE", help=devices)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    network = "Gbit/s between nodes of each GPU, or of each node of CPUs (default: what such nodes usually have)"
    parser.add_argument("--network", type=float, metavar="GBIT", help=network)
    parser.add_argument(
        "--price", metavar="AMOUNT", help="what one device costs for an hour, such as 2.49usd, or 2.49usd,1.29usd"
    )
    measure = "measure this machine, by default for 40 s and starts of processes, and keep its rates for plans"
    parser.add_argument("--calibrate", nargs="?", type=float, const=SECONDS, metavar="SECONDS", help=measure)
    where = "use the rates of this file (default: those kept for these devices, if any); with --calibrate: write it"
    parser.add_argument("--calibration", type=Path, metavar="FILE", help=where)
    how = "say how well the steps of this user's runs were predicted, and how often the 90%% intervals held"
    parser.add_argument("--report", action="store_true", help=how)
    bought = "say which size of model and how many tokens a time, money or FLOPs buy: 3h, 200usd, 1e18flop"
    parser.add_argument("--budget", metavar="AMOUNT", help=bought)
    second = "also count the fastest layout's memory by running the real step on fake tensors; takes seconds, and needs torch"
    parser.add_argument("--trace", action="store_true", help=second)
    choice = "put the fastest layout that fits into the recipe, a file of yours"
    parser.add_argument("--write", action="store_true", help=choice)
    drawn = "with several kinds of devices: draw time and cost as PNG and SVG into this folder (needs shoal[plots])"
    parser.add_argument("--pictures", type=Path, metavar="DIR", help=drawn)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead, with all layouts")


def plan(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    """Print the layouts of a recipe, the fastest first; return 1 if none fits. With `--calibrate`, measure this machine."""
    if args.calibrate is not None:
        return _calibrate(args, overrides)
    _check_flags(args)
    from shoal.plan.choice.budget import budget_lines, read_budget, sizes
    from shoal.plan.choice.choose import choose
    from shoal.plan.choice.devices import prices_of
    from shoal.plan.choice.table import lines, record
    from shoal.plan.machine import find_machine
    from shoal.plan.speed.measured import known, read_all, report

    if args.report:
        print("\n".join(report(read_all())))
        return 0

    if args.devices is None:
        raise ShoalError("give the devices that the plan is for, such as --devices 8xH100-80GB or --devices 2xcpu-12GB")
    machines = [find_machine(each, args.nodes, args.network) for each in args.devices.split(",")]
    prices = prices_of(args.price, len(machines))
    machine, price = machines[0], prices[0]
    asked = [*overrides, ("launch.processes", "null", "shoal plan"), ("launch.nodes", "1", "shoal plan")]
    resolved = resolve_with_auto(
        recipe_asked(args, overrides), asked, named=args.recipe is not None, needs_length=False, needs_files=False,
        on_stderr=True,
    )  # fmt: skip
    config, undecided = resolved.config, resolved.undecided
    if len(machines) > 1:
        return _compare(config, undecided, machines, prices, args)
    if args.pictures is not None:
        raise ShoalError("--pictures draws a comparison; give several kinds of --devices, separated by commas")
    config = _finished(config, cuda=machine.cuda)
    rates, seen = known(machine, config.train.dtype, args.calibration)
    if args.budget:
        budget = read_budget(args.budget, price, machine.world_size)

        def best_layout(config: Config) -> Choice | None:
            return next(iter(choose(config, machine, rates, seen, _asked(config, machine, undecided)).fitting), None)

        with narrated() as narrator, narrator.phase("rehearsing models of several sizes"):
            print("\n".join(budget_lines(sizes(config, budget, best_layout))))
        return 0
    with narrated() as narrator, narrator.phase("rehearsing a step in every layout"):
        choices = choose(config, machine, rates, seen, _asked(config, machine, undecided))
        text = json.dumps(record(choices), indent=2) if args.json else "\n".join(lines(choices, price))
    print(text)
    if args.trace and choices.fitting:
        print(_second_count(choices.fitting[0].need), file=sys.stderr if args.json else sys.stdout)
    if args.write and choices.fitting:
        _write(args.recipe, choices, undecided)
    return 0 if choices.fitting else 1


def _check_flags(args: argparse.Namespace) -> None:
    """Raise `ShoalError` if a flag would have no effect beside another."""
    says = {
        "--report": (args.report, ("json", "budget", "trace", "write", "pictures")),
        "--budget": (args.budget, ("json", "trace", "write", "pictures")),
        "several kinds of --devices": ("," in (args.devices or ""), ("json", "budget", "trace", "write")),
    }
    for name, (given, without) in says.items():
        if given and (ignored := [f"--{flag}" for flag in without if getattr(args, flag)]):
            raise ShoalError(f"{name} and {ignored[0]} cannot be given together")


def _second_count(need: Need) -> str:
    """Return the memory of a layout as a trace of the real step counts it, beside what was rehearsed for the same kernels."""
    from shoal.system.torch_private import require

    require("trace")
    from shoal.bench.trace import traced_bytes
    from shoal.plan.choice.table import beside
    from shoal.plan.fits import need_of

    with narrated() as narrator, narrator.phase("running the step on fake tensors"):
        traced = traced_bytes(need.config, need.layout)
    return beside(need_of(need.config, need.layout, cuda=False, copies=False).total, traced)


def _asked(
    config: Config, machine: Machine, undecided: Mapping[str, str]
) -> Sequence[Sequence[tuple[Config, Layout]]] | None:
    """Return the layouts with several micro-batches if train.micro_batch is auto; None for the config's own."""
    from shoal.config.auto import MICRO_BATCH, micro_batches
    from shoal.plan.choice.choose import sized_layouts

    return (
        sized_layouts(config, machine, micro_batches(config.train.global_batch)) if MICRO_BATCH in undecided else None
    )


def _compare(
    config: Config,
    undecided: Mapping[str, str],
    machines: Sequence[Machine],
    prices: Sequence[Price | None],
    args: argparse.Namespace,
) -> int:
    """Print the fastest layout on each kind of device, and draw it with `--pictures`; return 1 if none fits anywhere."""
    from shoal.plan.choice.choose import choose
    from shoal.plan.choice.devices import comparison
    from shoal.plan.speed.measured import known
    from shoal.report.pictures.canvas import check_drawing

    if args.pictures is not None:
        check_drawing()  # before the work
    found = []
    with narrated() as narrator:
        for machine in machines:
            with narrator.phase(f"rehearsing a step in every layout of {machine}"):
                own = _finished(config, cuda=machine.cuda)
                asked = _asked(own, machine, undecided)
                found.append(choose(own, machine, *known(machine, own.train.dtype, args.calibration), asked))
    print("\n".join(comparison(found, prices)))
    if args.pictures is not None:
        _draw(found, prices, args.pictures, str(args.recipe or "the recipe"))
    return 0 if any(each.fitting for each in found) else 1


def _draw(found: Sequence[Choices], prices: Sequence[Price | None], folder: Path, name: str) -> None:
    """Draw time and cost as PNG and SVG. Raises `ShoalError` if the run has no length, or nothing fits."""
    from shoal.plan.choice.devices import offer
    from shoal.report.pictures.canvas import SUFFIXES, save
    from shoal.report.pictures.cost import draw_cost

    offers = [
        made for choices, price in zip(found, prices, strict=True) if (made := offer(choices, price)) and made.whole
    ]
    if not offers:
        raise ShoalError(
            "nothing to draw: no device fits, or the recipe has no length; set train.steps or train.tokens"
        )
    currency = next((price.currency for price in prices if price), "")
    for figure in draw_cost(offers, currency, name):
        for suffix in SUFFIXES:
            save(figure, folder / f"cost{suffix}")
            print(f"drew {on_one_line(folder / f'cost{suffix}')}")


def _write(recipe: Path | None, choices: Choices, undecided: Mapping[str, str]) -> None:
    """Put the best layout into the recipe's file, and the micro-batch if it is auto."""
    from shoal.config.auto import MICRO_BATCH
    from shoal.config.layout import AXES
    from shoal.plan.choice.table import label
    from shoal.resolve.recipe import PACKAGED, find_recipe
    from shoal.resolve.recipe_text import with_options

    path = find_recipe(recipe) if recipe else None
    if path is None or not path.is_file() or path.resolve().is_relative_to(PACKAGED.resolve()):
        raise ShoalError("--write needs a recipe of your own; shoal init writes one")
    best = choices.fitting[0]
    layout, said = best.need.layout, label(best, choices)
    sizes = {name: getattr(layout, name) for name in AXES if getattr(layout, name) > 1}
    text = with_options(path.read_text(encoding="utf-8"), "parallel", sizes, frozenset(AXES) - frozenset(sizes))
    if not choices.machine.cuda:
        text = with_options(text, "launch", {"processes": choices.machine.per_node})
    if MICRO_BATCH in undecided:
        text = with_options(text, "train", {"micro_batch": best.need.config.train.micro_batch})
    write_whole(path, [text.encode()])
    print(f"wrote {said} to {on_one_line(path)}")


def _calibrate(args: argparse.Namespace, overrides: list[Override]) -> int:
    """Measure this machine, and write the file that later plans read."""
    from shoal.bench.calibrate import calibrate
    from shoal.plan.speed.calibration import kept_file, load
    from shoal.plan.speed.rates import WIDTHS
    from shoal.run.console import Console
    from shoal.system.cpu import multiplies_bfloat16

    asked = {name: value for name, value, _ in overrides}
    dtype, processes = asked.get("train.dtype", "auto"), asked.get("launch.processes", "1")
    if dtype not in ("auto", *WIDTHS):
        raise ShoalError(f"--train.dtype {dtype}: a calibration measures {', '.join(WIDTHS)}")
    if not processes.isdecimal() or int(processes) < 1 or args.calibrate <= 0:
        raise ShoalError("a calibration needs a positive number of seconds and of processes")
    with narrated() as narrator:
        found = calibrate(
            args.calibrate, int(processes) if "launch.processes" in asked else None, None if dtype == "auto" else dtype,
            narrator, Console(on_stderr=True).warn,
        )  # fmt: skip
    path = args.calibration or kept_file(found.device)
    joined = found
    if path.is_file():
        with contextlib.suppress(ShoalError):  # what cannot be read is replaced
            joined = found.joined(load(path))
    joined.save(path)
    said, measured = ", ".join(str(s.processes) for s in found.settings), found.settings[0].dtype
    print(f"measured {found.device} with {said} processes in {measured}: {path}")
    if not found.cuda and measured == "float32" and multiplies_bfloat16():
        print(
            "train.dtype auto may choose bfloat16 here; to measure it too: shoal plan --calibrate --train.dtype bfloat16"
        )
    return 0


def _finished(config: Config, *, cuda: bool) -> Config:
    """Return the config with its vocabulary size and dtype, which a run knows from its data and its device."""
    from shoal.config.data_options import known_vocabulary

    if config.train.dtype == "auto":
        config = config.replace("train", dtype="bfloat16" if cuda else "float32")
    if config.model.vocab_size is not None:
        return config
    size = known_vocabulary(config.data)
    if size is None:
        raise ShoalError(
            f"the vocabulary of data.tokenizer {config.data.tokenizer} is not known here; set model.vocab_size"
        )
    return config.replace("model", vocab_size=size)
