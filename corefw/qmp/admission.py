"""Chooses the client that makes room when the QMP server has as many as it serves.

A client that opens connections and leaves them idle must not lock others out: it loses its own connections first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from corefw.qmp.connection import Connection


def whom_to_disconnect(clients: Collection[Connection]) -> Connection | None:
    """The client to disconnect for a new one; None if each is waiting for an answer or is the only one of its host.

    Clients that never sent qmp_capabilities go first, then idle ones. Among these the host that has most of them (on
    UNIX sockets: the process) loses the one that has been silent longest.
    """
    strangers = [one for one in clients if not one.negotiated]
    if strangers:
        return _longest_silent_of_the_largest_group(strangers)
    hosts = Counter(one.host for one in clients)
    return _longest_silent_of_the_largest_group([one for one in clients if one.idle and hosts[one.host] > 1])


def _longest_silent_of_the_largest_group(clients: Collection[Connection]) -> Connection | None:
    hosts = Counter(one.host for one in clients)
    return min(clients, key=lambda one: (-hosts[one.host], one.active), default=None)
