"""Dropout as a function of (seed, step, micro-batch, layer): identical in every layout that allows dropout, without saved state."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from shoal.models.family import LanguageModel
from shoal.parallel.recompute import Forward


class Randomness:
    """Seeds the generators before each forward of a part and of a block; does nothing without dropout."""

    def __init__(self, parts: Mapping[int, LanguageModel], seed: int) -> None:
        self._parts = {index: part for index, part in parts.items() if part.shape.dropout > 0}
        self._seed, self._step, self._first = seed, 0, 0
        self._forwards = dict.fromkeys(parts, 0)  # number of forwards in this step, by part; they run in slot order

    def wrap(self) -> None:
        """Wrap the forwards outside of checkpointing, which then saves the seeded generators' state for its recomputation."""
        for index, part in self._parts.items():
            part.forward = self._whole(index, part.forward)  # type: ignore[method-assign]
            for name, block in part.blocks.items():
                block.forward = self._layer(index, name, part, block.forward)

    def begin(self, step: int, first_slot: int) -> None:
        """Start a step: its next forwards are those of `first_slot` and the slots after it."""
        self._step, self._first = step, first_slot
        self._forwards = dict.fromkeys(self._forwards, 0)

    def _whole(self, index: int, forward: Forward) -> Forward:
        def seeded(*args: object, **kwargs: object) -> torch.Tensor:
            self._forwards[index] += 1
            self._set(index, "enter")
            return forward(*args, **kwargs)

        return seeded

    def _layer(self, index: int, name: str, part: LanguageModel, forward: Forward) -> Forward:
        def seeded(*args: object, **kwargs: object) -> torch.Tensor:
            if part.training:
                self._set(index, name)
            return forward(*args, **kwargs)

        return seeded

    def _set(self, index: int, layer: str) -> None:
        slot = self._first + self._forwards[index] - 1
        key = f"{self._seed} {self._step} {slot} {layer}"
        # a hash, so that neighboring steps and slots get unrelated seeds; 63 bits, since torch takes a signed integer
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1)
