"""Bytes of parameters, gradients and optimizer state by module, from the shards that a rank holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from shoal.metrics.profile.records import ModuleMemory
from shoal.training.state import TrainState


def bytes_by_module(state: TrainState, activations: Mapping[str, int], order: Sequence[str]) -> list[ModuleMemory]:
    """
    Return this rank's memory by module, in the order of the model.

    activations: bytes by module. order: names of modules; others follow. A twin of a tied embedding counts as a second
    parameter, since it takes memory too.
    """
    parameters: Counter[str] = Counter()
    gradients: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    for shard in state.shards:
        module = shard.name.rpartition(".")[0]
        parameters[module] += shard.tensor.nbytes
        gradients[module] += 0 if shard.tensor.grad is None else shard.tensor.grad.nbytes
        if shard.tensor.numel():
            moments[module] += sum(each.nbytes for each in state.optimizer.moments(shard).values())
    names = dict.fromkeys([*order, *parameters, *activations])
    return [
        ModuleMemory(
            name=name, parameter_bytes=parameters[name], gradient_bytes=gradients[name], optimizer_bytes=moments[name],
            activation_bytes=activations.get(name, 0),
        )
        for name in names
        if parameters[name] or activations.get(name, 0)
    ]  # fmt: skip
