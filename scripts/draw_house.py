#!/usr/bin/env python
"""
Draw docs/pictures/house.svg, the architecture of src/shoal: rooms (its folders) on floors (layers), imports, a step's path.

Floors and imports are those that tests/test_rooms.py checks, and a room's text is the first sentence of its docstring.
Transitive imports are not drawn: if A imports B and B imports C, there is no arrow from A to C. Run it after rooms change.
"""

from __future__ import annotations

import argparse
import ast
import html
import itertools
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # tests/ is not installed

from tests.test_rooms import FLOORS, SOURCE, imported, modules, room  # noqa: E402

PICTURE = ROOT / "docs" / "pictures" / "house.svg"

# The path of a training step: module, function, what happens there. `svg` checks that the functions exist.
WAY = [
    ("data.loader", "next_step", "take the micro-batches that a thread has read ahead"),
    ("training.step", "train_step", "start the optimizer step"),
    ("parallel.runnable", "forward_backward", "count the step's valid tokens over all ranks"),
    ("models.llama", "forward", "run the blocks; backward follows, micro-batch by micro-batch"),
    ("models.loss", "linear_cross_entropy_sum", "sum the loss, divided by the step's tokens"),
    ("parallel.reduce", "after_backward", "send gradients during the last backward"),
    ("mesh.mesh", "sum", "sum losses and the ranks' votes in one collective"),
    ("training.guard", "judge", "skip the step on all ranks if it is NaN or Inf"),
    ("training.clip", "clip", "clip by the norm over all shards"),
    ("optim.optimizer", "step", "update this rank's shards"),
    ("metrics.meter", "record", "record the step: on a GPU one step late"),
    ("checkpoint.store", "begin", "copy the state for a save, if one is due"),
]

# Width of a room, space between rooms, width of the lane in which an arrow passes a floor
WIDTH, GAP, LANE = 186, 26, 16
LINE, PAD, NAME, INNER = 13, 8, 20, 24
INNER_ROOMS = 2  # in a line
BETWEEN = 42  # vertical space between floors
INK, PALE, RED, FRAME = "#24292f", "#57606a", "#b42318", "#8c959f"


