"""`shoal sync`: a run's records, sent to a tracker as a whole."""

from __future__ import annotations

import argparse
from pathlib import Path

from shoal.commands.flags import Override
from shoal.errors import RunError, ShoalError


def sync(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.config.tracker_names import TRACKERS, check_installed, unknown
    from shoal.run.folder import RunFolder

    if why := unknown(args.tracker):
        raise ShoalError(why)
    check_installed([args.tracker])
    folder = RunFolder.named(args.target, Path(args.runs))
    config = folder.load_config()
    if not folder.metrics_file.is_file():
        raise RunError(f"{folder.path} has no metrics.jsonl yet: there is nothing to send")
    given = {
        "project": args.project,
        "entity": args.entity,
        "workspace": args.workspace,
        "offline": args.offline or None,
    }
    config = config.replace("track", **{name: value for name, value in given.items() if value is not None})
    from shoal.trackers.replay import replay

    title = TRACKERS[args.tracker].title
    lines, where = replay(folder, args.tracker, config, say=lambda text: print(f"{title}: {text}", flush=True))
    print(f"{title} has all {lines:,} lines of {folder.path}: {where}")
    return 0
