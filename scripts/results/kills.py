"""A run that loses a process every few minutes, to its last step."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import psutil

Victim = Literal["worker", "launcher"]
VICTIMS: Final[tuple[Victim, ...]] = ("worker", "worker", "launcher")  # in turn


def train_through_kills(arguments: Sequence[str], run: Path, *, minutes: float, log: Path) -> None:
    """
    Run `shoal train ARGUMENTS` until it ends, and kill a process of it (SIGKILL) whenever `minutes` have passed.

    Two of three kills take a random worker, which the launcher replaces. The third takes the launcher, whose workers then end
    themselves; the same command, started again, resumes the run. Each kill is a line of `kills.jsonl` in the run's folder.
    """
    draw, kills = random.Random(0), 0
    while True:
        with log.open("ab") as out:
            process = subprocess.Popen([sys.executable, "-m", "shoal", "train", *arguments], stdout=out, stderr=out)
        while True:
            try:
                code = process.wait(timeout=60 * minutes)
                break
            except subprocess.TimeoutExpired:
                victim = VICTIMS[kills % len(VICTIMS)]
                kills += _kill(victim, process, draw, run)
        if code == 0:
            return
        if code != -signal.SIGKILL:
            raise SystemExit(f"the run ended with exit code {code}: see {log}")


def _kill(victim: Victim, launcher: subprocess.Popen[bytes], draw: random.Random, run: Path) -> bool:
    """Kill a process and write it down; False if the run ended meanwhile."""
    workers = psutil.Process(launcher.pid).children() if launcher.poll() is None else []
    if not workers:
        return False
    killed = launcher.pid if victim == "launcher" else draw.choice(workers).pid
    os.kill(killed, signal.SIGKILL)
    with (run / "kills.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps({"time": time.time(), "killed": victim}) + "\n")
    if victim == "launcher":
        psutil.wait_procs(workers)
    return True
