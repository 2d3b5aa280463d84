"""Draws the state of a run as lines that fit a terminal of any size. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from shoal.report.live.spark import Scale, Series, bar, blocks, chart, outliers, stacked
from shoal.report.live.state import State
from shoal.run.console import duration
from shoal.system.output import on_one_line

WIDE: Final = 130  # columns from which charts stand beside tables
FEWEST_ROWS: Final = 4  # of a block that needs none: fewer would say nothing
GAP: Final = 3  # columns between the two sides
STYLES: Final = {
    "running": "bold green", "finished": "bold cyan", "stopped": "bold yellow", "crashed": "bold red", "not started": "bold",
}  # fmt: skip
# Each part of a bar has its own color, and its own letter in the bar, for terminals and eyes without colors.
PARTS: Final = ("blue", "green", "yellow", "magenta", "cyan", "red", "white", "bright_black", "bright_blue")
SPARKS: Final = {  # small curves, the most important first: the name in `Sight.series`, its title, its unit
    "tokens_per_second": ("speed", "tokens/s"),
    "lr": ("lr", ""),
    "grad_norm": ("norm", ""),
    "step_seconds": ("step", "s"),
    "mfu": ("MFU", "%"),
    "memory_bytes": ("memory", "GiB"),
}
BAD_EVENTS: Final = (
    "crashed", "hang", "save failed", "damaged", "went back", "fault", "alert raised", "alert not posted",
)  # fmt: skip
SCORE: Final = 6.0  # a spike score from which a step counts as a spike


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What a view draws: the state, and the curves of the whole run by name."""

    state: State
    series: Mapping[str, Series] = field(default_factory=dict)
    spikes: Sequence[tuple[int, float]] = ()  # (step, score) of steps with a high spike score
    now: float = 0.0
    ascii_only: bool = False


@dataclass(frozen=True)
class Block:
    """A part of the view. `draw` returns at most `rows` lines of at most `width` columns."""

    draw: Callable[[int, int], list[Text]]
    least: int  # rows, without which it is not drawn; 0: only if there is room for its usual ones
    usual: int
    most: int
    rank: int  # the lower, the sooner it gets its rows


def frame(sight: Sight, width: int, height: int) -> list[Text]:
    """Return exactly `height` lines of at most `width` columns."""
    head = [_title(sight, width), *_progress(sight, width)]
    foot = [_foot(sight, width)] if height > len(head) + 3 else []
    room = height - len(head) - len(foot)
    if width >= WIDE:
        left = (width - GAP) * 3 // 5
        right = width - GAP - left
        body = _beside(left, _stack(_left(sight, left), left, room), _stack(_right(sight), right, room))
    else:
        body = _stack([*_left(sight, width), *_right(sight)], width, room)
    lines = [*head, *body]
    lines = [*lines[: height - len(foot)], *[Text()] * max(0, height - len(foot) - len(lines)), *foot]
    return [_cut(line, width) for line in lines[:height]]


def _left(sight: Sight, width: int) -> list[Block]:
    """Return the curves and the numbers."""
    state = sight.state
    numbers = len(_numbers(sight, width, 4))
    found = [Block(lambda w, r: _numbers(sight, w, r), min(numbers, 2), numbers, numbers, 0)]
    if "loss" in sight.series:
        found.append(Block(lambda w, r: _loss_chart(sight, "loss", w, r), 4, 9, 24, 3))
    shown = [name for name in SPARKS if name in sight.series]
    if shown:
        found.append(Block(lambda w, r: _sparks(sight, shown, w, r), 1, len(shown), len(shown), 6))
    if "val_loss" in sight.series and len(sight.series["val_loss"].steps) > 1:
        found.append(Block(lambda w, r: _loss_chart(sight, "val_loss", w, r), 0, 6, 9, 8))
    if "recent" in sight.series and len(sight.series["recent"].steps) > 20:
        found.append(Block(lambda w, r: _loss_chart(sight, "recent", w, r), 0, 7, 11, 7))
    if state.split_seconds:
        found.append(Block(lambda w, r: _split(sight, w, r), 1, 2, 2, 2))
    if state.goodput is not None:
        found.append(Block(lambda w, r: _goodput(sight, w, r), 1, 2, 2, 2))
    return found


