"""Sends a whole run to a new run of a tracker. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from shoal.config.options import Config
from shoal.config.tracker_names import TRACKERS
from shoal.errors import RunError, ShoalError
from shoal.run.folder import RunFolder
from shoal.system.secrets import redacted
from shoal.trackers.feeding import Feed

SECONDS_BETWEEN: Final = 5.0  # lines of progress


def replay(folder: RunFolder, name: str, config: Config, say: Callable[[str], None]) -> tuple[int, str]:
    """
    Send everything; return the number of records and where they are. A run that is resumed continues there.

    Raises `RunError` if the tracker does not take them.
    """
    feed = Feed.from_the_start(folder, name, config)
    try:
        where = redacted(feed.open().where)
        say(where)
        told = time.monotonic()
        while feed.turn():
            if time.monotonic() - told > SECONDS_BETWEEN:
                told = time.monotonic()
                say(f"{feed.sent:,} lines ...")
        feed.close()
    except ShoalError:
        raise
    except Exception as error:  # of the tracker's library: anything
        text = redacted(" ".join(str(error).split())[:300])
        raise RunError(f"{TRACKERS[name].title} did not take the run: {type(error).__name__}: {text}") from None
    if feed.complaint:
        say(redacted(feed.complaint))
    return feed.sent, where
