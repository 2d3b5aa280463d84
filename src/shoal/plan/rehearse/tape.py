"""
Tensors without contents, and an autograd tape for them.

A `Space` is the memory of a tensor: it counts itself as alive from its creation until Python frees it, just as torch's
allocator does for a tensor. Code that mirrors a model's forward therefore has the lifetimes of the real one, and the tape
runs backward in the order of torch's engine (`torch/csrc/autograd/engine.cpp`): the latest ready operation first, its saved
tensors freed when it returns, gradients of one tensor added in place if no one else holds them.
"""

from __future__ import annotations

import heapq
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

# References to an object that no one else holds, as `sys.getrefcount` sees it: a local variable's and its own argument's
_ALONE: Final = 2
_LEAF: Final = sys.maxsize  # number of a parameter's node


@dataclass
class Peak:
    """The most bytes that were alive at once, by part."""

    total: int = 0
    parts: dict[str, int] = field(default_factory=dict)


class Memory:
    """
    The memory of a rank.

    granule: the allocator's unit in bytes; requests are rounded up to it. Bytes are counted by use: parameters, gradients,
    moments, activations, logits, gathered (by FSDP2), messages, and temporary.
    """

    def __init__(self, granule: int = 1) -> None:
        self.granule = granule
        self._now = 0
        self._parts = Counter[str]()
        self._peaks: dict[str, Peak] = {}
        self._peak = Peak()  # of the phase
        self._rises = False  # whether there is as much as never before in this phase, and its parts are not kept yet

    def take(self, part: str, size: int) -> None:
        """Count an allocation."""
        self._now += size
        self._parts[part] += size
        if self._now > self._peak.total:
            self._peak.total = self._now
            self._rises = True

    def free(self, part: str, size: int) -> None:
        """Count what was freed."""
        if self._rises:
            self._keep()
        self._now -= size
        self._parts[part] -= size

    def begin(self, phase: str) -> None:
        """Begin a phase: its peak counts all that is alive then, and later allocations."""
        self._keep()
        self._peak = self._peaks.setdefault(phase, Peak())
        if self._now > self._peak.total:
            self._peak.total = self._now
            self._rises = True

    @property
    def peaks(self) -> dict[str, Peak]:
        """The peaks by phase of the step."""
        self._keep()
        return self._peaks

    def _keep(self) -> None:
        """Keep the parts of the peak. Once for all that is allocated without anything freed between: copying is slow."""
        if self._rises:
            self._peak.parts = dict(self._parts)
            self._rises = False


