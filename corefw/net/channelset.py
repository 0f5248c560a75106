"""Channels that end together: those of a relay, and those that a migration's sections have beside the stream's.

The law: who aborts them reaches those that come later, too; a thread that is blocked in one is woken by nothing else.
Whoever got one may close it before that.

Threads: any.
"""

from __future__ import annotations

import threading

from corefw.channel import Channel


class ChannelSet:
    """Grows only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channels: list[Channel] = []
        self._aborted = False

    def add(self, channel: Channel) -> Channel:
        """Keep it, and hand it on; aborted where everything was aborted meanwhile."""
        with self._lock:
            self._channels.append(channel)
            aborted = self._aborted
        if aborted:
            channel.abort()
        return channel

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            channels = tuple(self._channels)
        for channel in channels:
            channel.abort()

    def close(self) -> None:
        with self._lock:
            channels = tuple(self._channels)
        for channel in channels:
            channel.close()
