"""`shoal env` and `shoal rendezvous`, which are about a machine rather than a run."""

from __future__ import annotations

import argparse
import os

from shoal.commands.flags import Override
from shoal.errors import LaunchError


def rendezvous(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.system.network import read_address

    if args.while_used and os.fork():
        os._exit(0)  # detach: the launcher's end, or a signal that it forwards, then does not affect the server
    from shoal.elastic.rendezvous import serve

    address = read_address(args.address)
    if address is None:
        raise LaunchError(f"{args.address!r} is not HOST:PORT, such as node0:29400")
    serve(*address, while_used=args.while_used, ready=lambda: print(f"rendezvous ready at {args.address}", flush=True))
    return 0


def env(args: argparse.Namespace, overrides: list[Override], argv: list[str]) -> int:
    from shoal.bench.environment import describe

    print(describe())
    return 0
