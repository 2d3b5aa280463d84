"""The state of training: the contents of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.data.order.blend import Stage
from shoal.data.order.held_out import Unread
from shoal.mesh.region import Part, Shard
from shoal.optim.optimizer import Optimizer
from shoal.training.scaler import LossScaler


@dataclass
class TrainState:
    """
    Model, optimizer and progress.

    The data's position is one integer. The schedule and all randomness are functions of step and seed: none is stored.
    """

    shards: Sequence[Shard]
    optimizer: Optimizer
    scaler: LossScaler | None = None
    step: int = 0  # optimizer steps taken
    position: int = 0  # samples consumed
    tokens: int = 0  # valid tokens trained on
    skipped: int = 0  # steps skipped
    losses: Sequence[tuple[int, float]] = ()  # (step, loss): recent ones, to detect spikes
    passed_over: list[tuple[int, int]] = field(default_factory=list)  # sample positions [first, stop) to skip
    quarantined: dict[int, int] = field(default_factory=dict)  # rows that cannot be read, and the rows read instead
    unread: Unread = field(default_factory=dict)  # held-out rows that cannot be read, and are skipped
    stages: Sequence[Stage] = ()  # the shares of a blend's sources, by position; () without weights

    @property
    def num_quarantined(self) -> int:
        """The number of rows that cannot be read, training and held-out, which `data.max_quarantined` limits."""
        return len(self.quarantined) + len(self.unread)

    def tensors(self) -> dict[str, Part]:
        """Return this process's part of each tensor by global name: the live tensors, to save from or load into."""
        named = {}
        for shard in self._first_of_each():
            named[f"model.{shard.name}"] = Part(shard.region, shard.tensor.detach())
            for moment, tensor in self.optimizer.moments(shard).items():
                named[f"optim.{moment}.{shard.name}"] = Part(shard.region, tensor)
        return named

    def _first_of_each(self) -> list[Shard]:
        """Return the first non-empty shard of each name: a process that holds both copies of a tied embedding has two."""
        return list({s.name: s for s in reversed(self.shards) if s.tensor.numel()}.values())

    def scalars(self) -> dict[str, Any]:
        """Return everything but the tensors, as values for JSON."""
        values: dict[str, Any] = {"step": self.step, "position": self.position, "tokens": self.tokens}
        values |= {"skipped": self.skipped, "losses": list(self.losses), "passed_over": self.passed_over}
        if self.quarantined:
            values["quarantined"] = [list(each) for each in self.quarantined.items()]
        if self.unread:
            values["unread"] = [list(each) for each in self.unread]
        if self.stages:
            values["stages"] = [[stage.first, list(stage.shares)] for stage in self.stages]
        if self.scaler is not None:
            values["loss_scale"] = [float(x) for x in (self.scaler.scale, self.scaler.good_steps)]
        return values

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Restore `scalars()` of a checkpoint whose tensors are loaded already, and copy those tensors to their twins."""
        self.step, self.position, self.tokens = (int(scalars[k]) for k in ("step", "position", "tokens"))
        self.skipped = int(scalars.get("skipped", 0))
        self.losses = [(int(step), float(loss)) for step, loss in scalars.get("losses", ())]
        self.passed_over = [(int(first), int(stop)) for first, stop in scalars.get("passed_over", ())]
        self.quarantined = {int(row): int(instead) for row, instead in scalars.get("quarantined", ())}
        self.unread = {(source, int(row)): None for source, row in scalars.get("unread", ())}
        self.stages = [Stage(int(first), tuple(shares)) for first, shares in scalars.get("stages", ())]
        if self.scaler is not None and "loss_scale" in scalars:
            self.scaler.scale.fill_(scalars["loss_scale"][0])
            self.scaler.good_steps.fill_(scalars["loss_scale"][1])
        self.optimizer.set_steps(self.step - self.skipped)
        loaded = {s.name: s for s in self._first_of_each()}
        for twin in self.shards:
            first = loaded.get(twin.name)
            if first is not None and first is not twin:
                twin.tensor.detach().copy_(first.tensor.detach())
                for moment, tensor in self.optimizer.moments(first).items():
                    self.optimizer.moments(twin)[moment].copy_(tensor)
