"""Real processes that fail, as ranks of a run whose output shoal's launcher copies to logs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from shoal.elastic.crashes import how_it_died
from shoal.elastic.pump import Pump
from shoal.run.folder import RunFolder
from shoal.run.log_lines import ERR, OUT

ATTEMPT = "20261129T101500Z"
# Waits until rank 1 is gone, as a collective does, and then reports the loss as gloo does.
FOLLOWER = """
import os, sys
os.read(int(sys.argv[1]), 1)
raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:3021")
"""


def run_ranks(
    folder: RunFolder, programs: Sequence[str], name: str = ATTEMPT, environment: Mapping[str, str] | None = None
) -> list[int]:
    """
    Run Python programs as ranks 0, 1, ... of an attempt, and write their logs; return their exit codes.

    A program gets a descriptor that is at its end when the last rank has ended.
    """
    logs, pipes = folder.logs / name, folder.path / f"pipes-{name}"
    pipes.mkdir(parents=True)
    logs.mkdir(parents=True)
    pump = Pump(logs, pipes, {rank: rank for rank in range(len(programs))}, lambda line, stream: None)
    reading, writing = os.pipe()
    started = []
    for rank, program in enumerate(programs):
        last = rank == len(programs) - 1
        command = [sys.executable, "-c", program, str(writing if last else reading)]
        with open(pump.path(rank, OUT), "w") as out, open(pump.path(rank, ERR), "w") as err:
            started.append(
                subprocess.Popen(
                    command, stdout=out, stderr=err, env=environment, pass_fds=[writing if last else reading]
                )
            )
    os.close(writing)
    pump.start({rank: process.pid for rank, process in enumerate(started)}, len(programs))
    codes = {}
    for rank in reversed(range(len(programs))):  # the last one fails first
        codes[rank] = started[rank].wait(timeout=120)
        pump.settle()
        pump.ended(rank, how_it_died(codes[rank]))
    os.close(reading)
    return [codes[rank] for rank in range(len(programs))]
