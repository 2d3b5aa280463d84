"""The architecture of a run: the model's blocks with the shapes of their weights, and the ranks with what each axis splits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shoal.config.families import FAMILIES
from shoal.config.layout import AXES, Layout
from shoal.config.options import Config
from shoal.config.presets import resolve_shape
from shoal.config.schedules import bubble_fraction, rank_stages, stage_blocks, stages_per_rank
from shoal.plan.estimate import flops_per_token, why_no_flops
from shoal.plan.fit import held_bytes
from shoal.report.pictures.anatomy import Anatomy, Weight, anatomy
from shoal.report.pictures.canvas import FAINT, INK, PALE, canvas
from shoal.system.disk import gigabytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXIS_COLORS: Final = {
    "pp": "#cc79a7",
    "dp_replicate": "#56b4e9",
    "dp_shard": "#009e73",
    "cp": "#e69f00",
    "tp": "#0072b2",
}
WIDTH, LEFT, GAP = 13.0, 6.3, 0.5  # inches: the figure, the model, the space to the ranks
ROW, SPACE = 0.44, 0.12  # inches: a row of weights, the space below it
SHOWN = 6  # ranks in a row or column before some are omitted
STRIPES = 16  # parts of a weight that are drawn apart, at most


@dataclass(frozen=True)
class Figures:
    """The numbers that the picture shows, from the planner's formulas."""

    parameters: int
    block_parameters: int
    flops_per_token: int | None
    held_bytes: float
    tokens_per_step: int

    @classmethod
    def of(cls, config: Config, layout: Layout) -> Figures:
        """Return the numbers of a config."""
        parts = anatomy(config.model)
        known = why_no_flops(config.model, config.data.seq_len) is None
        return cls(
            parameters=parts.parameters,
            block_parameters=parts.block_parameters,
            flops_per_token=flops_per_token(config.model, config.data.seq_len) if known else None,
            held_bytes=held_bytes(config, layout),
            tokens_per_step=config.train.global_batch * config.data.seq_len,
        )

    def lines(self) -> Iterator[str]:
        """Yield a line for each number, with its unit."""
        yield f"parameters: {self.parameters:,}, of them {self.block_parameters:,} in each block"
        if self.flops_per_token is not None:
            yield f"computation: {si(self.flops_per_token)}FLOP per token, forward and backward"
        yield f"memory: {gigabytes(int(self.held_bytes))} per process for weights, gradients and optimizer state"
        yield f"step: {self.tokens_per_step:,} tokens"


def si(number: float) -> str:
    """Return a number with a prefix of the SI: "180 M", "1.2 G"."""
    size, prefix = next(
        (s, p)
        for s, p in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
        if number >= s or s == 1
    )
    return f"{number / size:.3g} {prefix}"


