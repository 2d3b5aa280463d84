"""The time of a step by part, from what it computes and sends, and the rates of a machine. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, Literal

from shoal.config.layout import Layout
from shoal.config.schedules import bubble_fraction, stages_per_rank
from shoal.plan.fits import Need, axis_sizes
from shoal.plan.rehearse.work import Kind, Work
from shoal.plan.speed.rates import HOST_MESSAGE, Rates
from shoal.plan.topology import crosses_nodes

Part = Literal[
    "products", "attention", "elementwise", "loss", "update", "overhead", "host", "tp", "cp", "pp", "shard", "replicate",
    "bubble",
]  # fmt: skip
PARTS: Final[dict[Kind, Part]] = {
    "linear": "products", "linear back": "products", "softmax": "loss", "update": "update", "turn": "overhead",
    "step": "overhead", "dispatch": "overhead", "again": "overhead",
}  # fmt: skip
AXIS: Final = {"shard": "dp_shard", "batch": "dp_replicate"}  # the axis of the mesh along which messages travel
# On GPUs, messages of parameters and gradients travel while this share of the operations runs
HIDDEN: Final = 0.9


def step_seconds(works: Sequence[Work], layout: Layout, idle: float, rates: Rates) -> dict[Part, float]:
    """
    Return the seconds of a step by part; they add up to its time.

    works: of a pipeline's ranks that differ, of which the slowest counts. idle: the share of a step in which they idle; on CPUs
    others work faster meanwhile. Messages of `dp_shard` and `dp_replicate` count as far as nothing hides them.
    """
    found = [_of_rank(work, layout, rates) for work in works]
    slowest = max(found, key=lambda parts: sum(parts.values()))
    if idle:
        busy = sum(s for part, s in slowest.items() if part not in ("update", "replicate", "shard"))
        slowest["bubble"] = busy * max(0.0, 1 / (rates.sharing * (1 - idle)) - 1)
    return slowest


def idle_share(need: Need) -> float:
    """Return the share of a step in which a pipeline's processes idle."""
    layout, parallel, train = need.layout, need.config.parallel, need.config.train
    if layout.pp == 1:
        return 0.0
    turns = train.global_batch // train.micro_batch // layout.dp
    return bubble_fraction(
        parallel.pp_schedule, layout.pp, stages_per_rank(parallel.pp_schedule, parallel.pp_stages), turns
    )


def _of_rank(work: Work, layout: Layout, rates: Rates) -> dict[Part, float]:
    parts: dict[Part, float] = defaultdict(float)
    host = 0.0
    for counted in (work.done, work.once):
        for op, times in counted.items():
            part = PARTS.get(op.kind, "attention" if "attention" in op.kind else "elementwise")
            parts[part] += times * rates.device(op)
            host += times * rates.host(op)
    device = sum(parts.values())
    if rates.machine.cuda:  # works ahead of the device
        host = max(0.0, host + HOST_MESSAGE * sum(work.messages.values()) - device)
    parts["host"] += host
    sent = _messages(work, layout, rates)
    for part in ("tp", "cp", "pp"):
        parts[part] += sent.get(part, 0.0)
    if rates.machine.cuda:
        left = HIDDEN * device
        for part in ("shard", "replicate"):
            hidden = min(left, sent.get(part, 0.0))
            left -= hidden
            parts[part] += sent.get(part, 0.0) - hidden
    else:  # gloo's threads need the processor too
        parts["shard"] += sent.get("shard", 0.0)
        parts["replicate"] += sent.get("replicate", 0.0)
    return {part: seconds for part, seconds in parts.items() if seconds > 0}


def _messages(work: Work, layout: Layout, rates: Rates) -> Mapping[Part, float]:
    sizes, found = axis_sizes(layout), defaultdict[Part, float](float)
    for (kind, axis, size), times in work.messages.items():
        if sizes[axis] == 1:
            continue
        far = crosses_nodes(layout, AXIS.get(axis, axis), rates.machine.per_node)
        part: Part = {"batch": "replicate", "dp_replicate": "replicate"}.get(axis, axis)  # type: ignore[assignment]
        found[part] += times * rates.message(kind, axis, sizes[axis], size, far=far)
    return found
