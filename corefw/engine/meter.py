"""The bytes of a migration: counts them over all of its channels, measures the bandwidth, and keeps the limits.

Every channel of the source, those that savers open as well as the stream's own, is a MeteredChannel, so the count is
complete and max-bandwidth holds for all of them together: over any second, no more than 105 % of the limit goes out.
Sending is therefore paced in steps of a hundredth of a second; QEMU's windows of a tenth let eleven windows' worth into
one second. Time in which there was nothing to send is not made up for. A limit that is raised holds at once, for what
was sent already too. One that is lowered does not: what was sent under the old limit would keep the stream silent for
longer than that.

Source: QEMU 10.0, migration_rate_limit, migration_update_counters.
Threads: any may send, ask, and cut waits short; `step`, `measure` and the choice of the limit are the migration
thread's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from corefw.channel import Buffer, Channel, ReceivesFromSocket, SendsMemory, SendsToSocket
from corefw.settings import Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STEP: Final = 0.01
"""Seconds of the limit that one step sends."""
LEAST_BUDGET: Final = 4096
MOST_BUDGET: Final = 32 << 20
FREE_STEP: Final = 0.02
"""Seconds that a step takes where there is no limit: short beside the window of the bandwidth."""
FREE_START: Final = 4 << 20
FREE_LEAST: Final = 64 << 10
MOST_CREDIT: Final = 0.02
"""Seconds of lateness that may be caught up on; the rest of a stall is forgotten."""

WINDOW: Final = 0.1
"""Seconds over which the bandwidth is measured (QEMU's BUFFER_DELAY)."""
FIRST_WINDOW: Final = 0.01
"""The first measurement comes this early: a small guest would be through before a whole window has passed, and QEMU
would then stop it without knowing whether the rest fits into the downtime."""

LOOK: Final = 0.1
"""Seconds after which a paced wait calls the check again."""


class Meter:
    """Counts, measures and paces the bytes of one migration. Sizes are bytes, times seconds of `clock`.

    total       bytes that the channels have sent
    bandwidth   bytes per second in the last window; 0.0 before the first
    """

    def __init__(
        self,
        settings: Settings,
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`check` is called while a send waits for its turn, and ends the wait by raising."""
        self.clock: Final = clock
        self.total = 0
        self.bandwidth = 0.0
        self._settings = settings
        self._check = check
        self._parameter: str | None = "max-bandwidth"
        self._changed = threading.Condition()  # guards what follows, and `total`
        self._urgent = 0
        self._at = clock()
        self._limit_before = 0
        self._ahead = 0.0  # bytes sent that were not due at `_at` yet
        self._in_flight: dict[int, float] = {}  # thread -> when its send began
        self._free = FREE_START  # what FREE_STEP has room for
        self._window_began = self._at
        self._window_total = 0

    # -- limits ----------------------------------------------------------------------------------------------------

    @property
    def limit(self) -> int:
        """The limit in force, in bytes per second; 0 for none."""
        return self._settings.integer(self._parameter) if self._parameter else 0

    def hold_at(self, parameter: str) -> None:
        """Keep what is sent from now on at this parameter's value, which may change while the migration runs."""
        self._parameter = parameter
        self.wake()

    def release(self) -> None:
        """Hold nothing back from now on: the guest is stopped and waits for the rest."""
        self._parameter = None
        self.wake()

    # -- sending ---------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[int]:
        """One step of a pass. Gives the bytes to send in it, so that it takes a hundredth of a second at the limit, and
        about a fiftieth where there is none."""
        limit, began, before = self.limit, self.clock(), self.total
        yield max(LEAST_BUDGET, min(MOST_BUDGET, int(limit * STEP))) if limit else self._free
        count = self.total - before
        if not limit and count >= self._free:  # else it ended for want of pages, and says nothing about the path
            # No more than twice as much as before: buffers on the way take the first parts at once.
            spent = max(self.clock() - began, FREE_STEP / 2)
            self._free = max(FREE_LEAST, min(MOST_BUDGET, int(self._free * FREE_STEP / spent)))

    def carry_out(self, send: Callable[[], None], count: int) -> None:
        """Call `send`, count the bytes that it has sent, and wait until they were due. Raises what `send` and the check
        raise."""
        with self.under_way():
            send()
        self.sent_in_turn(count)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Around one send: longest_send() tells how long it has taken."""
        thread = threading.get_ident()
        self._in_flight[thread] = self.clock()
        try:
            yield
        finally:
            del self._in_flight[thread]

    def sent_in_turn(self, count: int) -> None:
        """So many more bytes went out: wait until they were due. Raises what the check raises."""
        self.sent(count)
        if self.limit:
            self.pace()

    def sent(self, count: int) -> None:
        """So many more bytes went out."""
        with self._changed:
            self.total += count
            if self.limit:
                self._settle()
                self._ahead += count
            else:
                self._ahead = 0.0

    def rest(self) -> float:
        """Seconds until what went out is due."""
        with self._changed:
            return self._rest()

    def is_ahead(self) -> bool:
        """Whether more went out than is due, since urgent work did not wait: leave everything else for later."""
        with self._changed:
            return self._settle() > 0 and self._ahead > 0

    def pace(self) -> None:
        """Wait until what went out is due, or until urgent work comes. Raises what the check raises."""
        while self.rest() > 0:
            self._check()
            with self._changed:
                if (rest := self._rest()) > 0:
                    self._changed.wait(min(rest, LOOK))

    def longest_send(self) -> float:
        """Seconds that the longest of the sends under way has taken so far; 0.0 if there is none."""
        return max((self.clock() - began for began in list(self._in_flight.values())), default=0.0)

    def _rest(self) -> float:
        limit = self._settle()
        return max(0.0, self._ahead / limit) if limit and not self._urgent else 0.0

    def _settle(self) -> int:
        """Let the time until now pay for what was sent; the limit now."""
        limit, now = self.limit, self.clock()
        if limit < self._limit_before and self._ahead > 0:
            self._ahead *= limit / self._limit_before
        self._limit_before = limit
        paid = (now - self._at) * limit
        self._at = now
        self._ahead = max(-MOST_CREDIT * limit, self._ahead - paid) if limit else 0.0
        return limit

    # -- urgent work -----------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Let every wait look again: a limit has changed, or the migration is to end."""
        with self._changed:
            self._changed.notify_all()

    def urgent_begins(self) -> None:
        """Nothing waits until urgent_ends() was called as often: a page request has come in (QEMU 10.0,
        migration_make_urgent_request)."""
        with self._changed:
            self._urgent += 1
            self._changed.notify_all()

    def urgent_ends(self) -> None:
        """The page was sent."""
        with self._changed:
            self._urgent -= 1

    @contextmanager
    def unheld(self) -> Iterator[None]:
        """Around the sending of what a step of a limit has room for: pace() waits only after it. A page whose mark was
        cleared goes out at once then, also while requested pages, over their own channel, use up the limit; the guest
        may request it next."""
        if not self.limit:  # one that is set meanwhile holds at once
            yield
            return
        self.urgent_begins()
        try:
            yield
        finally:
            self.urgent_ends()

    # -- measuring -------------------------------------------------------------------------------------------------

    def start_window(self) -> None:
        """Measure from here on; what was measured before is forgotten."""
        self.bandwidth = 0.0
        self._window_began, self._window_total = self.clock(), self.total

    def measure(self) -> int:
        """Close the window if its time is over, and set `bandwidth`. Returns the bytes of a window that was closed."""
        now, count = self.clock(), self.total - self._window_total
        spent = now - self._window_began
        if not count or spent < (WINDOW if self.bandwidth else FIRST_WINDOW):
            return 0
        self.bandwidth = count / spent
        self._window_began, self._window_total = now, self.total
        return count


class CountedChannel(Channel):
    """A channel that counts what it sends, and is not held back by a limit: other channels wait the longer. All else is
    the inner channel's."""

    def __init__(self, channel: Channel, meter: Meter) -> None:
        self.peer = channel.peer
        self.has_return_path = channel.has_return_path
        self._channel = channel
        self._meter = meter

    def send(self, *parts: Buffer) -> None:
        self._channel.send(*parts)
        self._meter.sent(sum(map(len, parts)))

    def receive_into(self, view: memoryview) -> int:
        return self._channel.receive_into(view)

    def try_receive_into(self, view: memoryview) -> int | None:
        return self._channel.try_receive_into(view)

    def wait_readable(self, seconds: float) -> bool:
        return self._channel.wait_readable(seconds)

    def limit_unsent(self, count: int) -> None:
        self._channel.limit_unsent(count)

    def send_eof(self) -> None:
        self._channel.send_eof()

    def abort(self) -> None:
        self._channel.abort()

    def close(self) -> None:
        self._channel.close()


class CountedSocketChannel(CountedChannel, SendsToSocket):
    """The same for a channel that lends its socket to send."""

    def __init__(self, channel: Channel, sockets: SendsToSocket, meter: Meter) -> None:
        super().__init__(channel, meter)
        self._sockets = sockets

    def send_to_socket(self, send: Callable[[int], int]) -> int:
        sent = self._sockets.send_to_socket(send)
        self._meter.sent(sent)
        return sent


def counted(channel: Channel, meter: Meter) -> CountedChannel:
    """The channel, counted; it lends its socket if the inner one does."""
    return (
        CountedSocketChannel(channel, channel, meter)
        if isinstance(channel, SendsToSocket)
        else CountedChannel(channel, meter)
    )


class MeteredChannel(CountedChannel):
    """A channel that paces what it sends, too."""

    def send(self, *parts: Buffer) -> None:
        for portion in portions(parts, self._meter.limit):
            self._meter.carry_out(partial(self._channel.send, *portion), sum(map(len, portion)))


class MeteredMemoryChannel(MeteredChannel, SendsMemory):
    """The same for a channel that sends pieces of memory."""

    def __init__(self, channel: Channel, memory: SendsMemory, meter: Meter) -> None:
        super().__init__(channel, meter)
        self._memory = memory

    def send_memory(self, pieces: NDArray[np.uint64]) -> None:
        self._meter.carry_out(partial(self._memory.send_memory, pieces), int(pieces[:, 1].sum()))


class MeteredSocketChannel(MeteredMemoryChannel, SendsToSocket, ReceivesFromSocket):
    """The same for a channel that lends its socket, too, in both directions."""

    def send_to_socket(self, send: Callable[[int], int]) -> int:
        assert isinstance(self._channel, SendsToSocket)
        with self._meter.under_way():
            sent = self._channel.send_to_socket(send)
        self._meter.sent_in_turn(sent)
        return sent

    def receive_from_socket(self, receive: Callable[[int], int]) -> int:
        assert isinstance(self._channel, ReceivesFromSocket)
        return self._channel.receive_from_socket(receive)


def metered(channel: Channel, meter: Meter) -> MeteredChannel:
    """The channel, counted and paced; it sends memory and lends its socket if the inner one does."""
    if (
        isinstance(channel, SendsMemory)
        and isinstance(channel, SendsToSocket)
        and isinstance(channel, ReceivesFromSocket)
    ):
        return MeteredSocketChannel(channel, channel, meter)
    if isinstance(channel, SendsMemory):
        return MeteredMemoryChannel(channel, channel, meter)
    return MeteredChannel(channel, meter)


def portions(parts: Sequence[Buffer], limit: int) -> Iterator[Sequence[Buffer]]:
    """Split what one call sends into steps that the limit allows, so that a large part does not go out at once."""
    most = max(LEAST_BUDGET, int(limit * STEP))
    if not limit or sum(map(len, parts)) <= 2 * most:
        yield parts
        return
    portion: list[Buffer] = []
    room = most
    for part in parts:
        view = memoryview(part).cast("B")
        while len(view) > room:
            yield [*portion, view[:room]]
            view, portion, room = view[room:], [], most
        if len(view):
            portion.append(view)
            room -= len(view)
    if portion:
        yield portion
