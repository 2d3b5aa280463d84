"""
Options that a layout rejects, found before any process starts. No torch.

Each message is one sentence that names the options, by section and key, and valid values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from shoal.config.families import FAMILIES
from shoal.config.layout import Layout, find_layout
from shoal.config.options import FLOAT16_ON_CPU, Config, Model, Optim, Parallel, Train
from shoal.config.presets import resolve_shape
from shoal.config.schedules import problems as pipeline_problems
from shoal.system.torch_private import PRIVATE, is_tested, tested_range, torch_version


def refusals(config: Config, processes: int | None) -> Iterator[str]:
    """Yield every reason why `config` cannot run on `processes` (None: as few as it needs)."""
    layout = find_layout(config.parallel, processes)
    if isinstance(layout, str):
        yield layout
        layout = find_layout(config.parallel, None)  # look for further problems on as many processes as it needs
        if isinstance(layout, str):
            return
    yield from _batches(config, layout)
    yield from _tensor(config, layout)
    yield from _context(config, layout)
    yield from _pipeline(config, layout)
    yield from _bitwise(config, layout)
    yield from _unused(config, layout)
    yield from _arithmetic(config)
    yield from _transformers(config, layout)


def refusals_of_machines(config: Config, processes: int | None) -> Iterator[str]:
    """Yield `refusals` for each allowed number of nodes, with `processes` per node (None: not known yet)."""
    most = config.launch.nodes
    if processes is None or most == 1:
        yield from refusals(config, processes)
        return
    for nodes in range(config.launch.fewest_nodes, most + 1):
        for sentence in refusals(config, processes * nodes):
            yield f"with {nodes} nodes of {processes} processes: {sentence}"


def _batches(config: Config, layout: Layout) -> Iterator[str]:
    train = config.train
    slots = train.global_batch // train.micro_batch
    if slots >= layout.dp:
        return
    asked, ways = config.launch.processes, []
    fewer = slots * layout.world_size // layout.dp
    if asked is not None and isinstance(find_layout(config.parallel, fewer), Layout):
        ways.append(f"launch.processes to {fewer}")
    ways.append(f"train.global_batch to {layout.dp * train.micro_batch}")
    if train.global_batch % layout.dp == 0:
        ways.append(f"train.micro_batch to {train.global_batch // layout.dp}")
    of = f" of launch.processes {asked}" if asked is not None else ""
    yield (
        f"train.global_batch {train.global_batch} / train.micro_batch {train.micro_batch} gives {slots} micro-batches, fewer "
        f"than the {layout.dp} data-parallel ranks{of}; set {', or '.join(ways)}"
    )


def _tensor(config: Config, layout: Layout) -> Iterator[str]:
    model, tp = resolve_shape(config.model), layout.tp
    if tp == 1:
        return
    for key in _head_counts(model):
        size = getattr(model, key)
        if size % tp:
            yield (
                f"parallel.tp {tp} does not divide model.{key} {size}, and each process needs whole heads; "
                f"set parallel.tp to {_divisor(size, tp)}, or model.{key} to {_up(size, tp)}"
            )
    for key, size in (("ffn_dim", model.ffn_dim), ("vocab_size", model.vocab_size)):
        if size is not None and -(-size // tp) * (tp - 1) >= size:
            yield (
                f"parallel.tp {tp} leaves a process without a part of model.{key} {size}; set parallel.tp to {_divisor(size, tp)}"
            )
    yield from _no_dropout(model, "tp", tp)


def _context(config: Config, layout: Layout) -> Iterator[str]:
    model, parallel, cp, tp = resolve_shape(config.model), config.parallel, layout.cp, layout.tp
    seq_len = config.data.seq_len
    if cp > 1:
        # Ulysses cuts a sequence into contiguous parts. The other methods give each process an early and a late part, since
        # later tokens attend to more tokens.
        pieces = cp if parallel.cp_method == "ulysses" else 2 * cp
        if seq_len % (pieces * tp):
            times = f"parallel.cp {cp}" + (" x 2" if pieces > cp else "") + (f" x parallel.tp {tp}" if tp > 1 else "")
            yield (
                f"data.seq_len {seq_len} does not divide into {times} equal pieces; set data.seq_len to {_up(seq_len, pieces * tp)}"
            )
        if parallel.cp_method == "ulysses":
            for key in _head_counts(model):
                if getattr(model, key) % (cp * tp):
                    yield (
                        f"parallel.cp_method ulysses needs whole heads on each of parallel.cp {cp} processes, but {cp * tp} "
                        f"does not divide model.{key} {getattr(model, key)}; set parallel.cp_method to allgather, or "
                        f"parallel.cp to {_divisor(getattr(model, key) // tp or 1, cp)}"
                    )
        if parallel.cp_method == "ring" and config.data.document_mask:
            yield (
                "parallel.cp_method ring does not support data.document_mask; set parallel.cp_method to allgather or ulysses"
            )
        if parallel.cp_method == "ring" and not is_tested(torch_version()):
            yield (
                f"{PRIVATE['ring'].feature} uses private functions of torch and was tested with torch {tested_range()}, not "
                f"{torch_version()}; {PRIVATE['ring'].instead}"
            )
        yield from _no_dropout(model, "cp", cp)
    elif tp > 1 and seq_len % tp and FAMILIES[model.family].native:
        yield (
            f"parallel.tp {tp} also splits each sequence into {tp} parts, but does not divide data.seq_len {seq_len}; "
            f"set data.seq_len to {_up(seq_len, tp)}"
        )


def _no_dropout(model: Model, axis: str, size: int) -> Iterator[str]:
    if model.dropout:
        yield (
            f"parallel.{axis} {size} would draw other dropout masks than one process; set model.dropout to 0 "
            f"(not {model.dropout:g}), or parallel.{axis} to 1"
        )


def _pipeline(config: Config, layout: Layout) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    slots = config.train.global_batch // config.train.micro_batch
    lengths = sorted({slots // layout.dp, math.ceil(slots / layout.dp)}) if slots >= layout.dp else []
    if layout.dp_shard > 1:
        lengths = lengths[-1:]  # all ranks run as many micro-batches as the rank with the most
    for length in (
        lengths if FAMILIES[model.family].native else []
    ):  # `_transformers` rejects pipelines of other families
        yield from pipeline_problems(
            parallel.pp_schedule, layout.pp, parallel.pp_stages, model.num_layers, length,
            compile=config.train.compile, activation_checkpointing=config.train.activation_checkpointing,
        )  # fmt: skip


def _bitwise(config: Config, layout: Layout) -> Iterator[str]:
    if config.train.repro != "bitwise":
        return
    if layout.pp > 1 and layout.dp_shard > 1:
        yield (
            f"train.repro bitwise cannot fix the order of sums with both parallel.pp {layout.pp} and parallel.dp_shard "
            f"{layout.dp_shard}; set parallel.dp_shard to 1, so that parallel.dp_replicate takes the remaining processes"
        )
    if layout.pp > 1 and resolve_shape(config.model).tie_embeddings:
        yield (
            f"train.repro bitwise cannot fix the order in which parallel.pp {layout.pp} adds a tied embedding's two "
            "gradients, from two processes; set model.tie_embeddings to false, or parallel.pp to 1"
        )
    if config.launch.threads not in (None, 1):
        yield (
            f"train.repro bitwise needs one thread per process, but launch.threads is {config.launch.threads}; remove "
            "launch.threads, and start more processes"
        )


def _unused(config: Config, layout: Layout) -> Iterator[str]:
    """Yield a rejection for each option that has no effect in this layout."""
    parallel, defaults = config.parallel, Parallel()
    needs = {
        "reshard_after_forward": ("dp_shard", 2), "cpu_offload": ("dp_shard", 2), "cp_method": ("cp", 2),
        "pp_schedule": ("pp", 2),
    }  # fmt: skip
    for key, (axis, value) in needs.items():
        if getattr(layout, axis) == 1 and getattr(parallel, key) != getattr(defaults, key):
            yield (
                f"parallel.{key} {_show(getattr(parallel, key))} has no effect if parallel.{axis} is 1; set "
                f"parallel.{axis} to {value}, or remove parallel.{key}"
            )
    if (
        config.train.activation_budget != Train().activation_budget
        and config.train.activation_checkpointing != "budget"
    ):
        yield (
            f"train.activation_budget {config.train.activation_budget:g} has no effect if train.activation_checkpointing is "
            f"{config.train.activation_checkpointing}; set train.activation_checkpointing to budget, or remove "
            "train.activation_budget"
        )
    if config.optim.muon_momentum != Optim().muon_momentum and config.optim.name != "muon":
        yield (
            f"optim.muon_momentum {config.optim.muon_momentum:g} has no effect if optim.name is {config.optim.name}; set "
            "optim.name to muon, or remove optim.muon_momentum"
        )
    number = parallel.reshard_after_forward
    cut = layout.dp_shard * layout.cp
    if isinstance(number, int) and layout.dp_shard > 1 and not (1 < number < cut and cut % number == 0):
        fitting = [str(n) for n in range(2, cut) if cut % n == 0]
        yield (
            f"parallel.reshard_after_forward {number} does not divide the {cut} processes that shard parameters "
            f"(parallel.dp_shard {layout.dp_shard}) into smaller groups; set "
            f"parallel.reshard_after_forward to {' or '.join([*fitting, 'always', 'never'])}"
        )
    if isinstance(number, int) and layout.dp_shard > 1:
        yield from _smaller_groups(config, layout, number)


def _smaller_groups(config: Config, layout: Layout, number: int) -> Iterator[str]:
    """
    Reject a number for `reshard_after_forward` together with further axes: torch 2.13 then deadlocks until a timeout.

    `fully_shard` creates process groups of that size within its mesh. Creating a group is a collective over all processes,
    but with several such meshes, the ranks of each create different groups.
    """
    beside = {f"parallel.{axis}": getattr(layout, axis) for axis in ("tp", "pp")}
    if config.train.repro == "bitwise":  # shoal, not FSDP, sums over replicas then
        beside["parallel.dp_replicate"] = layout.dp_replicate
    for option, size in beside.items():
        if size > 1:
            bitwise = " and train.repro bitwise" if option == "parallel.dp_replicate" else ""
            yield (
                f"parallel.reshard_after_forward {number} with {option} {size}{bitwise} would deadlock: torch opens process "
                "groups in another order on each rank; set "
                f"parallel.reshard_after_forward to always or never, or {option} to 1"
            )


def _arithmetic(config: Config) -> Iterator[str]:
    train = config.train
    if train.activation_checkpointing == "budget" and not train.compile:
        yield (
            "train.activation_checkpointing budget needs the compiler, which chooses what to recompute; set train.compile to "
            "true, or train.activation_checkpointing to selective"
        )
    if train.dtype == "float16" and train.device == "cpu":
        yield f"train.dtype float16 needs CUDA, but train.device is cpu: {FLOAT16_ON_CPU.format(option='train.dtype')}"
    if train.dtype == "float16" and config.optim.name == "muon":
        yield "optim.name muon cannot skip a step after an overflow in float16; set train.dtype to bfloat16"


def _transformers(config: Config, layout: Layout) -> Iterator[str]:
    """Yield a rejection for each option that transformers' model code does not support."""
    if FAMILIES[config.model.family].native:
        return
    if layout.pp > 1:
        yield (
            f"model.family hf cannot be cut into the stages of parallel.pp {layout.pp}; set parallel.pp to 1, and use "
            "parallel.dp_shard instead"
        )
    if layout.cp > 1:
        yield (
            f"model.family hf has its own attention, which parallel.cp {layout.cp} cannot split; set parallel.cp to 1, and "
            "use parallel.dp_shard or parallel.tp instead"
        )
    if config.optim.name == "muon":
        yield (
            "optim.name muon needs separate matrices, but model.family hf may store several in one; set optim.name to adamw"
        )
    if layout.tp > 1 and config.train.compile:
        yield (
            f"train.compile does not support the collectives of parallel.tp {layout.tp} with model.family hf; set "
            "train.compile to false, or parallel.tp to 1"
        )


def _head_counts(model: Model) -> list[str]:
    """Return the options with a head count to check: num_kv_heads only if it differs from num_heads."""
    return ["num_heads"] + ["num_kv_heads"] * (model.num_kv_heads != model.num_heads)


def _divisor(size: int, most: int) -> int:
    return max(d for d in range(1, most + 1) if size % d == 0)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _show(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
