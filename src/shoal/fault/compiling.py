"""Compilations are local work: while one runs, its worker is not late."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shoal.elastic.heartbeat import Heartbeat
from shoal.system.torch_private import require


@contextlib.contextmanager
def told_of_compilations(heartbeat: Heartbeat, *, compiles: bool) -> Iterator[None]:
    """
    Inside, torch's compiler tells `heartbeat` when it begins and ends, at whatever step it comes to that.

    compiles: whether the run compiles at all; else torch's compiler is not even imported.
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
