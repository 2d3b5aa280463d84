"""A worker of a benchmark that fails: `python -m tests.bench.failing_worker ANSWER HOW`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from shoal.bench.worker_process import answering
from shoal.errors import DataError

if __name__ == "__main__":
    with answering(Path(sys.argv[1])):
        match sys.argv[2]:
            case "problem":
                raise DataError("the corpus is empty; set data.paths")
            case "memory":
                raise MemoryError
            case "bug":
                raise ValueError("a bug")
            case _:
                time.sleep(60)
