"""
The memory and messages of FSDP2, as `torch.distributed.fsdp` of torch 2.13 handles them.

Read in `_fully_shard/_fsdp_param_group.py` and `_fsdp_collectives.py`: a group's parameters are gathered into one buffer and
copied from it. In forward the buffer stays until the next group's is full; in backward it is freed at once, and the next
group's is requested before this group computes. Gradients are copied into one buffer and reduce-scattered; that buffer stays
until the next group's gradients are whole, or the step's last backward of these groups ends. In a pipeline
(`torch/distributed/pipelining/stage.py`), parameters stay gathered after backward, and all groups are reduced after a stage's
last one, the root first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.plan.rehearse.layers import FLOAT32, Layers
from shoal.plan.rehearse.tape import Space


@dataclass
class Shared:
    """What the groups of a model share: the order of forward, and the buffers that outlive a group's turn."""

    layers: Layers
    ranks: int
    replicas: int
    resharded: bool  # after forward
    stays: bool  # whether parameters stay gathered after a backward that does not reduce, as in a pipeline
    order: list[Group] = field(default_factory=list)
    held: Space | None = None  # forward's last gathered buffer
    sent: Space | None = None  # backward's last sent buffer
    sync: bool = True  # whether this backward reduces


class Group:
    """The parameters of a block, or those outside the blocks. width: bytes of an element while gathered."""

    def __init__(self, shared: Shared, sizes: Mapping[str, tuple[int, int]], width: int, *, is_root: bool) -> None:
        self.shared, self.width, self.is_root = shared, width, is_root
        ranks = shared.ranks
        # (rows, elements of a row): rows are divided, the last ranks may have fewer
        self.padded = {name: -(-rows // ranks) * ranks * row for name, (rows, row) in sizes.items()}
        self.coming: Space | None = None
        self.gathered: list[Space] = []
        self.grads: dict[str, Space] = {}
        self.added: dict[str, Space] = {}
        self.shards: list[Space] = []
        self.count = sum(self.padded.values())

    def accumulate(self, name: str, grad: Space) -> None:
        """Take the gradient of one parameter; torch adds it to an earlier one of the same dtype."""
        if name not in self.grads and not (name in self.added and self.width == FLOAT32):
            self.grads[name] = grad

    def request(self) -> None:
        """Start the all-gather."""
        if self.coming is not None or self.gathered:
            return
        layers, shared = self.shared.layers, self.shared
        narrow = layers.new(self.count // shared.ranks, self.width) if self.width != FLOAT32 else None
        layers.work.op("copy", self.count // shared.ranks * (FLOAT32 + self.width))
        self.coming = Space(layers.tape.memory, "gathered", self.count * self.width)
        del narrow
        layers.work.messages["all_gather", "shard", self.coming.size] += 1
        if layers.kernels.copies:  # gloo gathers into one buffer of its own
            Space(layers.tape.memory, "messages", self.count * self.width)

    def gather(self, *, forward: bool) -> None:
        """Wait for the all-gather, and copy the parameters out of its buffer."""
        if self.gathered:
            return
        self.request()
        shared = self.shared
        if forward:
            shared.held = None
        self.gathered = [
            Space(shared.layers.tape.memory, "gathered", count * self.width) for count in self.padded.values()
        ]
        shared.layers.work.op("copy", 2 * self.count * self.width)
        if forward:
            shared.held = self.coming
        self.coming = None

    def free(self) -> None:
        self.gathered = []

    def after_forward(self) -> None:
        if not self.is_root:
            if self.shared.resharded:
                self.free()
            self.shared.order.append(self)

    def before_backward(self) -> None:
        self.gather(forward=False)
        order = self.shared.order
        if not self.is_root and order and order[-1] is self:
            order.pop()
            if order:
                order[-1].request()

    def after_backward(self) -> None:
        memory, shared = self.shared.layers.tape.memory, self.shared
        for name in list(self.added):
            self.grads.pop(name, None)
        if not shared.sync:
            if not shared.stays:
                self.free()
            if self.width != FLOAT32:
                for name, grad in list(self.grads.items()):
                    self.added[name] = Space(memory, "gradients", grad.size // self.width * FLOAT32)
                    shared.layers.work.op("copy", grad.size + self.added[name].size)
                    del self.grads[name], grad
            else:
                self.added |= self.grads
                self.grads = {}
            return
        grads = {**self.added, **self.grads}
        self.added, self.grads = {}, {}
        last = grads.get([*self.padded][-1])  # a variable of torch's loop holds it until the message is sent
        self.free()
        shared.sent = None
        buffer = Space(memory, "messages", self.count * FLOAT32)
        shared.layers.work.op("copy", sum(grad.size for grad in grads.values()) + buffer.size)
        grads.clear()
        shard = Space(memory, "gradients", self.count * FLOAT32 // shared.ranks)
        messages = shared.layers.work.messages
        messages["reduce_scatter", "shard", buffer.size] += 1
        if shared.replicas > 1:
            messages["all_reduce", "dp_replicate", shard.size] += 1
        if shared.layers.kernels.copies:  # gloo reduces a copy of the whole
            Space(memory, "messages", self.count * FLOAT32)
        del last
        self.shards.append(shard)
        shared.sent = buffer
