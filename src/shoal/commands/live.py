"""`shoal top` and `shoal alert`: the live view of runs, and a test of their alerts."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.commands.flags import Override
from shoal.errors import RunError
from shoal.system.output import on_one_line

if TYPE_CHECKING:
    from shoal.run.folder import RunFolder


def top(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.report.live.screen import watch

    runs = Path(args.runs)
    folders = [_named(target, runs) for target in args.targets] or [_newest(runs)]
    watch(folders, every_seconds=args.every, once=args.once, quiet=args.quiet, as_json=args.json)
    return 0


def alert(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.commands.recipes import resolve_asked
    from shoal.trackers.alerts import send_test

    config = resolve_asked(args, overrides).config
    print(send_test(config))
    if not config.alerts.any_rule:
        print("this config has no rule yet; set one, such as alerts.no_step_for")
    return 0


def _named(target: str, runs: Path) -> RunFolder:
    """Return the folder of a run, perhaps one that has not begun. Raises `RunError` if there is none."""
    from shoal.report.live.state import is_run
    from shoal.run.folder import RunFolder

    for path in (Path(target), runs / target):
        if is_run(path):
            return RunFolder(path)
    others = sorted(path.name for path in runs.iterdir() if is_run(path)) if runs.is_dir() else []
    near = difflib.get_close_matches(target, others, n=3)
    known = f"; did you mean {' or '.join(map(on_one_line, near))}?" if near else ""
    if others and not near:
        known = f"; there are {', '.join(map(on_one_line, others[:8]))}"
    raise RunError(f"{on_one_line(target)} is not a run in {on_one_line(runs)}{known or '; name a folder with --runs'}")


def _newest(runs: Path) -> RunFolder:
    """Return the running run that wrote last, else any run that wrote last. Raises `RunError` if there is none."""
    from shoal.report.live.state import newest_first

    found = newest_first(runs)
    if not found:
        raise RunError(f"there is no run in {on_one_line(runs)}; name one, or their folder with --runs")
    return next((each for each in found if each.is_locked()), found[0])
