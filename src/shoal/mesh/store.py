"""The store through which the processes of a run find each other."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from shoal.errors import LaunchError
from shoal.mesh.place import Place, is_launched
from shoal.system.network import is_loopback, listen


def open_store(place: Place, timeout: timedelta) -> Store:
    """
    The store at MASTER_ADDR and MASTER_PORT, where rank 0 listens on that address alone; all processes wait for each other.

    What torch makes of `env://` is the same store, but it listens on every interface of the machine. Under torchrun the
    launcher has one already. Raises `LaunchError`.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if place.rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return TCPStore(host, port, place.world_size, is_master=False, timeout=timeout)
    try:
        afar = place.world_size > place.local_world_size
        listener = listen(host, port, option="MASTER_ADDR and MASTER_PORT", from_afar=afar)
    except LaunchError as error:
        if is_launched():  # our launcher chose them: another try has another port
            raise RuntimeError(str(error)) from error
        raise
    descriptor = listener.detach()  # the store closes it
    return TCPStore(host, port, place.world_size, is_master=True, timeout=timeout, master_listen_fd=descriptor)


def stay_on_loopback() -> None:
    """Where the processes of a run meet on loopback, what else they open listens there too, unless a person chose."""
    if is_loopback(os.environ["MASTER_ADDR"]):
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        for library in ("GLOO", "NCCL"):  # each takes the first interface of a network else
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
