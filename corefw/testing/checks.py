"""The table of the checks for transports, to which the modules transport_streams and transport_breaks add.

A check is a function of a Workbench. It returns if the promise in its docstring holds, and raises a one-line
AssertionError if not. Its row says what a case must have for it to apply, so that nothing is skipped silently.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Flag, auto
from typing import Final

from corefw.channel import TransportFeatures
from corefw.testing.ends import MIB, TransportCase, Workbench
from corefw.testing.kit import name_of

UNREAD_LIMIT: Final = 32 * MIB
"""Bytes that may be buffered here, in the kernel and on the other side while the receiver does not read."""

MEMORY_LIMIT: Final = 24 * MIB
"""Bytes by which this process may grow while the receiver does not read."""


class Need(Flag):
    """What a case must support for a check to apply."""

    NOTHING = 0
    LIVE = auto()
    RETURN_PATH = auto()
    MANY = auto()  # a listener takes one peer after the other
    OWN_LISTENER = auto()
    SHOWS_BREAKS = auto()
    REFUSED = auto()
    STUCK = auto()


def has(case: TransportCase, features: TransportFeatures) -> Need:
    """What this case has."""
    own = case.listen_transport is None
    had = {
        Need.LIVE: not case.stored,
        Need.RETURN_PATH: features.return_path,
        Need.MANY: features.multi_channel,
        Need.OWN_LISTENER: own and features.multi_channel,
        Need.SHOWS_BREAKS: case.shows_breaks,
        Need.REFUSED: case.refused is not None,
        Need.STUCK: case.stuck is not None,
    }
    return Need(sum(need.value for need, there in had.items() if there))


Check = Callable[[Workbench], None]
CHECKS: Final[dict[str, tuple[Check, Need]]] = {}
"""Every check by name, with what it needs, in the order in which they run."""


def check(need: Need = Need.NOTHING) -> Callable[[Check], Check]:
    def enter(function: Check) -> Check:
        CHECKS[name_of(function)] = (function, need)
        return function

    return enter
