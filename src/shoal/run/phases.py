"""The phases of an optimizer step, and their observers. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol

PHASES: Final = ("data", "forward", "backward", "reduce", "optimizer")


class Observer(Protocol):
    """An object that is notified when a phase of a step begins and ends. A phase may occur several times in a step."""

    def enter(self, phase: str) -> None:
        """Note that `phase` begins."""

    def leave(self, phase: str) -> None:
        """Note that `phase` is over."""


class Phases:
    """`with phases("forward"): ...` tells the observers, in order when the phase begins and in reverse when it ends."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = tuple(observers)
        self._phases = {name: _Phase(name, self._observers) for name in PHASES}

    def __call__(self, name: str) -> _Phase:
        return self._phases[name]

    def also(self, *observers: Observer) -> Phases:
        """Return phases that tell these observers too, after all others."""
        return Phases([*self._observers, *observers])

    def without(self, *observers: Observer) -> Phases:
        """Return phases that tell all but these observers."""
        return Phases([each for each in self._observers if each not in observers])


class _Phase:
    """The context manager of a phase: a class, since a generator is several times slower and each micro-batch enters it often."""

    __slots__ = ("_enter", "_leave", "_name")

    def __init__(self, name: str, observers: Sequence[Observer]) -> None:
        self._name = name
        self._enter = [each.enter for each in observers]
        self._leave = [each.leave for each in reversed(observers)]

    def __enter__(self) -> None:
        for enter in self._enter:
            enter(self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for leave in self._leave:
            leave(self._name)


NO_PHASES: Final = Phases()
"""For steps that nothing observes."""
