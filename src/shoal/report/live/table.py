"""Several runs at once: a row for each. No torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from rich.text import Text

from shoal.report.live.spark import blocks
from shoal.report.live.view import STYLES, Sight, words
from shoal.run.console import duration
from shoal.system.output import on_one_line

# Columns of the table, the most important first; those that do not fit are omitted.
_COLUMNS: Final = (
    ("run", 18), ("state", 11), ("step", 17), ("loss", 9), ("held-out", 9), ("tokens/s", 10), ("left", 8), ("MFU", 6),
    ("goodput", 8), ("GiB", 7),
)  # fmt: skip


def table(sights: Sequence[Sight], width: int, height: int) -> list[Text]:
    """Return exactly `height` lines: a row for each run, with a curve of its loss in the room that is left."""
    shown, used = [], 0
    for name, size in _COLUMNS:
        if used + size + 1 <= width:
            shown.append((name, size))
            used += size + 1
    curve = width - used if width - used >= 10 else 0
    heads = " ".join(f"{name:<{size}}" if name in ("run", "state") else f"{name:>{size}}" for name, size in shown)
    lines = [words((heads + (" loss curve" if curve >= 12 else ""), "bold"))]
    for sight in sights[: height - 3]:
        lines.append(_row(sight, shown, curve))
        lines += [words((f"  ! {on_one_line(sight.state.why)}", "red"))] if sight.state.why else []
    clock = time.strftime("%H:%M:%S", time.localtime(sights[0].now))
    lines = lines[: height - 1]
    lines += [Text()] * (height - 1 - len(lines))
    found = [*lines, words(("q", "bold"), (f" quits  {clock}  {len(sights)} runs", "dim"))]
    for line in found:
        line.truncate(width, overflow="ellipsis")
    return found


def _row(sight: Sight, shown: Sequence[tuple[str, int]], curve: int) -> Text:
    state = sight.state
    peak = state.peak_memory_bytes or state.memory_bytes
    phase = state.phase.name if state.phase and state.phase.name != "training" else state.condition
    values = {
        "run": on_one_line(state.name),
        "state": on_one_line(phase),
        "step": f"{state.step:,}" + (f"/{state.total_steps:,}" if state.total_steps else ""),
        "loss": "" if state.loss is None else f"{state.loss:.4f}",
        "held-out": "" if state.val_loss is None else f"{state.val_loss:.4f}",
        "tokens/s": "" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f}",
        "left": "" if state.left_seconds is None else duration(state.left_seconds),
        "MFU": "" if state.mfu is None else f"{100 * state.mfu:.1f}%",
        "goodput": "" if state.goodput is None else f"{100 * state.goodput:.1f}%",
        "GiB": f"{max(peak) / 2**30:.2f}" if peak else "",
    }
    line = Text()
    for name, size in shown:
        cell = Text(values[name], STYLES[state.condition] if name == "state" else "bold" if name == "run" else "")
        cell.truncate(size, overflow="ellipsis")
        if name in ("run", "state"):
            cell.pad_right(size - cell.cell_len)
        else:
            cell.pad_left(size - cell.cell_len)
        line.append_text(cell).append(" ")
    if curve and "loss" in sight.series:
        line.append(blocks(sight.series["loss"].columns(curve), ascii_only=sight.ascii_only), "cyan")
    return line
