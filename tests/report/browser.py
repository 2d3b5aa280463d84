"""A real browser for tests and benches of the page: headless Chromium, without network services of its own."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
OWN = "willReadFrequently"  # Chromium's advice to those who read pixels back, which only the tests do
NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """Start the system's Chromium. Raises FileNotFoundError if there is none: scripts/install_browser.sh installs it."""
    from playwright.sync_api import sync_playwright

    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        raise FileNotFoundError("no Chromium was found; bash scripts/install_browser.sh installs it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


@dataclass
class Visit:
    """An open page: `asked` are the addresses it loaded, `problems` what it wrote to the console."""

    page: Page
    asked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def zoom(self, first: float, last: float) -> None:
        """Show a range of the horizontal axis, and wait until it is drawn."""
        self.page.evaluate("([a, b]) => page.zoom([a, b])", [first, last])

    def rows_with_ink(self, chart: int, x: float, low: float, high: float) -> float:
        """Return the share of pixel rows between two values that have something other than the background near `x`."""
        return float(self.page.evaluate(ROWS_WITH_INK, [chart, x, low, high]))


# The grid differs from the background by less than 60 in the sum of the three colors; every curve by more.
ROWS_WITH_INK = """([number, x, low, high]) => {
  const chart = page.charts[number], u = chart.uplot, canvas = u.ctx.canvas;
  const xs = chart.drawn[0].x, at = placeOf(xs, x);  // a spike between two drawn points reaches to both
  const between = Math.abs(u.valToPos(xs[Math.min(at + 1, xs.length - 1)], "x", true) - u.valToPos(xs[Math.max(at - 1, 0)], "x", true));
  const reach = Math.ceil(Math.min(canvas.width / 4, Math.max(3, between)));
  const left = Math.max(0, Math.round(u.valToPos(x, "x", true)) - reach);
  const [top, bottom] = [high, low].map((value) => Math.round(u.valToPos(value, "y", true)));
  const width = 2 * reach + 1, height = Math.max(1, bottom - top);
  const data = u.ctx.getImageData(left, top, width, height).data;
  const paper = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
  let inked = 0;
  for (let row = 0; row < height; row++) {
    let far = 0;
    for (let column = 0; column < width; column++) {
      const at = 4 * (row * width + column), share = data[at + 3] / 255;
      far = Math.max(far, share * [0, 1, 2].reduce((sum, c) => sum + Math.abs(data[at + c] - paper[c]), 0));
    }
    if (far > 60) inked++;
  }
  return inked / height;
}"""


@contextlib.contextmanager
def visit(browser: Browser, address: Path | str, **context: Any) -> Iterator[Visit]:
    """Open a file or an address and wait until its charts are drawn."""
    opened = browser.new_context(**({"viewport": {"width": 1200, "height": 800}} | context))
    found = Visit(opened.new_page())
    found.page.on("request", lambda request: found.asked.append(request.url))
    found.page.on("console", lambda message: found.problems.extend([message.text] * (OWN not in message.text)))
    found.page.on("pageerror", lambda error: found.problems.append(str(error)))
    found.page.on("dialog", lambda dialog: found.problems.append(f"dialog: {dialog.message}"))
    found.page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
    found.page.evaluate("() => started")
    found.page.wait_for_function("() => page.charts[0].uplot")
    yield found
    opened.close()
