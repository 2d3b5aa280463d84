"""`shoal dashboard`: the live page of all runs of a folder, on this machine."""

from __future__ import annotations

import argparse

from shoal.commands.flags import Override
from shoal.errors import ShoalError
from shoal.system.output import on_one_line


def dashboard(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    if not args.runs.is_dir():
        raise ShoalError(f"{on_one_line(args.runs)} is not a folder; give the folder that holds all runs")
    try:
        from shoal.report.page.server import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise ShoalError("the dashboard needs starlette and uvicorn: pip install 'shoal[dashboard]'") from None
    serve(args.runs, args.port, lambda line: print(line, flush=True))
    return 0
