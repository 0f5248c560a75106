"""Channels that end together: all those of a migration's connection, or of a relay.

Invariant: abort() reaches channels that are added later too, since nothing else wakes a thread that is blocked in one.

Threads: any.
"""

from __future__ import annotations

import threading

from corefw.channel import Channel


class ChannelSet:
    """A set that only grows. A channel may be closed on its own before the set is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._aborted = False

    def add(self, channel: Channel) -> Channel:
        """Add a channel, and return it. It is aborted at once if the set was aborted meanwhile."""
        with self._lock:
            self._channels.append(channel)
            aborted = self._aborted
        if aborted:
            channel.abort()
        return channel

    def abort(self) -> None:
        """Make every send and receive on a channel of the set raise Interrupted. Idempotent."""
        self._abort(None)

    def abort_others(self, kept: Channel) -> None:
        """As abort(), but leave one channel of the set alone."""
        self._abort(kept)

    def _abort(self, kept: Channel | None) -> None:
        with self._lock:
            self._aborted = True
            channels = [channel for channel in self._channels if channel is not kept]
        for channel in channels:
            channel.abort()

    def close(self) -> None:
        """Close every channel of the set. Idempotent."""
        with self._lock:
            channels = tuple(self._channels)
        for channel in channels:
            channel.close()