@dataclass
class Box:
    """A room, or, with no name, the lane of an arrow that passes a floor."""

    name: str = ""
    words: list[str] = field(default_factory=list)
    inner: list[str] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    x: float = 0.0  # of the center
    width: int = WIDTH

    @property
    def height(self) -> int:
        lines = -(-len(self.inner) // INNER_ROOMS)
        return PAD + NAME + LINE * len(self.words) + INNER * lines + PAD if self.name else 0


def words(name: str) -> str:
    """Return the first sentence of a room's docstring."""
    path = SOURCE.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    return text[0].partition(". ")[0].replace("`", "").removesuffix(".") if text else ""


def arrows() -> dict[str, set[str]]:
    """Return the imports: each room -> the rooms from which it imports."""
    found: dict[str, set[str]] = {}
    for module, path in modules().items():
        found.setdefault(room(module), set()).update({room(t) for t in imported(path)} - {room(module)})
    return found


def reduced(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the transitive reduction of `edges`, which must be acyclic."""

    def reached(name: str) -> set[str]:
        return set().union(*({t} | reached(t) for t in edges.get(name, ())))

    return {
        name: {t for t in targets if not any(t in reached(o) for o in targets - {t})} for name, targets in edges.items()
    }


def folded(edges: Mapping[str, set[str]], inside: Mapping[str, str]) -> dict[str, set[str]]:
    """Return `edges` with each room that is a key of `inside` replaced by its value, the room that contains it."""
    merged: dict[str, set[str]] = {}
    for name, targets in edges.items():
        outer = inside.get(name, name)
        merged.setdefault(outer, set()).update({inside.get(t, t) for t in targets} - {outer})
    return merged


class House:
    """Floors of boxes, lowest first, and arrows. An arrow is a chain of boxes, one on each floor that it touches."""

    def __init__(self, floors: Sequence[Sequence[Box]], edges: Mapping[str, set[str]]) -> None:
        self.floors = [list(row) for row in floors]
        self.level = {box.name: (n, box) for n, row in enumerate(self.floors) for box in row}
        self.chains: list[list[Box]] = []
        self.beside: list[tuple[Box, Box]] = []  # arrows within a floor
        for name in self.level:
            for target in sorted(edges.get(name, ())):
                (top, source), (bottom, goal) = self.level[name], self.level[target]
                if top == bottom:
                    self.beside.append((source, goal))
                    continue
                lanes = [Box(width=LANE) for _ in range(abs(top - bottom) - 1)]
                way = range(top - 1, bottom, -1) if top > bottom else range(top + 1, bottom)
                for lane, number in zip(lanes, way, strict=True):
                    self.floors[number].append(lane)
                self.chains.append([source, *lanes, goal])
        self.hops = [hop for chain in self.chains for hop in itertools.pairwise(chain)]
        self.arrange()

    def arrange(self) -> None:
        """Order each floor so that few arrows cross, then move boxes towards the boxes at the other ends of their arrows."""
        for _ in range(6):
            for row in self.floors:
                self.improve(row)
        for _ in range(60):
            for row in self.floors:
                self.settle(row)

    def improve(self, row: list[Box]) -> None:
        """Move each box of a floor to the position where arrows cross least and are shortest."""
        for box in list(row):
            self.settle(row)
            orders: list[list[Box]] = []
            for place in range(len(row)):
                others = [b for b in row if b is not box]
                orders.append([*others[:place], box, *others[place:]])
            best: list[Box] = min(orders, key=self.cost)
            row[:] = best
            self.settle(row)

    def cost(self, row: Sequence[Box]) -> float:
        """Return the cost of a floor's order: crossings and horizontal lengths of arrows, and gaps between its connected boxes."""
        spread(row)
        mine = {id(b) for b in row}
        total = 0.0
        for above in (True, False):
            hops = [h if above else h[::-1] for h in self.hops if id(h[not above]) in mine]
            hops = [h for h in hops if id(h[1]) in mine]
            total += sum((a[0].x - b[0].x) * (a[1].x - b[1].x) < 0 for a, b in itertools.combinations(hops, 2))
            total += sum(abs(a.x - b.x) for a, b in hops) / 400
        places = {id(b): n for n, b in enumerate(row)}
        apart = [abs(places[id(a)] - places[id(b)]) - 1 for a, b in self.beside if id(a) in mine]
        return total + 20 * sum(apart)

    def settle(self, row: Sequence[Box]) -> None:
        """Move the boxes of a floor as near to the other ends of their arrows as order and widths allow."""
        wanted = []
        for box in row:
            near = [b.x for a, b in self.hops if a is box] + [a.x for a, b in self.hops if b is box]
            wanted.append(sum(near) / (len(near) + 0.2) if near else box.x)  # with a weak pull to the middle
        spread(row)
        gaps = [0.0, *((a.width + b.width) / 2 + gap(a, b) for a, b in itertools.pairwise(row))]
        offsets = list(itertools.accumulate(gaps))
        # isotonic regression: pool neighbors that would overlap
        pools: list[list[float]] = []
        for want, offset in zip(wanted, offsets, strict=True):
            pools.append([want - offset, 1])
            while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
                (x, n), (y, m) = pools.pop(-2), pools.pop()
                pools.append([(x * n + y * m) / (n + m), n + m])
        places = [x for x, n in pools for _ in range(int(n))]
        for box, place, offset in zip(row, places, offsets, strict=True):
            box.x = place + offset


def spread(row: Sequence[Box]) -> None:
    """Put the boxes of a floor side by side around 0."""
    edge = 0.0
    for box, after in itertools.zip_longest(row, row[1:]):
        box.x = edge + box.width / 2
        edge += box.width + (gap(box, after) if after else 0)
    for box in row:
        box.x -= edge / 2


def gap(a: Box, b: Box) -> int:
    return GAP if a.name or b.name else 0


def text(
    x: float, y: float, words: str, *, size: int = 11, color: str = PALE, bold: bool = False, mid: bool = True
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    anchor = ' text-anchor="middle"' if mid else ""
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" fill="{color}"{weight}{anchor}>{html.escape(words)}</text>'
    )


def badge(x: float, y: float, number: int) -> str:
    return f'<circle cx="{x:.0f}" cy="{y:.0f}" r="9" fill="{RED}"/>' + text(
        x, y + 4, str(number), size=11, color="#ffffff", bold=True
    )


def draw(house: House, way: Sequence[str] = ()) -> str:
    """Return the picture as SVG. Below it, list the lines of text in `way`, the path of a training step."""
    rows = house.floors[::-1]
    heights = [max((b.height for b in row), default=0) for row in rows]
    tops = [30 + sum(heights[:n]) + BETWEEN * n for n in range(len(rows))]
    left = min(b.x - b.width / 2 for row in rows for b in row) - 90
    width = max(b.x + b.width / 2 for row in rows for b in row) - left + 30
    y_of = {id(b): (top, height) for row, top, height in zip(rows, tops, heights, strict=True) for b in row}
    body = []
    for number, (top, height) in enumerate(zip(tops, heights, strict=True)):
        body.append(
            f'<rect x="0" y="{top - 12}" width="{width:.0f}" height="{height + 24}" fill="#f6f8fa"/>'
            + text(14, top + height / 2 + 4, f"floor {len(rows) - number}", mid=False)
        )
    body += [arrow(chain, house, y_of, left) for chain in house.chains]
    for a, b in house.beside:
        sign = 1 if b.x > a.x else -1
        y = y_of[id(a)][0] + min(a.height, b.height) / 2
        start, end = a.x - left + sign * a.width / 2, b.x - left - sign * (b.width / 2 + 2)
        body.append(line(f"M{start:.0f} {y:.0f} L{end:.0f} {y:.0f}"))
    body += [box_svg(b, b.x - left, y_of[id(b)][0]) for row in rows for b in row if b.name]
    bottom = tops[-1] + heights[-1] + 40
    if way:
        body.append(text(14, bottom, "The path of a training step", size=14, color=INK, bold=True, mid=False))
        half = (len(way) + 1) // 2
        for number, words in enumerate(way):
            x, y = 24 + (number // half) * width / 2, bottom + 24 + (number % half) * 22
            body += [badge(x, y - 4, number + 1), text(x + 16, y, words, size=12, color=INK, mid=False)]
        bottom += 24 + half * 22
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {bottom:.0f}" width="{width:.0f}" '
        f'font-family="DejaVu Sans, Verdana, Helvetica, sans-serif">\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{FRAME}"/></marker></defs>\n'
        f'<rect width="{width:.0f}" height="{bottom:.0f}" fill="#ffffff"/>'
    )
    return "\n".join([head, *body, "</svg>"]) + "\n"


def line(path: str, color: str = FRAME) -> str:
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="1.3" marker-end="url(#head)"/>'


def port(box: Box, other: Box, hops: Sequence[tuple[Box, Box]], *, leaves: bool) -> float:
    """Return the x at which an arrow meets a box. Arrows of a box are side by side, in the order of their other ends."""
    if not box.name:
        return box.x
    ends = sorted((b if leaves else a).x for a, b in hops if (a if leaves else b) is box)
    place = ends.index(other.x)
    return box.x + (place - (len(ends) - 1) / 2) * min(22.0, (box.width - 40) / max(1, len(ends)))


def arrow(chain: Sequence[Box], house: House, y_of: Mapping[int, tuple[int, int]], left: float) -> str:
    """Return one arrow, curved between floors and straight past a floor."""
    down = y_of[id(chain[0])][0] < y_of[id(chain[-1])][0]
    path = ""
    for a, b in itertools.pairwise(chain):
        (top_a, height_a), (top_b, height_b) = y_of[id(a)], y_of[id(b)]
        x0, x1 = port(a, b, house.hops, leaves=True) - left, port(b, a, house.hops, leaves=False) - left
        y0 = top_a + height_a if down else top_a  # below the tallest room, so that the arrow passes behind no room
        y1 = (top_b if down else top_b + (b.height or height_b)) - (2 if b.name and down else 0)
        middle = y0 + (y1 - y0) * 0.5
        path += "" if path else f"M{x0:.0f} {top_a + a.height if down else top_a} "
        path += f"L{x0:.0f} {y0:.0f} "
        path += f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f} "
    return line(path.strip(), FRAME if down else RED)


def box_svg(box: Box, x: float, y: float) -> str:
    parts = [
        f'<rect x="{x - box.width / 2:.0f}" y="{y}" width="{box.width}" height="{box.height}" rx="6" fill="#ffffff" '
        f'stroke="{INK}" stroke-width="1.2"/>',
        text(x, y + PAD + 12, box.name, size=14, color=INK, bold=True),
    ]
    parts += [text(x, y + PAD + NAME + LINE * n + 9, words) for n, words in enumerate(box.words)]
    for n, name in enumerate(box.inner):
        row, column = divmod(n, INNER_ROOMS)
        share = (box.width - 12) / INNER_ROOMS
        at = x - box.width / 2 + 6 + share * column + 2
        low = y + PAD + NAME + LINE * len(box.words) + INNER * row + 2
        parts.append(
            f'<rect x="{at:.0f}" y="{low}" width="{share - 4:.0f}" height="20" rx="4" fill="#eef2f6" stroke="{FRAME}"/>'
            + text(at + share / 2 - 2, low + 14, name, color=INK)
        )
    parts += [badge(x - box.width / 2 + 4 + 20 * n, y - 2, number) for n, number in enumerate(box.stops)]
    return "\n".join(parts)


def svg() -> str:
    """Return the picture of the current source."""
    for module, function, _ in WAY:
        names = {getattr(n, "name", "") for n in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8")))}
        if function not in names:
            raise SystemExit(f"WAY in {Path(__file__).name} names {module}.{function}, which does not exist")
    edges = arrows()
    inside = {name: name.partition(".")[0] for row in FLOORS for name in row if "." in name}
    floors = []
    for row in FLOORS:
        boxes = []
        for name in sorted(row & edges.keys() - inside.keys() - {"__init__"}):
            inner = sorted(i for i, outer in inside.items() if outer == name)
            stops = [n for n, (module, _, _) in enumerate(WAY, 1) if room(module) in (name, *inner)]
            boxes.append(Box(name, textwrap.wrap(words(name), 27), [i.partition(".")[2] for i in inner], stops))
        floors.append(boxes)
    way = [f"{module.replace('.', '/')}.py, {function}: {what}" for module, function, what in WAY]
    return draw(House(floors, reduced(folded(edges, inside))), way)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PICTURE.write_text(svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
