"""
The measured rates of a machine: made by `shoal plan --calibrate`, kept in a file of the user, read by `shoal plan`. No torch.

A file is named after its device, so that a home directory that several kinds of nodes share has one for each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.errors import ShoalError
from shoal.plan.machine import Machine
from shoal.plan.rehearse.work import Kind
from shoal.plan.speed.rates import WIDTHS, Curve, Rates
from shoal.system.cpu import model_name
from shoal.system.disk import write_whole

VERSION: Final = 4  # of the file


@dataclass(frozen=True)
class Setting:
    """
    What was measured while this many processes of a node, each with this many threads, worked at the same time.

    waits and stretch: see `Rates`.
    """

    processes: int
    threads: int
    dtype: str
    curves: Mapping[Kind, Curve]
    links: Mapping[str, Curve]
    waits: Mapping[str, Curve]
    stretch: float


@dataclass(frozen=True)
class Calibration:
    """A machine's measured rates. device: the GPU's name, or the CPU's. time: seconds since 1970."""

    device: str
    cuda: bool
    cores: int
    torch: str
    time: float
    settings: Sequence[Setting]

    def rates(self, machine: Machine, dtype: str) -> Rates | None:
        """
        Return the rates for a plan on `machine`, of which `per_node` processes work at the same time; None if the dtype was not measured.

        More processes than were measured share the cores of those that were.
        """
        settings = sorted((s for s in self.settings if s.dtype == dtype), key=lambda s: s.processes)
        if not settings:
            return None
        fewer = [s for s in settings if s.processes <= machine.per_node] or settings[:1]
        setting = fewer[-1]
        sharing = 1.0 if self.cuda else max(1.0, machine.per_node / self.cores)
        stretch = 1.0 if self.cuda else sharing / max(1.0, setting.processes / self.cores)
        linked = setting if setting.links else next((s for s in settings if s.links), setting)
        return Rates(
            machine, WIDTHS[dtype], setting.curves, linked.links, linked.waits, stretch=setting.stretch * stretch,
            sharing=setting.stretch * sharing,
        )  # fmt: skip

    def joined(self, earlier: Calibration) -> Calibration:
        """Return this calibration with the settings of an earlier one that were not measured again."""
        if (earlier.device, earlier.cores, earlier.torch) != (self.device, self.cores, self.torch):
            return self
        again = {(each.processes, each.dtype) for each in self.settings}
        kept = [each for each in earlier.settings if (each.processes, each.dtype) not in again]
        return dataclasses.replace(self, settings=[*kept, *self.settings])

    def save(self, path: Path) -> None:
        """Write the file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, [json.dumps({"version": VERSION, **dataclasses.asdict(self)}).encode()])


def load(path: Path) -> Calibration:
    """Read a file. Raises `ShoalError` if it holds no calibration."""
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if read.pop("version") != VERSION:
            raise ShoalError(f"{path} was made by another version of shoal; run shoal plan --calibrate again")
        settings = [
            Setting(**{**each, **{name: curves_of(each[name]) for name in ("curves", "links", "waits")}})
            for each in read.pop("settings")
        ]
        return Calibration(**read, settings=settings)
    except FileNotFoundError:
        raise ShoalError(f"{path} does not exist; shoal plan --calibrate makes a calibration") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShoalError(f"{path} is not a calibration: {error}; shoal plan --calibrate makes one") from None


def curves_of(read: Mapping[str, Mapping[str, Any]]) -> dict[Any, Curve]:
    """Return the curves of a JSON object."""
    return {name: Curve(each["axes"], each["seconds"], each["powers"]) for name, each in read.items()}


def folder() -> Path:
    """Return the folder in which this user's calibrations and measured steps are kept."""
    above = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(above).expanduser() / "shoal" / "plan"


def kept_file(device: str) -> Path:
    """Return the file with the calibration of this device."""
    return folder() / f"calibration-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def device_of(machine: Machine) -> str:
    """Return the name by which a calibration of such devices is kept: the GPU's, or this machine's CPU's."""
    return (machine.card or machine.name) if machine.cuda else model_name()


def find(machine: Machine, path: Path | None) -> Calibration | None:
    """
    Return the calibration for a plan on `machine`: that of `path`, or the one that is kept, if any.

    Raises `ShoalError` if `path` holds none, or one of other devices.
    """
    device = device_of(machine)
    if path is None:
        kept = kept_file(device)
        return load(kept) if kept.is_file() else None
    found = load(path)
    if (found.cuda, found.device) != (machine.cuda, device):
        asked = machine.name if machine.cuda else f"this machine's {device}"
        raise ShoalError(
            f"{path} was measured on {found.device}, but the plan is for {asked}; calibrate there, or plan without it"
        )
    return found
