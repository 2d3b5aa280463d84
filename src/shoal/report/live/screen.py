"""The loop of `shoal top`: reads the runs' files again and again, and shows them until the user quits. No torch."""

from __future__ import annotations

import contextlib
import json
import select
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from shoal.report.live.lines import ENDED, Lines, summary
from shoal.report.live.sight import Gatherer
from shoal.report.live.table import table
from shoal.report.live.view import Sight, frame
from shoal.run.folder import RunFolder

QUIT: Final = ("q", "Q", "\x1b")


def watch(
    folders: Sequence[RunFolder],
    *,
    every_seconds: float | None,
    once: bool = False,
    quiet: bool = False,
    as_json: bool = False,
) -> None:
    """
    Show runs until the user quits, or without a terminal until all have ended.

    every_seconds: interval between looks; None: 1 on a terminal, 10 elsewhere. once: show them once. as_json: print the state
    of one run, or a list of states, once.
    """
    console = Console(highlight=False)
    ascii_only = not (console.encoding or "").lower().startswith("utf")
    gatherers = [Gatherer(folder, ascii_only=ascii_only) for folder in folders]
    try:
        if as_json:
            states = [each.look(whole=True).state.as_json() for each in gatherers]
            print(json.dumps(states[0] if len(states) == 1 else states, indent=2))
        elif once:
            _show_once(console, [each.look(whole=True) for each in gatherers], quiet)
        elif console.is_terminal and not quiet:
            _show(console, gatherers, every_seconds or 1.0)
        else:
            _print_lines(gatherers, every_seconds or 10.0, quiet)
    finally:
        for each in gatherers:
            each.close()


def _show_once(console: Console, sights: Sequence[Sight], quiet: bool) -> None:
    if not console.is_terminal or quiet:
        for sight in sights:
            print(summary(sight.state))
        return
    for line in _lines(sights, console.width, console.height - 1):
        console.print(line, no_wrap=True, crop=True)


def _lines(sights: Sequence[Sight], width: int, height: int) -> list[Text]:
    return frame(sights[0], width, height) if len(sights) == 1 else table(sights, width, height)


def _show(console: Console, gatherers: Sequence[Gatherer], every_seconds: float) -> None:
    """Draw over the whole terminal, and again at each interval or key, until a key quits."""
    with (
        _keys() as keys,
        Live(console=console, screen=True, auto_refresh=False) as live,
        contextlib.suppress(KeyboardInterrupt),
    ):
        while True:
            sights = [each.look() for each in gatherers]
            width, height = console.size
            live.update(Group(*_lines(sights, width, height)), refresh=True)
            if keys.wait(every_seconds) in QUIT:
                return


def _print_lines(gatherers: Sequence[Gatherer], every_seconds: float, quiet: bool) -> None:
    """Print lines until all runs have ended."""
    lines = [Lines(every_seconds, quiet=quiet) for _ in gatherers]
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            sights = [each.look(whole=True) for each in gatherers]
            for each, sight in zip(lines, sights, strict=True):
                for line in each.of(sight.state, sight.now):
                    print(line, flush=True)
            if all(sight.state.condition in ENDED for sight in sights):
                return
            time.sleep(min(1.0, every_seconds))


class _Keys:
    """The keys that are pressed; none if standard input is not a terminal."""

    def __init__(self, readable: bool) -> None:
        self._readable = readable

    def wait(self, seconds: float) -> str:
        """Wait for a key; return it, or "" after `seconds`."""
        if not self._readable:
            time.sleep(seconds)
            return ""
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return sys.stdin.read(1) if ready else ""


@contextlib.contextmanager
def _keys() -> Iterator[_Keys]:
    """Read single keys of the terminal without showing them."""
    if not sys.stdin.isatty():
        yield _Keys(readable=False)
        return
    import termios
    import tty

    before: list[Any] = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield _Keys(readable=True)
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
