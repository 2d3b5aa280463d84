"""Dropout as a function of (seed, step, slot, layer): the same in every layout, and nothing of it in a checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from shoal.models.family import LanguageModel
from shoal.parallel.recompute import Forward


class Randomness:
    """Seeds the generators before each part and each block that draws; where no model draws, it does nothing."""

    def __init__(self, parts: Mapping[int, LanguageModel], seed: int) -> None:
        self._parts = {index: part for index, part in parts.items() if part.shape.dropout > 0}
        self._seed, self._step, self._first = seed, 0, 0
        self._forwards = dict.fromkeys(parts, 0)  # a part's forwards come in the order of the step's slots

    def wrap(self) -> None:
        """Outermost, around checkpointing: what is computed again finds the generators as they were."""
        for index, part in self._parts.items():
            part.forward = self._whole(index, part.forward)  # type: ignore[method-assign]
            for name, block in part.blocks.items():
                block.forward = self._layer(index, name, part, block.forward)

    def begin(self, step: int, first_slot: int) -> None:
        """The next forwards are those of this step, from this slot on."""
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
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1)
