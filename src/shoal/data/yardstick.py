"""
Compress the held-out text of prepared data with gzip and xz, cold and primed with training text (`compression.py`).

This takes from seconds to a minute. So a separate process does it once for each folder of prepared data, and saves the result
beside the tokens:

    python -m shoal.data.yardstick FOLDER [--idle]

During training it uses only idle CPU time. No torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from shoal.data.compression import sizes
from shoal.data.decode import held_out_text, sample_of
from shoal.data.prepare import Prepared, open_prepared
from shoal.data.stored.manifest import YARDSTICK
from shoal.errors import DataError
from shoal.system.disk import gigabytes, write_whole
from shoal.system.signals import die_with_parent

TRAINING_BYTES = 32_000_000  # maximum training text to prime with: xz reads one or two megabytes a second
HELD_OUT_BYTES = 16_000_000  # maximum held-out text to compress
POLL_SECONDS = 0.1
PATIENCE_SECONDS = 1.0  # seconds after which `Measuring.wait` calls `waits`
FLAGS = {"xz": "xz -9e", "gzip": "gzip -9"}


@dataclass(frozen=True)
class Yardstick:
    """Bits per byte by compressor ("xz", "gzip") and kind ("cold", "primed"), and the sizes of the texts."""

    data_id: str
    training_bytes: int
    held_out_bytes: int
    bits_per_byte: dict[str, dict[str, float]]

    def compared(self, ours: float, text_bytes: int) -> str:
        """
        Return a text that ranks a model among the primed compressors, best first.

        ours: the model's bits per byte. text_bytes: size of the whole held-out text.
        """
        said = {"this model": (ours, "")}
        for name, bits in self.bits_per_byte.items():
            said[FLAGS[name]] = (bits["primed"], f" (cold {bits['cold']:.3f})")
        ranked = ", ".join(
            f"{name} {bits:.3f}{cold}" for name, (bits, cold) in sorted(said.items(), key=lambda s: s[1])
        )
        part = f"; gzip and xz on {gigabytes(self.held_out_bytes)} of it" if self.held_out_bytes < text_bytes else ""
        return (
            f"held-out text ({text_bytes:,} bytes{part}), bits per byte: {ranked}\n"
            f"xz and gzip first read {gigabytes(self.training_bytes)} of the training text, as the model did; cold means without it"
        )


def measure(prepared: Prepared) -> Yardstick:
    """
    Compress the texts, and save the result in the data's folder if it is writable.

    Raises DataError if the tokens were altered or do not decode to the exact text.
    """
    text, training = held_out_text(prepared, HELD_OUT_BYTES), sample_of(prepared, "train", TRAINING_BYTES)
    found = Yardstick(prepared.data_id, len(training), len(text), sizes(training, text))
    with contextlib.suppress(OSError):
        write_whole(prepared.folder / YARDSTICK, [json.dumps(asdict(found)).encode()])
    return found


def load(prepared: Prepared) -> Yardstick | None:
    """Return an earlier measurement of these tokens, or None."""
    try:
        return _parse((prepared.folder / YARDSTICK).read_bytes(), prepared)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _parse(content: bytes, prepared: Prepared) -> Yardstick | None:
    found = Yardstick(**json.loads(content))
    bits = {name: {kind: float(found.bits_per_byte[name][kind]) for kind in ("cold", "primed")} for name in FLAGS}
    return (
        Yardstick(prepared.data_id, int(found.training_bytes), int(found.held_out_bytes), bits)
        if (found.data_id == prepared.data_id)
        else None
    )


class Measuring:
    """A measurement in a separate process, unless there is an earlier result. `close` stops it if it still runs."""

    def __init__(self, prepared: Prepared | None, *, idle: bool) -> None:
        """Start measuring. prepared: None for a blend, whose sources are not compared. idle: use only idle CPU time."""
        self._prepared = prepared
        self._found = load(prepared) if prepared else None
        self._process: subprocess.Popen[bytes] | None = None
        if prepared is not None and self._found is None:
            command = [sys.executable, "-m", "shoal.data.yardstick", str(prepared.folder.absolute())]
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    [*command, "--idle"] if idle else command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )  # fmt: skip

    def wait(
        self, seconds: float, go_on: Callable[[], bool] = lambda: True, waits: Callable[[], None] = lambda: None
    ) -> Yardstick | str:
        """
        Return the result, or why there is none.

        seconds: the maximum wait. go_on: a function called ten times a second; the wait ends if it returns False. waits: a
        function called once, if the wait exceeds a second.
        """
        if self._prepared is None:
            return "the data is a blend"
        began, told = time.monotonic(), False
        while self._process is not None and self._found is None:
            try:
                out, _ = self._process.communicate(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if not told and time.monotonic() - began > PATIENCE_SECONDS:
                    waits()
                    told = True
                if not go_on():
                    return "stopped"
                if time.monotonic() - began > seconds:
                    return f"not done within {seconds:.0f} s"
                continue
            code, self._process = self._process.returncode, None
            if code == 2:
                return out.decode("utf-8", "replace").strip()
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self._found = _parse(out, self._prepared)
        return self._found or "the compression process ended without a result"

    def close(self) -> None:
        """Stop the process. May be called twice."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _yield_to_others() -> None:
    """Run only on idle CPUs, and be the first process killed if memory runs out."""
    os.nice(19)
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(arguments: list[str]) -> int:
    """Run the process of `Measuring`: print the result as JSON and return 0, or print why there is none and return 2."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    die_with_parent()
    if "--idle" in arguments:
        _yield_to_others()
    try:
        print(json.dumps(asdict(measure(open_prepared(Path(arguments[0]))))))
    except DataError as error:
        print(error)
        return 2
    except MemoryError:
        print("not enough memory")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
