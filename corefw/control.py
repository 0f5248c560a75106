"""What happens in an engine, as its observers see it."""

from __future__ import annotations

from dataclasses import dataclass

from corefw.dispatch import Event
from corefw.machine import RunState


@dataclass(frozen=True, slots=True)
class PassBegan(Event):
    """The source begins a pass over the guest's memory; the first is number 1."""

    number: int


@dataclass(frozen=True, slots=True)
class RunStateChanged(Event):
    """The guest's run state changed."""

    old: RunState
    new: RunState