class Space:
    """
    Memory of `size` bytes in a part of a rank's memory, alive as long as this object.

    held: whether something else holds it in a real step, so that autograd adds no gradient to it in place.
    """

    __slots__ = ("_memory", "held", "part", "size")

    def __init__(self, memory: Memory, part: str, size: int) -> None:
        granule = memory.granule
        self.size = -(-size // granule) * granule
        self.part, self._memory, self.held = part, memory, False
        memory.take(part, self.size)

    def move(self, part: str) -> None:
        """Count this memory as another part's from now on."""
        self._memory.free(self.part, self.size)
        self.part = part
        self._memory.take(part, self.size)

    def __del__(self) -> None:
        self._memory.free(self.part, self.size)


class Node:
    """
    An operation on the tape. backward: gradients of the outputs -> gradients of the inputs, or None.

    frame: where a checkpointed operation finds what it would have saved, under the number `place`. grads: the gradients of its
    outputs that backward has found. waits: for how many operations it waits in backward; None until backward knows.
    """

    __slots__ = ("backward", "frame", "grads", "inputs", "number", "outputs", "place", "saved", "waits")

    def __init__(
        self,
        number: int,
        inputs: Sequence[tuple[Node, int] | None],
        saved: Sequence[Space],
        backward: Backward,
        outputs: int,
    ) -> None:
        self.number, self.inputs, self.saved = number, inputs, list(saved)
        self.backward, self.outputs = backward, outputs
        self.frame: Frame | None = None
        self.place = 0
        self.grads: list[Space | None] | None = None
        self.waits: int | None = None


class Frame:
    """A checkpointed piece of forward (`torch.utils.checkpoint`, not reentrant): how to run it again, and what that saved."""

    def __init__(self, again: Callable[[], object], *, keeps: bool) -> None:
        self.again = again
        self.count = 0  # operations that save something
        self.found: dict[int, list[Space]] | None = None
        self.kept: list[Space] | None = [] if keeps else None  # results that are not computed again


class _EnoughError(Exception):
    """All that backward needs of a frame has been computed again."""


# (gradients of the outputs, saved tensors) -> gradients of the inputs
Backward = Callable[[list[Space | None], list[Space]], Sequence[Space | None]]


class Tensor:
    """A tensor of `count` elements of `width` bytes each; several may share a space. `node`: what made it, if it has a gradient."""

    __slots__ = ("count", "node", "output", "space", "width")

    def __init__(self, space: Space, count: int, width: int, node: Node | None = None, output: int = 0) -> None:
        self.space, self.count, self.width, self.node, self.output = space, count, width, node, output


class Tape:
    """Records operations, and runs backward. `recording` is off inside code without gradients."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.recording = True
        self.frame: Frame | None = None
        self.again = False  # whether the frame runs for the second time
        self._count = 0
        self._place = 0

    def new(self, count: int, width: int, part: str) -> Tensor:
        """Allocate a tensor without a gradient."""
        return Tensor(Space(self.memory, part, count * width), count, width)

    def record(self, out: Tensor, inputs: Sequence[Tensor], saved: Sequence[Tensor], backward: Backward) -> Tensor:
        """Put the operation that made `out` from `inputs` on the tape, if one of them has a gradient; return `out`."""
        out.node = self.save(inputs, saved, backward)
        return out

    def save(self, inputs: Sequence[Tensor], saved: Sequence[Tensor], backward: Backward) -> Node | None:
        """Return the node of an operation of `inputs`; None if none of them has a gradient. torch saves inputs before it computes."""
        if not self.recording:
            return None
        edges = [None if each.node is None else (each.node, each.output) for each in inputs]
        if not any(edges):
            return None
        self._count += 1
        node = Node(self._count, edges, [each.space for each in saved], backward, 1)
        if self.frame is not None and saved:
            self._into_frame(self.frame, node)
        return node

    def several(self, outs: Sequence[Tensor], x: Tensor, backward: Backward) -> None:
        """Put an operation with several outputs on the tape."""
        if node := self.save([x], [], backward):
            node.outputs = len(outs)
            for number, out in enumerate(outs):
                out.node, out.output = node, number

    def checkpoint(self, forward: Callable[[], Tensor], *, keeps: bool) -> Tensor:
        """Run `forward` so that backward runs it again for what it needs. keeps: whether expensive results are kept (`expensive`)."""
        if not self.recording:
            return forward()
        self.frame, self._place = Frame(forward, keeps=keeps), 0
        try:
            return forward()
        finally:
            self.frame.count = self._place
            self.frame = None

    def expensive(self, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` makes, or inside a frame that keeps such results what it made the first time."""
        frame = self.frame
        if frame is None or frame.kept is None:
            return make()
        if self.again:
            space = frame.kept.pop(0)
            return Tensor(space, space.size, 1)
        made = make()
        frame.kept.append(made.space)
        return made

    def _into_frame(self, frame: Frame, node: Node) -> None:
        """Move what a checkpointed operation saved into its frame; the first time, nothing is kept."""
        if self.again:
            assert frame.found is not None
            frame.found[self._place] = node.saved
            self._place += 1
            node.saved = []
            if self._place == frame.count:
                raise _EnoughError
            return
        node.saved, node.frame, node.place = [], frame, self._place
        self._place += 1

    def _run_again(self, frame: Frame) -> None:
        frame.found = {}
        before = self.frame, self.again, self.recording, self._place
        self.frame, self.again, self.recording, self._place = frame, True, True, 0
        with suppress(_EnoughError):
            frame.again()
        self.frame, self.again, self.recording, self._place = before

    def leaf(self, tensor: Tensor, accumulate: Callable[[Space], None]) -> Tensor:
        """Make a parameter of `tensor`: `accumulate` gets its gradient as soon as it is whole."""

        def arrived(grads: list[Space | None], saved: list[Space]) -> Sequence[None]:
            grad = grads.pop()
            assert grad is not None
            accumulate(grad)
            return ()

        # torch runs an accumulation before any operation that is ready at the same time
        tensor.node = Node(_LEAF, (), (), arrived, 1)
        return tensor

    def backward(self, loss: Tensor, *, split: bool = False) -> None:
        """
        Run backward from `loss`, whose own gradient counts nothing, and free the tape behind it.

        split: whether gradients of weights are computed after all others, so that what they need stays until the end.
        """
        kept: list[Sequence[Space | None]] = []
        root = loss.node
        assert root is not None
        loss.node = None
        _count_waits(root)
        ready = [(-root.number, id(root), root)]
        del root
        recording, self.recording = self.recording, False
        while ready:
            _, _, node = heapq.heappop(ready)
            if node.frame is not None:
                if node.frame.found is None:
                    self._run_again(node.frame)
                assert node.frame.found is not None
                node.saved, node.frame = node.frame.found.pop(node.place), None
            held, node.grads = node.grads or [None] * node.outputs, None
            if split:
                kept.append([*node.saved])
                if any(edge is not None and edge[0].number == _LEAF for edge in node.inputs):
                    kept.append([*held])
            grads = list(node.backward(held, node.saved))
            del held
            node.saved.clear()
            for place, edge in enumerate(node.inputs):
                if edge is None:
                    continue
                target, output = edge
                found, grads[place] = grads[place], None
                if found is not None:
                    self._give(target, output, found)
                    del found
                assert target.waits is not None
                target.waits -= 1
                if not target.waits:
                    target.waits = None  # a parameter is on the next tape too
                    heapq.heappush(ready, (-target.number, id(target), target))
            node.inputs = ()
            del grads
        self.recording = recording

    def _give(self, target: Node, output: int, grad: Space) -> None:
        """Add a gradient to those that wait for `target`."""
        if target.grads is None:
            target.grads = [None] * target.outputs
        held = target.grads
        old = held[output]
        if old is None:
            held[output] = grad
            return
        held[output] = None
        if sys.getrefcount(old) <= _ALONE and not old.held:  # added in place
            held[output] = old
        else:
            held[output] = Space(self.memory, old.part, old.size)


def _count_waits(root: Node) -> None:
    """Count for each node before `root` how many operations it waits for."""
    root.waits = 0
    stack = [root]
    while stack:
        for edge in stack.pop().inputs:
            if edge is None:
                continue
            node = edge[0]
            if node.waits is None:
                node.waits = 0
                stack.append(node)
            node.waits += 1