def _right(sight: Sight) -> list[Block]:
    """Return memory, ranks, alerts, events and the sample."""
    state = sight.state
    found = []
    if state.memory_bytes or state.peak_memory_bytes:
        found.append(Block(lambda w, r: _memory(sight, w, r), 1, 1, 1, 2))
    if count := len(state.alerts) + bool(state.why):
        found.append(Block(lambda w, r: _alerts(sight, w, r), 1, count, count, 1))
    if (count := len(state.memory_bytes)) > 1:
        found.append(Block(lambda w, r: _ranks(sight, w, r), 0, 2 + min(count, 8), 2 + count, 5))
    if events := shown_events(state.events):
        found.append(Block(lambda w, r: _events(events, w, r), 3, 6, 12, 4))
    if state.sample:
        found.append(Block(lambda w, r: _sample(sight, w, r), 0, 6, 14, 9))
    return found


def _stack(blocks_: Sequence[Block], width: int, height: int) -> list[Text]:
    """Return the blocks below each other. By rank, each gets the rows it needs, then its usual ones, then more."""
    rows = [0] * len(blocks_)
    left = height
    by_rank = sorted(range(len(blocks_)), key=lambda index: blocks_[index].rank)
    for index in by_rank:
        if blocks_[index].least <= left:
            rows[index] = blocks_[index].least
            left -= rows[index]
    for wanted in ([block.usual for block in blocks_], [block.most for block in blocks_]):
        for index in by_rank:
            more = min(left, wanted[index] - rows[index])
            if rows[index] or more >= min(FEWEST_ROWS, wanted[index]) > 0:
                rows[index] += more
                left -= more
    drawn = [block.draw(width, given)[:given] for block, given in zip(blocks_, rows, strict=True) if given]
    return [line for lines in drawn for line in lines]


def _beside(width: int, left: Sequence[Text], right: Sequence[Text]) -> list[Text]:
    """Return two stacks beside each other; `width` is the left one's."""
    lines = []
    for row in range(max(len(left), len(right))):
        line = _cut(left[row] if row < len(left) else Text(), width)
        line.pad_right(width - line.cell_len + GAP)
        lines.append(line + (right[row] if row < len(right) else Text()))
    return lines


def _cut(line: Text, width: int) -> Text:
    line = line.copy()
    line.truncate(width, overflow="ellipsis")
    return line


def words(*parts: tuple[str, str] | str) -> Text:
    """Return a line of parts, each a text or (text, style)."""
    return Text.assemble(*parts)


# --- the head ---------------------------------------------------------------------------------------------


def _title(sight: Sight, width: int) -> Text:
    state = sight.state
    style = STYLES[state.condition]
    line = words(("shoal top ", "dim"), (on_one_line(state.name), "bold"), "  ", (state.condition, style))
    if state.seconds is not None:
        line.append(f"  for {duration(state.seconds)}", "dim")
    if state.restarts:
        line.append(f", {state.restarts} restart{'s' * (state.restarts > 1)}", "dim")
    if state.processes:
        what = f"  {state.processes} process{'es' * (state.processes > 1)} on {on_one_line(state.device)}"
        line.append(what if line.cell_len + cell_len(what) <= width else "", "dim")
    return line


def _progress(sight: Sight, width: int) -> list[Text]:
    state = sight.state
    phase = state.phase
    lines = []
    if phase is not None and phase.is_before_steps:
        lines.append(_phase_line(sight, width))
    if state.total_steps:
        share = state.step / state.total_steps
        left = f"  {duration(state.left_seconds)} left" if state.left_seconds is not None else ""
        doing = (
            f"  {phase.name}" if phase is not None and not phase.is_before_steps and phase.name != "training" else ""
        )
        numbers = f"step {state.step:,}/{state.total_steps:,} "
        tail = f" {100 * share:5.1f}%{left}{doing}"
        room = max(4, width - cell_len(numbers + tail))
        lines.append(words((numbers, "bold"), (bar(share, room, ascii_only=sight.ascii_only), "green"), tail))
    elif state.step or phase is None:
        lines.append(words((f"step {state.step:,}", "bold")))
    return lines


def _phase_line(sight: Sight, width: int) -> Text:
    """Return the phase before the first step, with a bar if its amount of work is known."""
    phase = sight.state.phase
    assert phase is not None
    name = on_one_line(phase.name)
    if not phase.total:
        done = f" ({phase.done:,.0f} done)" if phase.done else ""
        return words(("now: ", "dim"), (f"{name}{done} ...", "bold yellow"))
    share = phase.done / phase.total
    tail = f" {100 * share:5.1f}%"
    room = max(4, min(40, width - cell_len(f"now: {name} {tail}")))
    return words(
        ("now: ", "dim"), (f"{name} ", "bold yellow"), (bar(share, room, ascii_only=sight.ascii_only), "yellow"), tail
    )


