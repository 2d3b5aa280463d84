"""Rejected combinations of options that are each valid alone. Pure, no torch."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from shoal.config.keys import SOURCES
from shoal.config.options import Config
from shoal.config.presets import shape_problems
from shoal.config.tracker_names import unknown
from shoal.errors import Problem
from shoal.resolve.data_checks import MakeProblem, data_problems
from shoal.resolve.undecided import refusals_of_all_sizes
from shoal.system.network import read_address

DEFAULT, DERIVED = "default", "derived"
LONGEST_NAME: Final = 200  # bytes; file systems allow 255, and some file names append a word to a run's name


def contradictions(
    config: Config,
    sources: Mapping[str, str],
    *,
    needs_length: bool = True,
    needs_files: bool = True,
    undecided: Mapping[str, str] = MappingProxyType({}),
) -> Iterable[Problem]:
    """
    Yield a `Problem` for each incompatible combination.

    sources: where each option was set. needs_length: whether the length of the run must be set. needs_files: whether the data's
    files must exist. undecided: the sizes that are auto.
    """

    def problem(what: str, *keys: str) -> Problem:
        given = dict.fromkeys(sources[k] for k in keys if sources[k] not in (DEFAULT, DERIVED))
        return Problem(" and ".join(given), what)

    model, data, train = config.model, config.data, config.train
    for key, message in shape_problems(model):
        yield problem(message, f"model.{key}")
    lengths = [k for k in ("steps", "tokens", "epochs") if getattr(train, k) is not None]
    if len(lengths) > 1 or (needs_length and not lengths):
        keys = tuple(f"train.{k}" for k in lengths)
        said = " and ".join(keys) + " are both set" if lengths else "the length of the run is not set"
        yield problem(f"{said}; set one of train.steps, train.tokens, train.epochs", *keys)
    if train.global_batch % train.micro_batch:
        yield problem(
            f"train.micro_batch {train.micro_batch} does not divide train.global_batch {train.global_batch}; "
            f"set train.global_batch to {_round_up(train.global_batch, train.micro_batch)}",
            "train.global_batch",
            "train.micro_batch",
        )
    elif not any(shape_problems(model)):
        for sentence in refusals_of_all_sizes(config, undecided):
            cause, _, _ = sentence.partition("; ")
            yield problem(sentence, *(key for key in sources if re.search(rf"\b{re.escape(key)}\b", cause)))
    if data.seq_len > model.max_seq_len:
        yield problem(
            f"data.seq_len {data.seq_len} exceeds model.max_seq_len {model.max_seq_len}; reduce the one or raise the other",
            "data.seq_len",
            "model.max_seq_len",
        )
    yield from _node_problems(config, problem)
    if config.launch.name is not None and (why := why_no_name(config.launch.name)):
        yield problem(f"launch.name {why}", "launch.name")
    for name in dict.fromkeys(config.track.to):
        if why := unknown(name):
            yield problem(why, "track.to")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", config.alerts.webhook_env):
        what = "is the name of an environment variable, such as SHOAL_WEBHOOK; put the webhook's address into that variable"
        yield problem(f"alerts.webhook_env {what}", "alerts.webhook_env")
    yield from data_problems(config, problem, needs_files=needs_files)
    for name in config.data.sources or {}:
        chosen = [f"{SOURCES}{name}.{option}" for option in ("paths", "corpus")]
        if all(sources[key] == DEFAULT for key in chosen):
            others = [other for other in config.data.sources or {} if other != name]
            near = difflib.get_close_matches(name, others, 1)
            hint = f"did you mean {SOURCES}{near[0]}? " if near else ""
            yield problem(
                f"{SOURCES}{name} has nothing to read; {hint}Set its paths or corpus",
                *(key for key in sources if key.startswith(f"{SOURCES}{name}.")),
            )


def remarks(config: Config) -> Iterable[str]:
    """Yield warnings about valid options that are perhaps not what was meant."""
    warmup, steps = config.optim.warmup_steps, config.train.steps
    if steps is not None and warmup > steps:
        yield (
            f"optim.warmup_steps {warmup} exceeds train.steps {steps}: the learning rate rises until the end, only to "
            f"{config.optim.lr * steps / warmup:.3g} of optim.lr {config.optim.lr:g}"
        )
    if config.data.format != "text" and not config.data.document_mask:
        yield (
            f"data.document_mask is false with data.format {config.data.format}: answers attend to other conversations in "
            "their row"
        )


def why_no_name(name: str) -> str | None:
    """Return the reason why `name` cannot name a run (a folder, and an argument of commands); None if it can."""
    if len(os.fsencode(name)) > LONGEST_NAME:
        return f"{name[:20]!r}... has {len(name)} characters; use at most {LONGEST_NAME} bytes"
    if not name.strip(" .") or "/" in name or name[0] in ".-" or not name.isprintable():
        return (
            f"{name!r} cannot name a folder below launch.runs: remove slashes and control characters, and do not begin "
            "it with a dot or a dash"
        )
    return None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _node_problems(config: Config, problem: MakeProblem) -> Iterable[Problem]:
    launch = config.launch
    if launch.min_nodes is not None and launch.min_nodes > launch.nodes:
        yield problem(
            f"launch.min_nodes {launch.min_nodes} exceeds launch.nodes {launch.nodes}, the maximum; raise launch.nodes",
            "launch.min_nodes",
            "launch.nodes",
        )
    for key in ("min_nodes", "rendezvous"):
        if launch.nodes == 1 and getattr(launch, key) is not None:
            yield problem(
                f"launch.{key} needs several nodes, but launch.nodes is 1; set launch.nodes to their maximum number",
                f"launch.{key}",
            )
    if launch.rendezvous is None and launch.nodes > 1:
        yield problem(
            f"launch.nodes {launch.nodes} needs an address where the nodes meet; set launch.rendezvous to HOST:PORT",
            "launch.nodes",
        )
    elif launch.rendezvous is not None and read_address(launch.rendezvous) is None:
        yield problem(
            f"launch.rendezvous {launch.rendezvous!r} is not HOST:PORT; an example is node0:29400", "launch.rendezvous"
        )