def what_axes_do(config: Config, layout: Layout) -> Iterator[tuple[str, str]]:
    """Yield (axis, what it splits) for each axis of more than one process."""
    parallel, native = config.parallel, FAMILIES[config.model.family].native
    stages = stages_per_rank(parallel.pp_schedule, parallel.pp_stages)
    micro_batches = max(1, config.train.global_batch // config.train.micro_batch // layout.dp)
    bubble = bubble_fraction(parallel.pp_schedule, layout.pp, stages, micro_batches)
    words = {
        "pp": f"the blocks, in {layout.pp * stages} stages ({parallel.pp_schedule}, bubble {100 * bubble:.0f}% of a step)",
        "dp_replicate": f"a step's micro-batches, over {layout.dp_replicate} replicas that sum their gradients",
        "dp_shard": f"a step's micro-batches, and the state of the model, in {layout.dp_shard} shards (FSDP2)",
        "cp": f"each sequence, in {layout.cp} parts of {config.data.seq_len // layout.cp:,} tokens",
        "tp": f"the striped weights, in {layout.tp} parts"
        if native
        else f"weights, in {layout.tp} parts, by the model's own plan",
    }
    yield from ((axis, words[axis]) for axis in AXES if getattr(layout, axis) > 1)


def draw_architecture(config: Config, layout: Layout, name: str) -> Iterator[Figure]:
    """Yield the figure, inside the style that it must be saved in."""
    parts = anatomy(config.model)
    rows = sum(len(each) for each in (parts.before, parts.block, parts.after))
    ranks = _Ranks(config, layout)
    height = max(
        2.0 + (rows + 1) * (ROW + SPACE), 2.9 + ranks.height + 0.3 * sum(1 for _ in what_axes_do(config, layout))
    )
    with canvas(WIDTH, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.grid(visible=False)
        axes.set(xlim=(0, WIDTH), ylim=(0, height))
        figure.set_layout_engine("none")
        _text(axes, 0.3, height - 0.35, f"Architecture of {name}", size=14, weight="bold")
        _text(axes, 0.3, height - 0.68, _subtitle(config, parts), color=PALE)
        _draw_model(axes, config, layout, parts, height - 1.0)
        _draw_ranks(axes, config, layout, ranks, height - 1.0)
        yield figure


def _subtitle(config: Config, parts: Anatomy) -> str:
    model = resolve_shape(config.model)
    kind = model.from_ or model.preset or model.family
    heads = f"{model.num_heads} heads of {model.head_dim}, {model.num_kv_heads} key and value heads"
    dtype = "" if config.train.dtype == "auto" else f", {config.train.dtype}"
    return f"{kind}: {parts.layers} blocks, width {model.dim:,}, {heads}{dtype}"


# --- the model ----------------------------------------------------------------------------------------------------------


def _draw_model(axes: Axes, config: Config, layout: Layout, parts: Anatomy, y: float) -> None:
    batch = f"a micro-batch: {config.train.micro_batch} x {config.data.seq_len:,} tokens"
    y = _draw_note(axes, batch, y)
    for row in parts.before:
        y = _draw_row(axes, row, layout, y, 0.0)
    top = y + 0.02
    y -= 0.3
    _text(
        axes,
        0.45,
        y + 0.1,
        f"block, {parts.layers} times: {parts.block_parameters:,} parameters each",
        size=9,
        weight="bold",
    )
    for row in parts.block:
        y = _draw_row(axes, row, layout, y, 0.2)
    _box(axes, 0.3, y + SPACE / 2, LEFT - 0.3, top - y - SPACE / 2, fill="none", edge=PALE)
    y -= SPACE
    for row in parts.after:
        y = _draw_row(axes, row, layout, y, 0.0)
    end = "the head is the embedding's weights" if config.model.tie_embeddings else "logits"
    _draw_note(axes, f"{end}; loss in nats per token", y)


def _draw_note(axes: Axes, text: str, y: float) -> float:
    _text(axes, LEFT / 2 + 0.15, y - 0.1, text, size=8, color=PALE, ha="center")
    return y - 0.3


def _draw_row(axes: Axes, row: Sequence[Weight], layout: Layout, y: float, indent: float) -> float:
    """Draw the weights of a row side by side below `y`; return the y below them."""
    left, right = 0.3 + indent, LEFT - indent
    width = (right - left - SPACE * (len(row) - 1)) / len(row)
    for number, weight in enumerate(row):
        _draw_weight(axes, weight, layout, left + number * (width + SPACE), y - ROW, width)
    return y - ROW - SPACE


def _draw_weight(axes: Axes, weight: Weight, layout: Layout, x: float, y: float, width: float) -> None:
    _box(axes, x, y, width, ROW, fill="#f6f8fa", edge=FAINT)
    if layout.tp > 1 and weight.split is not None:
        _draw_stripes(axes, layout.tp, x, y, width)
    name = weight.name.rpartition(".")[2] if len(weight.name) > 20 else weight.name
    shape = " x ".join(f"{size:,}" if size else "?" for size in weight.shape)
    count = f"{weight.parameters:,}" if all(weight.shape) else "vocabulary unknown"
    _text(axes, x + 0.08, y + ROW - 0.14, name, size=8, weight="bold")
    _text(axes, x + 0.08, y + 0.15, f"{shape}{' and bias' * bool(weight.bias)}", size=7, color=PALE)
    if 0.075 * len(name) + 0.06 * len(count) + 0.3 < width:
        _text(axes, x + width - 0.08, y + ROW - 0.14, count, size=7, color=PALE, ha="right")


def _draw_stripes(axes: Axes, tp: int, x: float, y: float, width: float) -> None:
    """Mark a weight that tensor parallel splits: one stripe a part, below its name."""
    shown = min(tp, STRIPES)
    for part in range(shown):
        alpha = 0.85 if part % 2 else 0.4
        _box(axes, x + part * width / shown, y, width / shown, 0.06, fill=AXIS_COLORS["tp"], edge="none", alpha=alpha)


# --- the ranks ----------------------------------------------------------------------------------------------------------


class _Ranks:
    """The place of each rank: a frame for each pipeline rank, in it a row for each data-parallel rank, a column for cp and tp."""

    CELL, HEAD, FOOT = 0.42, 0.62, 0.18

    def __init__(self, config: Config, layout: Layout) -> None:
        self.layout = layout
        self.frames = shown(layout.pp)
        self.rows, self.columns = shown(layout.dp), shown(layout.cp * layout.tp)
        self.head = self.HEAD if layout.cp * layout.tp > 1 else 0.32
        self._whole = self.head + self.CELL * len(self.rows) + self.FOOT
        self.height = sum(self.frame_height(frame) + SPACE for frame in self.frames)
        self._config = config

    def is_whole(self, frame: int) -> bool:
        """Return whether a frame shows its ranks: of many stages, only the first and the last do."""
        return self.layout.pp <= 2 or frame in (0, self.layout.pp - 1)

    def frame_height(self, frame: int | None) -> float:
        """Return the height of a frame in inches."""
        return self._whole if frame is not None and self.is_whole(frame) else 0.3

    def rank(self, frame: int, row: int, column: int) -> int:
        """Return the rank in a cell."""
        return (frame * self.layout.dp + row) * self.layout.cp * self.layout.tp + column

    def holds(self, frame: int) -> str:
        """Return which stages and blocks a pipeline rank holds."""
        parallel, layout, layers = self._config.parallel, self.layout, self._config.model.num_layers
        if layout.pp == 1:
            return f"all {layers} blocks"
        stages = stages_per_rank(parallel.pp_schedule, parallel.pp_stages)
        held = rank_stages(parallel.pp_schedule, layout.pp, stages, frame)
        blocks = stage_blocks(layers, layout.pp * stages)
        ranges = ", ".join(_range(blocks[stage]) for stage in held)
        ends = ["embed"] * (0 in held) + [f"blocks {ranges}"] + ["norm, head"] * (layout.pp * stages - 1 in held)
        return f"stage {', '.join(map(str, held))}: {', '.join(ends)}"

    def name_of_row(self, row: int) -> str:
        """Return "dp_replicate 1, dp_shard 0", with the axes of more than one process."""
        places = self.layout.coordinates(self.rank(0, row, 0))
        return "\n".join(f"{a} {places[a]}" for a in ("dp_replicate", "dp_shard") if getattr(self.layout, a) > 1)

    def name_of_column(self, column: int) -> str:
        """Return "cp 0" over "tp 1", with the axes of more than one process."""
        places = self.layout.coordinates(self.rank(0, 0, column))
        return "\n".join(f"{axis} {places[axis]}" for axis in ("cp", "tp") if getattr(self.layout, axis) > 1)


def shown(count: int) -> list[int | None]:
    """Return the indices to draw; None is for those omitted from a long row."""
    return [*range(count)] if count <= SHOWN else [*range(SHOWN - 2), None, count - 1]


def _range(blocks: range) -> str:
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"


def _draw_ranks(axes: Axes, config: Config, layout: Layout, ranks: _Ranks, y: float) -> None:
    x = LEFT + GAP
    world = layout.world_size
    title = f"{world:,} processes: {layout}" if world > 1 else "one process"
    _text(axes, x, y - 0.1, title, size=11, weight="bold")
    y -= 0.4
    for frame in ranks.frames:
        if frame is None:
            _text(axes, x + 0.1, y - 0.15, f"... {layout.pp - SHOWN + 1} more", size=8, color=PALE)
        else:
            _draw_frame(axes, ranks, frame, x, y)
        y -= ranks.frame_height(frame) + SPACE
    y -= 0.2
    for axis, words in what_axes_do(config, layout):
        _box(axes, x, y - 0.07, 0.2, 0.16, fill=AXIS_COLORS[axis], edge="none")
        _text(axes, x + 0.3, y, f"{axis} {getattr(layout, axis)}", size=8, weight="bold")
        _text(axes, x + 1.4, y, f"splits {words}", size=8)
        y -= 0.3
    for line in Figures.of(config, layout).lines():
        _text(axes, x, y, line, size=8, color=INK)
        y -= 0.26


def _draw_frame(axes: Axes, ranks: _Ranks, frame: int, x: float, y: float) -> None:
    width = WIDTH - x - 0.3
    bottom = y - ranks.frame_height(frame)
    edge = AXIS_COLORS["pp"] if ranks.layout.pp > 1 else FAINT
    _box(axes, x, bottom, width, ranks.frame_height(frame), fill="#ffffff", edge=edge)
    name = f"pp {frame}, " if ranks.layout.pp > 1 else ""
    _text(axes, x + 0.1, y - 0.14, name + ranks.holds(frame), size=8, weight="bold")
    if not ranks.is_whole(frame):
        return
    cell_x, step = x + 1.3, (width - 1.4) / max(3, len(ranks.columns))
    for place, column in enumerate(ranks.columns):
        label = "..." if column is None else ranks.name_of_column(column)
        _text(axes, cell_x + (place + 0.5) * step, y - 0.43, label, size=7, color=AXIS_COLORS["tp"], ha="center")
    for line, row in enumerate(ranks.rows):
        top = y - ranks.head - line * ranks.CELL
        label = "..." if row is None else ranks.name_of_row(row)
        _text(axes, x + 0.1, top - ranks.CELL / 2, label, size=7, color=AXIS_COLORS["dp_shard"])
        for place, column in enumerate(ranks.columns):
            words = "..." if row is None or column is None else f"rank {ranks.rank(frame, row, column)}"
            _box(
                axes,
                cell_x + place * step + 0.03,
                top - ranks.CELL + 0.04,
                step - 0.06,
                ranks.CELL - 0.08,
                fill="#ddf4ff",
                edge=FAINT,
            )
            _text(axes, cell_x + (place + 0.5) * step, top - ranks.CELL / 2, words, size=8, ha="center")


def _box(
    axes: Axes, x: float, y: float, width: float, height: float, *, fill: str, edge: str, alpha: float = 1.0
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge, linewidth=1, alpha=alpha))


def _text(
    axes: Axes,
    x: float,
    y: float,
    words: str,
    *,
    size: float = 9,
    color: str = INK,
    weight: str = "normal",
    ha: str = "left",
) -> None:
    axes.text(x, y, words, fontsize=size, color=color, fontweight=weight, ha=ha, va="center", parse_math=False)
