"""A run's summary card, 1200 x 630 pixels: the size in which other sites show a page's picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from shoal.errors import ShoalError
from shoal.plan.estimate import parameter_count
from shoal.report.pictures.canvas import COLORS, FAINT, INK, PALE, canvas
from shoal.report.pictures.details import goodput_bar
from shoal.report.pictures.loss import draw_run
from shoal.report.pictures.seen import COUNTS, Seen, scale_of
from shoal.report.runs.cost import Cost
from shoal.run.console import duration
from shoal.run.goodput import Account, account

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 12.0, 6.3  # inches, at 100 pixels an inch
WIDEST: Final = 36  # characters of a line of a fact


def draw_card(run: Seen, cost: Cost | None) -> Iterator[Figure]:
    """Yield the figure, inside the style that it must be saved in."""
    with canvas(WIDTH, HEIGHT) as figure:
        figure.set_layout_engine("none")
        page = figure.add_axes((0, 0, 1, 1))
        page.set_axis_off()
        page.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        page.axhspan(0, 0.12, color=COLORS[0])
        page.text(0.5, 5.82, _short(run.name, 40), fontsize=24, fontweight="bold", va="center", parse_math=False)
        page.text(0.5, 5.38, _short(subtitle(run), 90), fontsize=12, color=PALE, va="center", parse_math=False)
        _draw_curve(figure, run)
        _draw_facts(page, list(facts(run, cost)))
        spent = account(run.folder.time_file) if run.folder.time_file.is_file() else None
        if spent is not None:
            _draw_goodput(figure, spent)
        yield figure


def subtitle(run: Seen) -> str:
    """Return what was trained on what: "llama, 2.56 M parameters, trained on stdlib"."""
    model, data = run.config.model, run.config.data
    kind = model.from_ or model.preset or model.family
    try:
        size = f", {in_words(parameter_count(model))} parameters"
    except (ShoalError, ValueError):  # the folder of its weights is gone
        size = ""
    sources = ", ".join(data.sources or ()) or data.corpus
    return f"{kind}{size}, trained on {sources}, sequences of {data.seq_len:,} tokens"


def facts(run: Seen, cost: Cost | None) -> Iterator[tuple[str, str]]:
    """Yield (name, value with its unit), the most telling first."""
    bits = run.window("val_bits_per_byte", 1 << 30)
    if bits is not None:
        yield "held-out text", f"{bits.mean[-1]:.3f} bits per byte"
        if bits.low.min() < bits.mean[-1]:
            yield "best held-out", f"{bits.low.min():.3f} bits per byte, step {bits.step[bits.low.argmin()]:,}"
    last = run.curves.window("loss", first_step=run.curves.last_step)
    yield "training loss", f"{last.mean[-1]:.3f} nats per token" if len(last) else "none"
    whole = run.curves.window("loss", columns=1 << 30)
    yield "trained on", f"{in_words(int(whole.tokens[-1]))} tokens in {whole.step[-1]:,} steps"
    yield "time in steps", duration(float(whole.seconds[-1]))
    if whole.seconds[-1] > 0:
        yield "throughput", f"{whole.tokens[-1] / whole.seconds[-1]:,.0f} tokens/s, mean"
    yield "hardware", hardware(run)
    if cost is not None:
        yield "cost", cost.in_words()


def in_words(count: int) -> str:
    """Return a count with three digits that count: "596 thousand", "1.97 million"."""
    words, unit = next(each for each in COUNTS if count >= each[1] or each[1] == 1)
    return f"{count / unit:.3g} {words.strip(' ()s')}".strip()


def hardware(run: Seen) -> str:
    """Return "2 processes on AMD EPYC"."""
    start = run.started
    count = int(start.get("processes") or 1)
    gpus = start.get("gpus") or [{}]
    name = gpus[0].get("name") or start.get("device_name") or start.get("machine", {}).get("processor") or "cpu"
    return f"{count} process{'es' * (count > 1)} on {name}"


def _draw_curve(figure: Figure, run: Seen) -> None:
    axes = figure.add_axes((0.075, 0.26, 0.49, 0.5))
    window = run.window("loss", 1)
    assert window is not None
    whole = run.curves.window("loss", columns=1 << 30)
    scale = scale_of("tokens", float(whole.tokens[-1]))
    draw_run(axes, run, "tokens", scale, 0, "training, mean of a step")
    axes.set(xlabel=scale.label, ylabel="loss (nats per token)")
    axes.margins(x=0.01)
    if any(line.get_gid() == "held-out-0" for line in axes.get_lines()):
        next(line for line in axes.get_lines() if line.get_gid() == "held-out-0").set_label("held-out text")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.03), ncols=2, fontsize=9, borderpad=0)


def _draw_facts(page: Axes, found: list[tuple[str, str]]) -> None:
    """Write the facts in two columns, the first one large."""
    y = 4.75
    for number, (name, value) in enumerate(found):
        page.text(7.3, y, name, fontsize=11, color=PALE, va="center", parse_math=False)
        size, weight = (15, "bold") if number == 0 else (11, "normal")
        lines = _wrapped(value)
        page.text(8.75, y, lines, fontsize=size, color=INK, fontweight=weight, va="center", parse_math=False)
        y -= 0.44 + 0.2 * lines.count("\n")
        page.plot([7.3, 11.6], [y + 0.22, y + 0.22], color=FAINT, linewidth=0.6)


def _draw_goodput(figure: Figure, spent: Account) -> None:
    axes = figure.add_axes((0.04, 0.105, 0.92, 0.03))
    axes.set_axis_off()
    goodput_bar(axes, spent)
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=7, fontsize=8, borderpad=0, handlelength=1.2)
    axes.text(0, 0.62, f"goodput {100 * spent.goodput:.1f}% of {duration(spent.total / 1e6)}", fontsize=9, va="bottom")


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, WIDEST, max_lines=2, placeholder=" ...", break_on_hyphens=False))


def _short(text: str, longest: int) -> str:
    return textwrap.shorten(text, longest, placeholder=" ...") if " " in text else text[:longest]
