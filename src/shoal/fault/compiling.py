"""Reports compilations to the heartbeat, since they get the time limit of work outside steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shoal.elastic.heartbeat import Heartbeat
from shoal.system.torch_private import require


@contextlib.contextmanager
def told_of_compilations(heartbeat: Heartbeat, *, compiles: bool) -> Iterator[None]:
    """
    Have torch's compiler tell `heartbeat` when a compilation begins and ends, at any step inside the block.

    compiles: whether the run compiles its model. False does nothing, and does not import the compiler.
    """
    if not compiles:
        yield
        return
    require("compile")
    from torch._dynamo.callback import CallbackArgs, callback_handler

    def begins(_: CallbackArgs) -> None:
        heartbeat.compiles(begins=True)

    def ends(_: CallbackArgs) -> None:
        heartbeat.compiles(begins=False)

    callback_handler.register_start_callback(begins)
    callback_handler.register_end_callback(ends)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begins)
        callback_handler.remove_end_callback(ends)
