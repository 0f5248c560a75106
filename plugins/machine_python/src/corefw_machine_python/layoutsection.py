"""The section 'program-layout': the source sends the layout of its program before any RAM, and the destination compares
it.

A destination that cannot run the program refuses it here, before gigabytes have been sent.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from corefw.channel import Interrupt
from corefw.errors import StreamError, one_line
from corefw.quantities import format_milliseconds
from corefw.section import IncomingContext, LiveLoader, LiveSaver, OutgoingContext, Pending, Priority
from corefw.wire.records import LAYOUT_IDSTR, read_layout, write_layout
from corefw.wire.stream import StreamReader, StreamWriter
from corefw_machine_python.disknode import DiskNode
from corefw_machine_python.layout import Layout, compare
from corefw_machine_python.protocol import StopCost

log = logging.getLogger(__name__)

FLUSH_LIMIT: Final = 5.0
"""Seconds that a migration waits for the disks before its first pass."""

MUCH: Final = 1 << 20
"""Bytes that before_stop() may write before it is reported as the reason for a long downtime."""


class LayoutSaver(LiveSaver):
    """Its START has the layout; PART and END are empty."""

    idstr = LAYOUT_IDSTR
    version_id = 1
    priority = Priority.EARLY

    def __init__(
        self,
        layout: Layout,
        stop_cost: Callable[[], StopCost | None] = lambda: None,
        disks: Sequence[DiskNode] = (),
    ) -> None:
        """`stop_cost` returns the cost of the program's before_stop() at the last stop. The `disks` are flushed while
        the program runs, so that little is left for the stop."""
        self.layout = layout
        self._stop_cost = stop_cost
        self._disks = disks
        self._limit = 0.0
        self._stopped: float | None = None

    def active(self) -> bool:
        return True

    def setup(self, writer: StreamWriter, context: OutgoingContext) -> None:
        write_layout(writer, self.layout.pack())
        self._limit = context.settings.integer("downtime-limit") / 1000
        self._flush(context.interrupt)

    def pending_estimate(self) -> Pending:
        return Pending(0, 0)

    def _flush(self, interrupt: Interrupt) -> None:
        self._begin_flush()
        until = time.monotonic() + FLUSH_LIMIT
        while any(disk.is_flushing for disk in self._disks) and time.monotonic() < until:
            if interrupt.wait(0.01):
                return

    def _begin_flush(self) -> None:
        for disk in self._disks:
            disk.begin_flush()

    def pending_exact(self) -> Pending:
        self._begin_flush()
        return Pending(0, 0)

    def iterate(self, writer: StreamWriter, budget: int) -> bool:
        return True

    def complete(self, writer: StreamWriter) -> None:
        self._stopped = time.monotonic()

    def cleanup(self) -> None:
        """Log a warning if before_stop() made the downtime too long."""
        stop_cost = self._stop_cost()
        if self._stopped is None or stop_cost is None:
            return
        stopped = time.monotonic() - self._stopped + stop_cost.seconds
        self._stopped = None
        if stopped > self._limit and (stop_cost.seconds > self._limit / 2 or (stop_cost.written or 0) >= MUCH):
            log.warning(
                "the guest was stopped for %s, downtime-limit is %s: its before_stop() %s of its arrays (do less there)"
                if stop_cost.written
                else "the guest was stopped for %s, downtime-limit is %s: its before_stop() %s (do less there)",
                format_milliseconds(round(1000 * stopped)),
                format_milliseconds(round(1000 * self._limit)),
                stop_cost,
            )


class LayoutLoader(LiveLoader):
    """Refuses a program that cannot go on here."""

    idstr = LAYOUT_IDSTR
    version_id = minimum_version = 1

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._compared = False

    def required(self) -> bool:
        """Optional: the section of the device contains the layout too."""
        return False

    def setup(self, context: IncomingContext) -> None:
        self._compared = False

    def load(self, reader: StreamReader, version_id: int) -> None:
        """Raises StreamError, with the reason, for a program that cannot run here."""
        if version_id != self.version_id:
            raise reader.error(f"version {self.version_id} of the section", f"version {version_id}")
        if self._compared:
            return
        self._compared = True
        data = read_layout(reader)
        try:
            there = Layout.unpack(data)
        except ValueError as error:
            raise reader.error("what a program consists of", str(error)) from None
        comparison = compare(self.layout, there)
        if comparison.refusals:
            raise StreamError("; ".join(comparison.refusals))
        for note in comparison.notes:
            log.warning("%s", one_line(note)[:300])

    def cleanup(self) -> None:
        pass
