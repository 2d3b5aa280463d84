"""
The doctor's process on a node. It reads requests from its standard input and writes answers, a line of JSON each. No torch.

It ends when its input ends, so that nothing stays behind on a node, whatever happens to the doctor.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any, Final

from shoal.doctor.facts import facts_of_this_node
from shoal.doctor.folder import Folder
from shoal.doctor.torch_process import TorchProcess
from shoal.doctor.wires import Listener, connect

MARK: Final = "shoal-doctor:"  # begins each answer; other lines are the node's own


class Probe:
    """What a probe holds between requests."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.folder: Folder | None = None
        self.torch: TorchProcess | None = None

    def do(self, name: str, arguments: dict[str, Any]) -> Any:
        """Return the answer to a request: a value for JSON."""
        match name:
            case "facts":
                return facts_of_this_node()
            case "time":
                return time.time()
            case "listen":
                self.listener = Listener(**arguments)
                return self.listener.opened
            case "connect":
                return connect(**arguments)
            case "folder":
                self.folder = Folder(**arguments)
                return self.folder.look()
            case "in folder":
                assert self.folder is not None
                return self.folder.do(**arguments)
            case "torch":
                self.torch = self.torch or TorchProcess()
                return self.torch.ask(**arguments)
            case _:
                raise ValueError(f"unknown request {name!r}: another version of shoal")

    def close(self) -> None:
        if self.torch is not None:
            self.torch.close()


def main() -> None:
    """Answer requests until the input ends."""
    probe = Probe()
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"answer": probe.do(asked["do"], asked["with"])}
        except Exception as error:  # a bug, or a node unlike all others: the doctor reports it with the node's name
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(MARK + json.dumps({"id": asked["id"], **answer}), flush=True)
    probe.close()
    os._exit(0)  # threads of the listener may still wait for a connection


if __name__ == "__main__":
    main()
