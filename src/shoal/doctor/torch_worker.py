"""The doctor's measurements with torch: a matrix product on each device, and an all-reduce between two nodes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from shoal.doctor.facts import INTERFACE_VARIABLES
from shoal.doctor.torch_process import MARK
from shoal.system.network import listen

CPU_SIZE: Final = 512  # rows and columns of the product's matrices, float32: 3 ms on one core
GPU_SIZE: Final = 8192  # bfloat16: 2 ms on an H100
PAIR_TIMEOUT: Final = timedelta(seconds=10)  # of a collective, and of a node's wait for the other


class Worker:
    """Holds the store that the other node of a pair connects to."""

    def __init__(self) -> None:
        self._store: TCPStore | None = None
        self._chosen = {name for name in INTERFACE_VARIABLES if name in os.environ}  # by the user

    def do(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request."""
        match name:
            case "devices":
                return {"gpus": torch.cuda.device_count(), "built_for_cuda": torch.version.cuda or ""}
            case "product":
                return {"flops": products(**arguments["options"])}
            case "serve":
                return {"port": self._serve(**arguments)}
            case "pair":
                return {"seconds": self._pair(**arguments)}
            case _:
                raise ValueError(f"unknown request {name!r}")

    def _serve(self, address: str) -> int:
        """Serve a store on this node's `address` for one pair; return its port."""
        listener = listen(address, 0, option="the node's name", from_afar=True)
        host, port = listener.getsockname()[:2]
        self._store = TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=PAIR_TIMEOUT, master_listen_fd=listener.detach()
        )
        return int(port)

    def _pair(self, rank: int, address: str, port: int, interface: str | None, count: int, tries: int) -> float:
        """Return the shortest time in seconds of an all-reduce of `count` bytes with the other node. A collective of both."""
        for name in INTERFACE_VARIABLES:
            if interface and name not in self._chosen:
                os.environ[name] = interface
        on_gpu = torch.cuda.is_available()
        store = self._store if rank == 0 else TCPStore(address, port, is_master=False, timeout=PAIR_TIMEOUT)
        assert store is not None
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=2, timeout=PAIR_TIMEOUT
        )
        try:
            data = torch.zeros(count // 4, device="cuda" if on_gpu else "cpu")
            dist.all_reduce(data[:1])  # opens the connections
            return min(_timed(lambda: dist.all_reduce(data), str(data.device)) for _ in range(tries))
        finally:
            dist.destroy_process_group()


def products(seconds: float, tries: int) -> dict[str, float]:
    """
    Return FLOP/s of a matrix product by device: the best of `tries` means over `seconds` each.

    A mean over a while, because a cgroup that limits CPU time lets a process run at full speed for some milliseconds.
    """
    if not torch.cuda.is_available():
        return {"cpu": _product("cpu", CPU_SIZE, torch.float32, seconds, tries)}
    return {
        f"gpu {index}": _product(f"cuda:{index}", GPU_SIZE, torch.bfloat16, seconds, tries)
        for index in range(torch.cuda.device_count())
    }


def _product(device: str, size: int, dtype: torch.dtype, seconds: float, tries: int) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    _timed(lambda: a @ a, device)
    best = 0.0
    for _ in range(tries):
        spent, count = 0.0, 0
        while spent < seconds:
            spent += _timed(lambda: a @ a, device)
            count += 1
        best = max(best, 2 * size**3 * count / spent)
    return best


def _timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds that `work` takes on `device`."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    """Answer requests until the input ends."""
    worker = Worker()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = worker.do(asked["do"], asked["with"])
        except Exception as error:  # a failed pair is a result
            answer = {"problem": str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}
        print(MARK + json.dumps(answer), flush=True)
    os._exit(0)  # gloo's threads may outlive the interpreter, and abort the process


if __name__ == "__main__":
    main()
