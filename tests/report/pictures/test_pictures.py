"""Pictures read back: axes with names and units, every spike, no overlapping words, the same bytes each time."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from shoal.errors import RunError, ShoalError
from shoal.report.pictures.canvas import CATEGORY_COLORS, COLORS, save
from shoal.report.pictures.card import draw_card
from shoal.report.pictures.details import draw_details
from shoal.report.pictures.loss import draw_loss, running_mean
from shoal.report.pictures.seen import Seen, read_runs, scale_of
from shoal.report.runs.cost import cost, prices
from shoal.run.folder import RunFolder
from shoal.run.goodput import account
from tests.cli.commands import Place
from tests.report.pictures.seen import overlaps, pixels, rows_of, texts
from tests.report.synthetic import write_run

LONG, SPIKE = 50_000, 35_123


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: a long one with a spike of one step and a restart, and one with another learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "long", LONG, seed=1, spikes=[SPIKE], restarts=[20_000], ranks=4, split_every=1000)
    write_run(folder / "other", 3000, seed=2, options={"optim.lr": "0.002"})
    return folder


def seen(runs: Path, *names: str) -> list[Seen]:
    return read_runs(names, runs)


FIGURES: dict[str, Callable[[Path], Iterator[Figure]]] = {
    "loss": lambda runs: draw_loss(seen(runs, "long")),
    "two": lambda runs: draw_loss(seen(runs, "long", "other"), "seconds", smooth=100, log=True),
    "flops": lambda runs: draw_loss(seen(runs, "other"), "flops"),
    "details": lambda runs: draw_details(*seen(runs, "long")),
    "card": lambda runs: draw_card(seen(runs, "long")[0], cost(RunFolder(runs / "long"), prices(None))),
}


def draw(name: str, runs: Path, file: Path) -> Path:
    for figure in FIGURES[name](runs):
        save(figure, file)
    return file


def words_of(svg: Path) -> list[str]:
    """Return the texts of an SVG, which an independent parser reads."""
    return ["".join(each.itertext()).strip() for each in ElementTree.parse(svg).iter() if each.tag.endswith("}text")]


def some_in_ci(names: Iterable[str], fast: Sequence[str]) -> list[Any]:
    """Return the parameters of a test, all but `fast` for CI alone."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.ci) for name in names]


@pytest.mark.parametrize("name", some_in_ci(FIGURES, ["two", "details"]))
def test_words_do_not_overlap_and_every_axis_has_a_name_with_its_unit(name: str, runs: Path) -> None:
    for figure in FIGURES[name](runs):
        assert list(overlaps(figure)) == []
        shown = [axes for axes in figure.axes if axes.axison]
        assert shown
        for axes in shown:
            assert axes.get_xlabel()
            assert axes.get_ylabel() or not len(axes.get_yticks())
            unit = r"\(.+\)|step|tokens trained on"
            assert all(re.search(unit, label) for label in (axes.get_xlabel(), axes.get_ylabel()) if label)


def test_a_spike_of_one_step_is_in_the_picture(runs: Path, tmp_path: Path) -> None:
    """One step of 50,000: the band's color reaches a row far above the rest of the curve, in the spike's column."""
    picture = pixels(draw("loss", runs, tmp_path / "loss.png"))
    for figure in draw_loss(seen(runs, "long")):
        FigureCanvasAgg(figure).draw()
        axes = figure.axes[0]
        scale = scale_of("tokens", LONG * 2048.0)
        x, top = axes.transData.transform((SPIKE * 2048 / scale.unit, 3.0 + 7 * SPIKE**-0.5 + 5.0))
        _, usual = axes.transData.transform((0.0, 3.3))
    column = slice(int(x) - 2, int(x) + 3)
    height = picture.shape[0]
    rows = rows_of(picture[:, column], COLORS[0])
    above = rows[rows < height - usual - 10]
    assert above.min() == pytest.approx(height - top, abs=4)
    assert len(above) > 0.9 * (top - usual - 10)  # an unbroken line up to it


def test_the_svg_has_every_series_and_the_spike(runs: Path, tmp_path: Path) -> None:
    tree = ElementTree.parse(draw("two", runs, tmp_path / "two.svg"))
    ids = {each.get("id") for each in tree.iter()}
    assert {"loss-0", "loss-1", "band-0", "band-1", "held-out-0", "held-out-1", "restart-0"} <= ids
    words = words_of(tmp_path / "two.svg")
    assert "loss (nats per token)" in words
    assert any("optim.lr 0.002" in each for each in words)
    assert "restart" in words


