"""The key-value store through which the ranks of a run find each other."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from shoal.errors import LaunchError
from shoal.mesh.place import Place, is_launched
from shoal.system.network import is_loopback, listen


def open_store(place: Place, timeout: timedelta) -> Store:
    """
    Open the store at MASTER_ADDR:MASTER_PORT. Does not wait for the other ranks.

    Raises `LaunchError` if rank 0 cannot listen there; RuntimeError instead if shoal's own launcher chose the port.

    Rank 0 listens on that address only; torch's own `env://` would listen on every interface of the node. Under
    torchrun the launcher already serves the store, which outlasts a restart: each attempt has names of its own there.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if place.rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = TCPStore(host, port, place.world_size, is_master=False, timeout=timeout, wait_for_workers=False)
        return store if is_launched() else PrefixStore(_attempt(place), store)
    try:
        afar = place.world_size > place.local_world_size
        listener = listen(host, port, option="MASTER_ADDR and MASTER_PORT", from_afar=afar)
    except LaunchError as error:
        if is_launched():  # our launcher chose the port: a restart chooses another
            raise RuntimeError(str(error)) from error
        raise
    descriptor = listener.detach()  # the store closes it
    store = TCPStore(
        host,
        port,
        place.world_size,
        is_master=True,
        timeout=timeout,
        master_listen_fd=descriptor,
        wait_for_workers=False,
    )
    return store if is_launched() else PrefixStore(_attempt(place), store)


def _attempt(place: Place) -> str:
    """Return a prefix for the keys of this attempt: torchrun counts restarts, and starts again without a count for another size."""
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    return "world" if restart is None else f"world-{restart}-{place.world_size}"


def stay_on_loopback() -> None:
    """Keep gloo and NCCL on loopback if the store is on loopback, unless the user chose an interface."""
    if is_loopback(os.environ["MASTER_ADDR"]):
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        for library in ("GLOO", "NCCL"):  # by default each takes the first network interface
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
