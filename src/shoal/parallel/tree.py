"""
Sums in an order that is independent of the layout: a step's micro-batches are the leaves of one binary tree.

Node (level, index) is the sum of the existing leaves in [index * 2^level, (index + 1) * 2^level): the sum of its left and
its right child. A rank owns a run of leaves and sums all complete subtrees within it, like the carries of a binary
counter; few nodes remain. Joining the nodes of all ranks adds the same pairs as a single process would add.
Floating-point addition is commutative but not associative: bits depend on the tree, not on when or where a pair is added.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from shoal.mesh.mesh import Axis


class TreeSum:
    """The nodes of a run of leaves, from the left; two siblings are replaced by their parent immediately."""

    def __init__(self, leaves: int) -> None:
        self.nodes: list[tuple[int, int, torch.Tensor]] = []  # (level, index, sum), no two of them siblings
        self._leaves = leaves
        self._top = max(0, (leaves - 1).bit_length())

    def push(self, index: int, leaf: torch.Tensor) -> None:
        """Add leaf `index`, the next one; `leaf` may be overwritten afterwards."""
        # An odd leaf is added to its left sibling in place: this saves the copy of every second leaf.
        if index % 2 and self.nodes and self.nodes[-1][:2] == (0, index - 1):
            self.nodes[-1][2].add_(leaf)
            self.nodes[-1] = (1, index // 2, self.nodes[-1][2])
            self._carry()
        else:
            self.join(0, index, leaf.clone())

    def join(self, level: int, index: int, node: torch.Tensor) -> None:
        """Add a node to the right of the present ones; the tree takes over its memory."""
        self.nodes.append((level, index, node))
        self._carry()

    def _carry(self) -> None:
        while True:
            level, index, node = self.nodes[-1]
            if index % 2 and len(self.nodes) > 1 and self.nodes[-2][:2] == (level, index - 1):
                del self.nodes[-1]
                self.nodes[-1] = (level + 1, index // 2, self.nodes[-1][2].add_(node))
            elif index % 2 == 0 and level < self._top and (index + 1) << level >= self._leaves:
                # beyond the last leaf there is no right sibling: the node alone is its parent
                self.nodes[-1] = (level + 1, index // 2, node)
            else:
                return

    def root(self) -> torch.Tensor:
        """Return the sum of all leaves."""
        [(level, _, node)] = self.nodes
        assert level == self._top
        return node


@dataclass(frozen=True)
class Leaves:
    """
    The assignment of leaves, the step's micro-batch slots, to the ranks along an axis: consecutive runs in rank order.

    Context parallel splits sequences: `cp` neighbors own the same slots, and each has a part of every leaf. Each part then
    has a separate tree, and the parts' sums are added in order.
    """

    slots: int  # number of leaves
    runs: tuple[range, ...]  # by rank
    parts: int = 1  # the size of `cp`: rank p has part p % parts

    @functools.cached_property
    def spans(self) -> list[list[tuple[int, int]]]:
        """Return (level, index) of the nodes that remain on each rank of the axis after it has summed its leaves."""
        trees = [TreeSum(self.slots) for _ in self.runs]
        for tree, run in zip(trees, self.runs, strict=True):
            for leaf in run:
                tree.push(leaf, torch.empty(0))
        return [[node[:2] for node in tree.nodes] for tree in trees]

    def sum(self, received: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of all leaves. `received[r]`: the nodes of rank r of the axis, [len(spans[r]), ...]; overwritten."""
        totals = []
        for part in range(self.parts):
            tree = TreeSum(self.slots)
            for member in range(part, len(self.runs), self.parts):
                for (level, index), node in zip(self.spans[member], received[member], strict=True):
                    tree.join(level, index, node)
            totals.append(tree.root())
        for other in totals[1:]:
            totals[0] += other
        return totals[0]


class Exchange:
    """An asynchronous reduce-scatter of trees, started by `send` and completed by `wait`. Collectives over `axis`."""

    def __init__(self, leaves: Leaves, axis: Axis) -> None:
        self._leaves, self._axis = leaves, axis
        self._work: dist.Work | None = None
        self._received: torch.Tensor | None = None

    def send(self, tree: TreeSum, chunks: int) -> None:
        """
        Split every node into `chunks` equal chunks, and send chunk r % chunks to rank r. The tree must not change until `wait`.

        If every run is one node and chunks = axis.size, this moves as many bytes as a ring reduce-scatter.
        """
        size, mine = self._axis.size, len(tree.nodes)
        nodes = [node.view(chunks, -1) for _, _, node in tree.nodes]
        sent = nodes[0].unsqueeze(1) if mine == 1 else torch.stack(nodes, dim=1)  # a single node needs no copy
        if chunks < size:
            sent = sent.repeat(size // chunks, 1, 1)
        width = sent.shape[2]
        counts = [len(spans) for spans in self._leaves.spans]
        self._received = sent.new_empty(sum(counts), width)
        self._counts = counts
        self._work = dist.all_to_all_single(
            self._received,
            sent.view(size * mine, width),
            counts,
            [mine] * size,
            group=self._axis.group,
            async_op=True,
        )

    def wait(self) -> torch.Tensor:
        """Return this rank's chunk of the sum."""
        assert self._work is not None
        assert self._received is not None
        self._work.wait()
        total = self._leaves.sum(torch.split(self._received, self._counts))
        self._work = self._received = None
        return total


class TreeReduceScatter:
    """A replacement for one group's reduce-scatter in FSDP2: only the last micro-batch's call sends, and sends tree sums."""

    def __init__(self, leaves: Leaves, batch: Axis, shards: Axis) -> None:
        self._leaves, self._shards = leaves, shards.size
        self._exchange = Exchange(leaves, batch)
        self.slot: int | None = None
        self.last = False
        self.zero()

    def zero(self) -> None:
        self._tree = TreeSum(self._leaves.slots)

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, op: object,
        async_op: bool = False,
    ) -> None:  # fmt: skip
        if self.slot is not None:
            self._tree.push(self.slot, input_tensor)
        if not self.last:
            output_tensor.zero_()  # FSDP2 adds it to `p.grad`
            return
        self._exchange.send(self._tree, self._shards)
        output_tensor.copy_(self._exchange.wait())
        self.zero()  # frees the block's unsharded gradient before the next block's backward