@pytest.mark.parametrize(("name", "suffix"), [("card", ".svg"), pytest.param("details", ".png", marks=pytest.mark.ci)])
def test_two_draws_give_the_same_bytes(name: str, suffix: str, runs: Path, tmp_path: Path) -> None:
    a, b = (draw(name, runs, tmp_path / f"{each}{suffix}").read_bytes() for each in "ab")
    assert a == b
    assert b"<dc:date>" not in a


def test_numbers_of_the_card_are_those_of_the_log(runs: Path, tmp_path: Path) -> None:
    folder = RunFolder(runs / "other")
    last = [line for line in folder.metrics_file.read_text().splitlines() if "val_loss" in line][-1]
    bits = float(re.findall(r'"val_bits_per_byte":([\d.]+)', last)[0])
    for figure in draw_card(seen(runs, "other")[0], cost(folder, prices(None))):
        words = [each for each, _ in texts(figure)]
        assert figure.get_size_inches().tolist() == [12.0, 6.3]
    assert f"{bits:.3f} bits per byte" in words
    assert "6.14 million tokens in 3,000 steps" in words
    assert any(each.startswith("your own machines: 0") for each in words)


def test_the_bar_of_goodput_is_the_account(runs: Path) -> None:
    found = account(runs / "long" / "time.jsonl")
    for figure in draw_details(*seen(runs, "long")):
        [axes] = [each for each in figure.axes if each.get_title(loc="left").startswith("goodput")]
        bars = {bar.get_gid(): bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)}
    for category in CATEGORY_COLORS:
        assert bars.get(f"goodput-{category}", 0) == pytest.approx(100 * found.spent[category] / found.total)


def test_the_running_mean_is_that_of_numpy(runs: Path) -> None:
    [run] = seen(runs, "other")
    window = run.curves.window("loss", columns=1 << 20)
    assert len(window) == 3000
    expected = np.convolve(window.mean, np.ones(50) / 50, "valid")
    assert running_mean(window, 50)[49:] == pytest.approx(expected)
    assert running_mean(window, 1) == pytest.approx(window.mean)


def test_a_loss_that_is_not_a_number_is_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "nan", 50, seed=1)
    lines = run.metrics_file.read_text().splitlines()
    lines[20] = re.sub(r'"loss":[\d.]+', '"loss":NaN', lines[20])
    run.metrics_file.write_text("\n".join(lines) + "\n")
    for figure in draw_loss(seen(tmp_path, "nan")):
        [mark] = [line for line in figure.axes[0].get_lines() if line.get_gid() == "NaN or Inf-0"]
        assert np.size(mark.get_xdata()) == 1


@pytest.mark.ci
def test_a_run_with_one_step_and_few_records_can_be_drawn(tmp_path: Path) -> None:
    """The first minutes of a run: one step, no evaluation, no time, no ranks."""
    run = write_run(tmp_path / "young", 1, seed=1)
    run.time_file.unlink()
    first = run.metrics_file.read_text().splitlines()[0]
    run.metrics_file.write_text(first + "\n")
    run.events_file.unlink()
    for figures in (
        draw_loss(seen(tmp_path, "young")),
        draw_details(*seen(tmp_path, "young")),
        draw_card(seen(tmp_path, "young")[0], None),
    ):
        for number, figure in enumerate(figures):
            save(figure, tmp_path / f"{number}.png")


def test_what_cannot_be_drawn_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "empty", 5, seed=1)
    run.metrics_file.write_text("")
    with pytest.raises(RunError, match="no step yet"):
        Seen.read(run)
    with pytest.raises(ShoalError, match=r"\.png or \.svg, not \.jpg"):
        save(Figure(), tmp_path / "a.jpg")


def test_the_command_needs_no_run_for_an_architecture(tmp_path: Path) -> None:
    assert (
        Place(tmp_path).good("plot", "architecture", "quickstart", "--parallel.tp", "2").strip() == "architecture.png"
    )
    assert pixels(tmp_path / "architecture.png").min() < 0.5


@pytest.mark.ci
def test_the_command_takes_a_file_and_says_what_it_cannot_draw(runs: Path, tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert place.good("plot", "loss", str(runs / "other"), "--x", "step", "--out", "a.svg").strip() == "a.svg"
    assert "step" in words_of(tmp_path / "a.svg")
    assert "shoal plot card draws one run" in place.refused("plot", "card", "a", "b")
    assert "takes no options of a recipe" in place.refused("plot", "card", str(runs / "other"), "--optim.lr", "1")


@pytest.mark.ci
def test_without_matplotlib_the_extra_is_named(runs: Path) -> None:
    code = f"""
import sys
sys.modules["matplotlib"] = None
from shoal.cli import main
main(["plot", "loss", {str(runs / "other")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'shoal[plots]'" in done.stderr