def _foot(sight: Sight, width: int) -> Text:
    state = sight.state
    age = "" if state.news_seconds is None else f"  last written {duration(state.news_seconds)} ago"
    clock = time.strftime("%H:%M:%S", time.localtime(sight.now))
    return words(("q", "bold"), (" quits", "dim"), (f"  {clock}{age}  {on_one_line(state.folder)}", "dim"))


# --- numbers ----------------------------------------------------------------------------------------------


def _numbers(sight: Sight, width: int, rows: int) -> list[Text]:
    """Return the last values with their units, on as many lines as needed."""
    state = sight.state
    parts: list[Text] = []

    def add(name: str, value: str, style: str = "bold") -> None:
        parts.append(words((f"{name} ", "dim"), (value, style)))

    if state.loss is not None:
        add("loss", f"{state.loss:.4f} nats/token", "bold cyan")
    if state.val_loss is not None:
        best = (
            ""
            if state.best_val_step == state.val_step
            else f", best {state.best_val_loss:.4f} at {state.best_val_step:,}"
        )
        add("held-out", f"{state.val_loss:.4f} at step {state.val_step:,}{best}")
    if state.val_bits_per_byte is not None:
        add("bits/byte", f"{state.val_bits_per_byte:.3f}")
    if state.tokens_per_second is not None:
        add("speed", f"{state.tokens_per_second:,.0f} tokens/s")
    if state.step_seconds is not None:
        add("step", f"{1000 * state.step_seconds:,.0f} ms")
    if state.mfu is not None:
        add("MFU", f"{100 * state.mfu:.1f}%")
    if state.lr is not None:
        add("lr", f"{state.lr:.2e}")
    if state.loss is not None:
        add("norm", "overflow" if state.grad_norm is None else f"{state.grad_norm:.2f}")
    if state.tokens:
        add("tokens", amount(state.tokens))
    if state.spike_score is not None and abs(state.spike_score) >= SCORE:
        add("spike score", f"{state.spike_score:.1f}", "bold red")
    return flow(parts, width)[:rows] or [words(("no step recorded yet", "dim"))]


def flow(parts: Sequence[Text], width: int) -> list[Text]:
    """Return the parts on lines of at most `width` columns."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + 2 + part.cell_len <= width:
            lines[-1].append("  ").append_text(part)
        else:
            lines.append(part.copy())
    return lines


def amount(value: float) -> str:
    """Return "12", "1.2k", "3.4M", "5.6G"."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


# --- curves -----------------------------------------------------------------------------------------------

_TITLES: Final = {"loss": "loss", "val_loss": "held-out loss", "recent": "loss, recent steps"}


def _loss_chart(sight: Sight, name: str, width: int, rows: int) -> list[Text]:
    """Return a curve with its scale at the left and its steps in the title; columns that stick out are red."""
    series = sight.series[name]
    margin = 8
    across = 1 if sight.ascii_only else 2
    count = max(1, width - margin) * across
    columns = series.columns(count)
    marked = outliers(columns)
    scale = Scale.of(columns, spikes=marked)
    lines = chart(columns, max(1, rows - 1), scale, ascii_only=sight.ascii_only)
    red = [any(marked[at : at + across]) for at in range(0, count, across)]
    top, bottom = f"{scale.top:.3f}", f"{scale.bottom:.3f}"
    found = [
        _chart_title(
            sight,
            name,
            series,
            scale,
            max((c[1] for c, m in zip(columns, marked, strict=True) if c and m), default=0.0),
        )
    ]
    for row, line in enumerate(lines):
        label = top if row == 0 else bottom if row == len(lines) - 1 else ""
        drawn = words((f"{label:>{margin - 1}} ", "dim"))
        for at, character in enumerate(line):
            drawn.append(character, "bold red" if red[at] else "cyan")
        found.append(drawn)
    return found


