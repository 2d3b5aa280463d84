"""The gradients of a model sharded by FSDP2, with the interface `Gradients`; `fsdp.py` shards the model."""

from __future__ import annotations

from torch.distributed.fsdp import FSDPModule

from shoal.mesh.mesh import Axis
from shoal.models.family import LanguageModel
from shoal.parallel.tree import Leaves, TreeReduceScatter
from shoal.system.torch_private import require


class ShardedGradients:
    """
    `Gradients` of a model that FSDP2 shards: each `p.grad` is this rank's shard of the sum over all ranks of `batch`.

    In a pipeline, torch's stage itself tells FSDP2 when to reduce, so sums in the tree's order are not available there.
    """

    def __init__(self, model: LanguageModel, batch: Axis, shards: Axis, leaves: Leaves | None) -> None:
        assert isinstance(model, FSDPModule)
        if leaves is not None:
            require("bitwise_shards")
        self._model: FSDPModule = model
        self._parameters = list(model.parameters())
        self._sums: list[TreeReduceScatter] = []
        for module in model.modules():
            if not isinstance(module, FSDPModule):
                continue
            # The loss is already divided by the global number of tokens: sum, do not average. gloo has no pre-scaled sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if leaves is not None:
                self._sums.append(TreeReduceScatter(leaves, batch, shards))
                module.set_custom_reduce_scatter(self._sums[-1])  # type: ignore[arg-type]  # torch does not export the base class

    def zero(self) -> None:
        for p in self._parameters:
            p.grad = None
        for tree_sum in self._sums:
            tree_sum.zero()

    def before_backward(self, slot: int | None, last: bool) -> None:
        for tree_sum in self._sums:
            tree_sum.slot, tree_sum.last = slot, last
        if not self._sums:
            self._model.set_requires_gradient_sync(last)
            self._model.set_is_last_backward(last)

    def after_backward(self, slot: int | None) -> None:
        pass

    def finish(self) -> None:
        pass
