"""Weights & Biases: online, or as archives in the run's folder, which `wandb sync` uploads; with the package `wandb`."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import wandb

from shoal.config.track_options import Track
from shoal.trackers.points import About, Batch
from shoal.trackers.tracker import Opened, Tracker


class WeightsAndBiases(Tracker):
    """
    A W&B run. Each row has its own `step`, which is the horizontal axis: W&B rejects rows of steps that it has passed.

    An archive cannot be opened again: a run that is resumed offline continues in a new one, of the same group.
    """

    def __init__(self, track: Track, folder: Path) -> None:
        super().__init__(track, folder)
        self._why = (
            "track.offline"
            if track.offline
            else f"WANDB_MODE={os.environ['WANDB_MODE']}"
            if os.environ.get("WANDB_MODE") in ("offline", "dryrun")
            else ""
            if os.environ.get("WANDB_API_KEY")
            else "WANDB_API_KEY is not set"
        )

    @property
    def destination(self) -> str:
        return "offline" if self._why else f"{self.track.entity or ''}/{self.track.project}"

    def open(self, about: About, state: Mapping[str, Any]) -> Opened:
        segment = int(state.get("segments", 0)) + 1
        goes_on = bool(state) and not self._why
        settings = wandb.Settings(
            console="off", silent=True, x_disable_stats=True, x_disable_meta=True, disable_git=True, disable_code=True
        )
        self._run = run = cast(Any, wandb.init)(
            entity=self.track.entity, project=self.track.project, dir=self.folder, settings=settings,
            mode="offline" if self._why else "online", reinit="create_new",
            name=about.name if goes_on or segment == 1 else f"{about.name} ({segment})", group=about.name,
            id=str(state["id"]) if goes_on else None, resume="allow" if goes_on else None,
        )  # fmt: skip
        run.config.update({**about.options, "run": dict(about.facts)}, allow_val_change=True)
        self._run.define_metric("*", step_metric="step")
        if about.model:
            self._run.log({"about/model": _preformatted(about.model), "step": 0})
        return Opened(self._where(), {"id": self._run.id, "segments": segment})

    def _where(self) -> str:
        if not self._why:
            return str(self._run.url)
        archive = self.folder / "wandb" / Path(self._run.dir).parent.name
        return f"offline ({self._why}): wandb sync {archive} uploads it"

    def write(self, batch: Batch) -> None:
        for each in batch.scalars:
            self._run.log({**each.values, "step": each.step, "time": each.time})
        for note in batch.notes:
            is_sample = note.name.startswith("samples/")
            text = _preformatted(note.text) if is_sample else note.text
            self._run.log({note.name: text, "step": note.step, "time": note.time})

    def close(self) -> None:
        self._run.finish()


def _preformatted(text: str) -> wandb.Html:
    return wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