def _chart_title(sight: Sight, name: str, series: Series, scale: Scale, highest: float) -> Text:
    """Return the title of a curve: its unit and steps, and its spikes. highest: the highest value of a column that sticks out."""
    line = words((_TITLES[name], "bold"), (f"  nats/token, steps {series.steps[0]:,} to {series.steps[-1]:,}", "dim"))
    if scale.logarithmic:
        line.append(", log scale", "dim")
    spikes = [each for each in sight.spikes if series.steps[0] <= each[0] <= series.steps[-1]]
    if spikes and name != "val_loss":
        step, score = spikes[-1]
        more = f", {len(spikes) - 1} more" if len(spikes) > 1 else ""
        line.append(f"  spike near step {step:,} (score {score:.0f}){more}", "bold red")
    elif highest > scale.top:
        line.append(f"  spikes up to {highest:.3f}", "bold red")
    return line


def _sparks(sight: Sight, names: Sequence[str], width: int, rows: int) -> list[Text]:
    """Return small curves of one line each, with the last value and the range."""
    found = []
    for name in names[:rows]:
        title, unit = SPARKS[name]
        series = sight.series[name]
        value = getattr(sight.state, name, None)
        last = quantity(name, value if isinstance(value, float) else series.high[-1], unit)
        peak = f"max {quantity(name, max(series.high), unit)}"
        tail = f" {last:>16}" + (f"  {peak:>20}" if width >= 78 else "")
        room = max(4, width - 8 - cell_len(tail))
        line = words((f"{title:7} ", "dim"))
        line.append(blocks(series.columns(room), ascii_only=sight.ascii_only, from_zero=name != "lr"), "blue")
        found.append(line.append(tail))
    return found


def quantity(name: str, value: float, unit: str) -> str:
    """Return a value with its unit."""
    if name == "mfu":
        return f"{100 * value:.1f}%"
    if name == "memory_bytes":
        return f"{value / 2**30:.2f} GiB"
    if name == "lr":
        return f"{value:.2e}"
    if name == "tokens_per_second":
        return f"{value:,.0f} {unit}"
    return f"{value:.3g} {unit}".rstrip()


# --- where the time goes ----------------------------------------------------------------------------------


def _split(sight: Sight, width: int, rows: int) -> list[Text]:
    """Return the phases of a step: a bar, and their shares."""
    seconds = {name: each for name, each in sight.state.split_seconds.items() if name != "step"}
    total = max(sum(seconds.values()), sight.state.step_seconds or 0.0)
    if rest := max(0.0, total - sum(seconds.values())):
        seconds["between"] = rest
    return _shares(sight, "step", seconds, f"{1000 * total:,.0f} ms", width, rows)


def _goodput(sight: Sight, width: int, rows: int) -> list[Text]:
    """Return where the run's seconds went."""
    state = sight.state
    assert state.goodput is not None
    seconds = dict(sorted(state.spent_seconds.items(), key=lambda item: -item[1]))
    return _shares(sight, "goodput", seconds, f"{100 * state.goodput:.1f}%", width, rows)


def _shares(sight: Sight, title: str, seconds: Mapping[str, float], headline: str, width: int, rows: int) -> list[Text]:
    """Return the shares of a total in words, and with two rows also as a bar."""
    total = sum(seconds.values()) or 1.0
    shown = [(name, each / total) for name, each in seconds.items() if each / total >= 0.001]
    styles = dict(zip(seconds, PARTS, strict=False))
    line = words((f"{title:7} ", "dim"), (headline, "bold"))
    for name, share in shown:
        part = words("  ", (name, styles.get(name, "white")), f" {100 * share:.1f}%")
        if line.cell_len + part.cell_len > width:
            break
        line.append_text(part)
    if rows < 2:
        return [line]
    cells = Text("        ")
    for (name, _), count in zip(shown, stacked([share for _, share in shown], width - 8), strict=True):
        fill = name[:count].ljust(count) if count > len(name) else " " * count
        if sight.ascii_only:
            fill = fill.replace(" ", name[0])
        cells.append(fill, f"black on {styles.get(name, 'white')}")
    return [line, cells]


# --- memory and ranks -------------------------------------------------------------------------------------


def _memory(sight: Sight, width: int, rows: int) -> list[Text]:
    state = sight.state
    used, peak = state.memory_bytes, state.peak_memory_bytes
    line = words(("memory  ", "dim"))
    if used:
        most = max(range(len(used)), key=lambda rank: used[rank])
        where = f" (rank {most}, the most of {len(used)})" if len(used) > 1 else ""
        line.append(f"{used[most] / 2**30:.2f} GiB", "bold").append(where, "dim")
    if peak:
        line.append("  peak " if used else "peak ", "dim").append(f"{max(peak) / 2**30:.2f} GiB", "bold")
        if state.device_memory_bytes:
            share = max(peak) / state.device_memory_bytes
            line.append(f" of {state.device_memory_bytes / 2**30:.0f} GiB, {100 * share:.0f}%")
    return [line]


