"""The page in a real Chromium: what is drawn, read back as pixels; themes, keyboard, narrow screens, hostile text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from shoal.config.options import Config
from shoal.report.page.html import report_html
from tests.report.browser import open_browser, visit
from tests.report.made_runs import make_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.ci  # `make test` needs no browser
STEPS, SPIKE = 6000, 3456
HOSTILE = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report of a run with a spike, a slow rank, events, sources and hostile text."""
    folder = tmp_path_factory.mktemp("report")
    events = [
        {"event": "crashed", "step": 2000, "rank": 3, "why": HOSTILE},
        {"event": "started", "step": 1900},
        {"event": "went back", "step": 4500, "to": 4000},
    ]
    run = make_run(
        folder / "a&b <i>", STEPS, spikes={SPIKE: 9.0}, ranks=8, slow=(5, "backward"), sources=("web", "code"), events=events
    )  # fmt: skip
    run.samples.mkdir()
    (run.samples / "end.txt").write_text(HOSTILE)
    (run.path / "model.txt").write_text("Llama(\n  12 x Block\n)")
    path = folder / "report.html"
    path.write_bytes(report_html([run.path]))
    return path


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report of nine runs."""
    folder = tmp_path_factory.mktemp("overlay")
    config = Config().replace("train", steps=300)
    runs = [
        make_run(folder / f"lr-{i}", 300, seed=i, config=config.replace("optim", lr=1e-4 * (i + 1))) for i in range(9)
    ]
    path = folder / "report.html"
    path.write_bytes(report_html([run.path for run in runs]))
    return path


def test_a_spike_of_one_step_shows_at_every_zoom(browser: Browser, report: Path) -> None:
    with visit(browser, report) as found:
        width = float(STEPS)
        while width > 8:
            first = max(0.0, SPIKE - width * 0.37)
            found.zoom(first, first + width)
            assert found.rows_with_ink(0, SPIKE, 3.5, 8.5) > 0.97, f"{width} steps shown"
            if width > 100:
                assert found.rows_with_ink(0, SPIKE + width * 0.2, 3.5, 8.5) < 0.1, "the test sees the spike alone"
            width /= 4
        assert found.problems == []


def test_every_axis_shows_the_spike(browser: Browser, report: Path) -> None:
    with visit(browser, report) as found:
        for word, size in (("token", 8192), ("FLOP", 8192 * 7.5e8), ("training time", 0.256)):
            found.page.select_option(".controls select >> nth=0", word)
            found.page.evaluate("() => page.reload()")
            x = found.page.evaluate(HIGHEST)
            assert x == pytest.approx(SPIKE * size, rel=0.01), word
            assert found.rows_with_ink(0, x, 3.5, 8.5) > 0.97, word
        assert found.problems == []


# The place of the greatest loss but for those of the first steps
HIGHEST = """() => {
  const { x, window } = page.charts[0].drawn[0];
  return x[window.high.indexOf(Math.max(...window.high.slice(window.high.length / 4)))];
}"""


def test_smoothing_and_log_axes_keep_the_spike(browser: Browser, report: Path) -> None:
    with visit(browser, report) as found:
        found.page.select_option(".controls select >> nth=1", "strong (3%)")
        assert found.rows_with_ink(0, SPIKE, 3.5, 8.5) > 0.97
        found.page.check("text=log vertical")
        found.page.check("text=log horizontal")
        assert found.rows_with_ink(0, SPIKE, 3.5, 8.5) > 0.97
        found.page.check("text=fit the curve")
        low, high = found.page.evaluate("() => page.charts[0].limits[1]")
        assert high < 9.0, "the spike is beyond the fitted range"
        top = low * (high / low) ** 0.985
        assert found.rows_with_ink(0, SPIKE, top, high) > 0.5, "a triangle marks it"
        assert found.problems == []


def test_nothing_is_asked_of_the_network_and_hostile_text_stays_text(browser: Browser, report: Path) -> None:
    with visit(browser, report) as found:
        found.page.wait_for_selector("#samples pre")
        assert found.page.inner_text("#samples pre") == HOSTILE
        assert HOSTILE in found.page.inner_text("#events")
        assert found.page.query_selector_all("img, iframe, object") == []
        assert found.page.inner_text("h1") == "shoal a&b <i>"
        assert [each for each in found.asked if not each.startswith(("file:", "data:"))] == []
        assert found.problems == []


@pytest.mark.parametrize(
    ("which", "theme", "width"),
    [("report", "light", 1400), ("report", "dark", 900), ("report", "light", 360), ("overlay", "dark", 1400), ("overlay", "dark", 360)],
)  # fmt: skip
def test_themes_and_widths(
    browser: Browser, request: pytest.FixtureRequest, which: str, theme: Literal["light", "dark"], width: int
) -> None:
    path = request.getfixturevalue(which)
    with visit(browser, path, viewport={"width": width, "height": 800}, color_scheme=theme) as found:
        found.page.evaluate("() => page.reload()")
        shown, window = found.page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
        assert shown <= window, "the page scrolls sideways"
        paper = found.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[theme]
        assert found.page.evaluate(LABELS_THAT_OVERLAP) == []
        assert found.page.evaluate(AXES_WITHOUT_NAME) == []
        assert found.problems == []


# Labels of the canvas are drawn by uPlot: their places follow from the axis' values.
LABELS_THAT_OVERLAP = """() => page.charts.filter((chart) => chart.uplot).flatMap((chart) => {
  const u = chart.uplot, ctx = u.ctx;
  ctx.font = u.axes[0].font[0] ?? ctx.font;
  const places = u.axes[0]._splits.map((value, i) => [u.valToPos(value, "x", true), ctx.measureText(u.axes[0]._values[i]).width]);
  return places.flatMap(([x, width], i) => {
    const before = places[i - 1];
    const isOver = before && x - width / 2 < before[0] + before[1] / 2 + 2;
    const isCut = x + width / 2 > ctx.canvas.width;
    return isOver || isCut ? [`${chart.spec.title}: ${u.axes[0]._values[i]}`] : [];
  });
})"""
AXES_WITHOUT_NAME = """() => page.charts.filter((chart) => chart.uplot && chart.uplot.axes.some((axis) => !axis.label))
  .map((chart) => chart.spec.title)"""


def test_the_keyboard_reaches_and_moves_everything(browser: Browser, report: Path) -> None:
    with visit(browser, report) as found:
        press, shown = found.page.keyboard.press, lambda: found.page.evaluate("() => page.charts[0].limits[0]")
        for _ in range(12):
            press("Tab")
            if found.page.evaluate("() => document.activeElement === page.charts[0].plot"):
                break
        else:
            pytest.fail("Tab does not reach the first chart")
        assert found.page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
        whole = shown()
        press("+")
        found.page.wait_for_function("(whole) => page.charts[0].limits[0][1] < whole[1]", arg=whole)
        zoomed = shown()
        press("Shift+ArrowRight")
        found.page.wait_for_function("(zoomed) => page.charts[0].limits[0][1] > zoomed[1]", arg=zoomed)
        press("0")
        found.page.wait_for_function("(whole) => page.charts[0].limits[0][1] === whole[1]", arg=whole)
        press("ArrowLeft")
        assert "step " in found.page.inner_text(".values >> nth=0")
        found.page.focus("canvas.heat")
        press("ArrowDown")
        assert "rank 1:" in found.page.inner_text(".said")
        assert found.problems == []


def test_the_theme_button_repaints_the_curves(browser: Browser, report: Path) -> None:
    with visit(browser, report, color_scheme="light") as found:
        found.page.click("text=Dark")
        assert found.page.evaluate("() => document.documentElement.dataset.theme") == "dark"
        assert found.rows_with_ink(0, SPIKE, 3.5, 8.5) > 0.97
        assert found.page.inner_text("header button") == "☀ Light"


def test_an_event_shows_its_step_in_the_charts(browser: Browser, report: Path) -> None:
    with visit(browser, report) as found:
        found.page.click("#events >> text=step 4,500")
        found.page.wait_for_function("() => page.range && page.range[0] < 4500 && page.range[1] > 4500")
        found.page.click("text=Reset zoom >> nth=0")
        found.page.wait_for_function("() => page.range === null")
        assert found.problems == []


def test_hidden_runs_are_not_drawn(browser: Browser, overlay: Path) -> None:
    with visit(browser, overlay) as found:
        drawn = "() => page.charts[0].drawn.map((curve) => curve.run.name)"
        assert found.page.evaluate(drawn) == [f"lr-{i}" for i in range(9)]
        found.page.uncheck("nav >> text=lr-3")
        found.page.wait_for_function(f"() => !({drawn})().includes('lr-3')")
        found.page.fill("nav input[type=search]", "lr-7")
        assert found.page.locator("nav li").count() == 1
        assert "optim.lr" in found.page.inner_text("main")
        assert found.problems == []
