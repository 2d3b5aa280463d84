"""`shoal goodput` and `shoal ledger`: reports from a run's own records."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from shoal.commands.flags import Override
from shoal.errors import RunError


def goodput(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.run.goodput import account, table

    found = account(_record(args, "time.jsonl"))
    print(json.dumps(found.as_json(), indent=2) if args.json else "\n".join(table(found)))
    return 0


def ledger(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.data.order.audit import audit, describe

    found = audit(_record(args, "ledger.jsonl"))
    print(json.dumps(found.as_json(), indent=2) if args.json else "\n".join(describe(found)))
    return 0 if found.passed else 1


def _record(args: argparse.Namespace, name: str) -> Path:
    """Return the file `name` of the given run. Raises `RunError` if there is no such run or file."""
    from shoal.run.folder import RunFolder

    folder = RunFolder.named(args.target, Path(args.runs))
    folder.load_config()
    if not (folder.path / name).is_file():
        raise RunError(f"{folder.path} has no {name}: an older shoal trained it; steps taken from now on are recorded")
    return folder.path / name