def _ranks(sight: Sight, width: int, rows: int) -> list[Text]:
    """Return a table of ranks: memory, and busy time by phase; the slowest ones if there is no room for all."""
    state = sight.state
    phases = list(state.busy_seconds)
    busy = [sum(state.busy_seconds[p][rank] for p in phases) for rank in range(len(state.memory_bytes))]
    room = max(1, rows - 2)
    order = sorted(range(len(busy)), key=lambda rank: -busy[rank])[:room]
    cut = len(order) < len(busy)
    size = min(10, max(6, (width - 29) // max(1, len(phases))))
    heads = "".join(f"{p[: size - 1]:>{size}}" for p in phases)
    title = words(("ranks", "bold"), ("  busy ms of the last measured step" + (", the busiest" if cut else ""), "dim"))
    lines = [title, words((f"{'rank':>5}{'GiB':>8}{'peak':>8}{'busy':>8}{heads}", "dim"))]
    slowest = max(busy, default=0.0)
    for rank in sorted(order) if not cut else order:
        peak = state.peak_memory_bytes[rank] / 2**30 if rank < len(state.peak_memory_bytes) else 0.0
        line = words(f"{rank:>5}{state.memory_bytes[rank] / 2**30:>8.2f}{peak:>8.2f}")
        line.append(f"{1000 * busy[rank]:>8.0f}", "bold yellow" if busy[rank] == slowest else "bold")
        for phase in phases:
            line.append(f"{1000 * state.busy_seconds[phase][rank]:>{size}.0f}")
        lines.append(line)
    return lines


# --- what happened ----------------------------------------------------------------------------------------


def _alerts(sight: Sight, width: int, rows: int) -> list[Text]:
    state = sight.state
    lines = [words((f"! {on_one_line(state.why)}", "bold red"))] if state.why else []
    lines += [
        words(("! alert ", "bold red"), on_one_line(each.get("text", each.get("rule", "")))) for each in state.alerts
    ]
    if len(lines) > rows:
        lines[rows - 1 :] = [words((f"! {len(lines) - rows + 1} more alerts", "bold red"))]
    return lines


def shown_events(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the events without those that only say that an alert was posted."""
    return [each for each in events if not (each.get("event") == "alert" and each.get("state") == "posted")]


def _events(events: Sequence[Mapping[str, Any]], width: int, rows: int) -> list[Text]:
    last = events[-(rows - 1) :] if rows > 1 else []
    return [words(("events", "bold")), *map(event_line, last)]


def event_line(event: Mapping[str, Any]) -> Text:
    """Return an event with its time and its short facts."""
    when = event.get("time")
    clock = time.strftime("%m-%d %H:%M:%S", time.localtime(when)) if isinstance(when, int | float) else "--:--:--"
    name = on_one_line(event.get("event", "?"))
    facts = [f"{key} {_fact(event[key])}" for key in _FACTS if event.get(key) is not None]
    facts += [f"in {event['seconds']:.1f} s"] if isinstance(event.get("seconds"), float) else []
    if name == "alert":
        name, facts = f"alert {event.get('state')}", [on_one_line(event.get("text") or event.get("rule") or "")]
    bad = name in BAD_EVENTS
    return words((f"{clock} ", "dim"), (on_one_line(name), "bold red" if bad else "bold"), ("  " + ", ".join(facts)))


# Facts of an event that are shown, in this order.
_FACTS: Final = (
    "step", "rank", "processes", "device", "to", "val_loss", "how", "phase", "text", "why", "source", "fault",
)  # fmt: skip


def _fact(value: object) -> str:
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else on_one_line(value)
    )


def _sample(sight: Sight, width: int, rows: int) -> list[Text]:
    """Return the newest sample, broken at the width."""
    text = " ".join(on_one_line(line) for line in sight.state.sample.splitlines())
    lines = [words(("sample", "bold"))]
    while text and len(lines) < rows:
        piece = set_cell_size(text, width).rstrip() if cell_len(text) > width else text
        lines.append(Text(piece))
        text = text[len(piece) :].lstrip()
    return lines
