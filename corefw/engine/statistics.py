"""The figures of a migration on the source.

Threads: the migration thread writes, any thread reads. Times are in milliseconds.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from corefw.control import PostcopySwitch, TransferReport
from corefw.engine.forecast import Outlook
from corefw.engine.meter import Meter
from corefw.engine.reconnection import Reconnection
from corefw.errors import ANYTHING
from corefw.quantities import format_milliseconds, format_size
from corefw.section import RamStatistics, Section, SectionKey
from corefw.states import POSTCOPY, SENDING, MigrationStatus

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SectionFigures:
    """What a section has sent and has left, in bytes.

    total       the most that was ever left at once: for RAM, its size
    remaining   what is known to be left
    sent        bytes in the stream, the section's frames included
    """

    total: int = 0
    remaining: int = 0
    sent: int = 0

    def begin(self, left: int) -> None:
        self.total = self.remaining = left

    def update(self, left: int) -> int:
        """Set what is left. Returns how much more that is than before, negative if it is less."""
        change = left - self.remaining
        self.remaining = left
        self.total = max(self.total, left)
        return change

    def document(self) -> dict[str, Any]:
        return {"total": self.total, "remaining": self.remaining, "sent": self.sent}


@dataclass(slots=True)
class OutgoingStatistics:
    """The figures of a single migration on the source. `meter` counts the bytes.

    stop_time       milliseconds that it took to stop the guest
    downtime_limit  as it was when the guest was stopped; None before
    warnings        sentences for the user who started the migration
    switch          when and why the migration switched to postcopy; None before, and in precopy
    reconnection    when a postcopy that is paused goes on by itself
    savers          add figures of their own
    """

    meter: Meter
    started: float = field(default_factory=time.monotonic)
    setup_time: int = 0
    total_time: int = 0
    downtime: int = 0
    expected_downtime: int = 0
    guest: str = ""
    ram: RamStatistics = field(default_factory=RamStatistics)
    error: str | None = None
    sections: dict[SectionKey, SectionFigures] = field(default_factory=dict)
    savers: Sequence[Section] = ()
    outlook: Outlook = field(default_factory=Outlook)
    advice: str | None = None
    warnings: list[str] = field(default_factory=list)
    switch: PostcopySwitch | None = None
    reconnection: Reconnection | None = None
    stop_time: int = 0
    downtime_limit: int | None = None
    _before_stop: int = 0  # bytes that had been sent when the guest was stopped
    _before_postcopy: int | None = None  # and when it was handed over in postcopy
    _last_pass: int | None = None  # the number of the last pass before postcopy
    _finished: bool = False

    def elapsed(self) -> int:
        return milliseconds_since(self.started)

    def section(self, key: SectionKey) -> SectionFigures:
        return self.sections.setdefault(key, SectionFigures())

    @property
    def total(self) -> int:
        """Bytes of all live sections."""
        return sum(section.total for section in list(self.sections.values()))

    @property
    def remaining(self) -> int:
        """Bytes that are known to be left of all live sections."""
        return sum(section.remaining for section in list(self.sections.values()))

    @property
    def transferred(self) -> int:
        """Bytes sent over all channels."""
        return self.meter.total

    @property
    def precopy_bytes(self) -> int:
        """Bytes sent before the guest was stopped."""
        return self.transferred if self.downtime_limit is None else self._before_stop

    @property
    def bandwidth(self) -> float:
        """Bytes per second: in the last window, or on average over a migration that has completed."""
        return self.transferred * 1000 / max(1, self.total_time) if self._finished else self.meter.bandwidth

    @property
    def downtime_bytes(self) -> int:
        """Bytes sent while the guest was stopped."""
        return self.transferred - self.precopy_bytes - self.postcopy_bytes

    @property
    def postcopy_bytes(self) -> int:
        """Bytes sent after the guest was handed over in postcopy."""
        return 0 if self._before_postcopy is None else self.transferred - self._before_postcopy

    def prepares_postcopy(self) -> None:
        """The dirty log is about to be harvested for the switch, which begins no pass that is sent."""
        self._last_pass = self.ram.dirty_sync_count

    def switched_to_postcopy(self, reason: str) -> None:
        """The guest is stopped, to go on at the destination while the rest follows."""
        last_pass = self.ram.dirty_sync_count if self._last_pass is None else self._last_pass
        self.switch = PostcopySwitch(reason, self.elapsed(), last_pass, self._left_now())

    def handed_over(self) -> None:
        """The guest runs on the destination, and the rest of it follows."""
        self._before_postcopy = self.transferred

    def progress(self) -> str:
        """A phrase that says how far the migration has come."""
        if not self.total:
            return "nothing was sent yet"
        phrase = f"{format_size(self.remaining)} of {format_size(self.total)} left in pass {self.ram.dirty_sync_count}"
        return f"{phrase}; {self.advice}" if self.advice else phrase

    def update(self, expected_downtime: int, outlook: Outlook, max_bandwidth: int) -> None:
        """Take note of the state after a PART."""
        self.expected_downtime = expected_downtime
        self.outlook = outlook
        self.advice = outlook.advice(max_bandwidth)

    def stopped(self, downtime_limit: int, stop_time: int) -> None:
        """Take note that the guest was stopped for the switchover, which took `stop_time`."""
        self.advice = None
        self._before_stop = self.transferred
        self.downtime_limit, self.stop_time = downtime_limit, stop_time

    def finish(self, downtime: int, guest: str) -> None:
        """The guest has left (migration_calculate_complete). `guest` says where it is: "moved" if the destination has
        confirmed it, "stored" if it is whole in a file, "unconfirmed" if that cannot be known."""
        self.guest = guest
        self.total_time = self.elapsed()
        self.downtime = downtime
        for section in self.sections.values():
            section.remaining = 0
        if warning := self._over_limit():
            self.warnings.append(warning)
        self._finished = True
        self.ram.remaining_bytes = 0

    def _left_now(self) -> int:
        """Bytes left. Once the guest is stopped, only the RAM's saver knows what the last harvest found."""
        return self.remaining if self.downtime_limit is None else max(self.remaining, self.ram.remaining_bytes)

    def _will_exceed(self) -> str | None:
        """A warning if the guest is stopped and will be down for longer than the limit."""
        if self.downtime_limit is None or not self.outlook.send_rate:
            return None
        left = self._left_now()
        expected = self.stop_time + left / self.outlook.send_rate * 1000
        if expected <= self.downtime_limit:
            return None
        return (
            f"the guest is stopped, with {format_size(left)} left to send: it will be down for about"
            f" {format_milliseconds(expected)}, over the downtime-limit of {format_milliseconds(self.downtime_limit)}"
        )

    def _over_limit(self) -> str | None:
        """A warning if the guest was down for longer than the limit, with the reasons."""
        if self.downtime_limit is None or self.downtime <= self.downtime_limit:
            return None
        parts = [f"{format_size(self.downtime_bytes)} were sent while it was stopped"]
        if self.stop_time > self.downtime_limit / 10:
            parts.insert(0, f"stopping it took {format_milliseconds(self.stop_time)}")
        limit, downtime = format_milliseconds(self.downtime_limit), format_milliseconds(self.downtime)
        return f"the guest was down for {downtime}, over the downtime-limit of {limit}: {', '.join(parts)}"

    def fail(self, reason: str) -> None:
        self.total_time = self.elapsed()
        self.error = reason

    def report(self, status: MigrationStatus) -> TransferReport:
        """The figures at this moment. `status` is that of the migration."""
        sending = status in SENDING
        precopy = sending and status not in POSTCOPY
        outlook = self.outlook if precopy else Outlook()
        now = (self.advice, self._will_exceed()) if precopy else ()
        precopy_bytes = self.precopy_bytes  # before the total, which the migration thread may raise meanwhile
        return TransferReport(
            total_time=self.elapsed() if sending else self.total_time,
            setup_time=self.setup_time,
            downtime=self.downtime,
            expected_downtime=self.expected_downtime,
            transferred=self.transferred,
            precopy_bytes=precopy_bytes,
            postcopy_bytes=self.postcopy_bytes,
            mbps=self.bandwidth * 8 / 1e6,
            pages_per_second=int(self.meter.bandwidth / self.ram.page_size),
            ram=replace(self.ram),
            total=self.total,
            remaining=self.remaining,
            remaining_now=self._left_now() if sending else self.remaining,
            send_rate=outlook.send_rate,
            dirty_rate=outlook.dirty_rate,
            time_left=_milliseconds(outlook.time_left),
            pass_time_left=_milliseconds(outlook.pass_time_left),
            pass_downtime=_milliseconds(outlook.expected_downtime),
            converges=outlook.converges,
            guest=self.guest,
            warnings=(*self.warnings, *(warning for warning in now if warning)),
            switch=self.switch,
            reconnect=self.reconnection.report() if self.reconnection is not None else None,
        )

    def section_reports(self) -> dict[str, dict[str, object]]:
        """What each live section reports about itself, with its SectionFigures."""
        own = section_figures(self.savers)
        return {
            name: own.get(name, {}) | figures.document()
            for key, figures in list(self.sections.items())
            for name in (_name(key),)
        }


def section_figures(sections: Iterable[Section]) -> dict[str, dict[str, object]]:
    """What sections report about themselves, by name. A section whose report fails is logged and left out."""
    found = {}
    for section in sections:
        try:
            figures = {str(name): value for name, value in section.statistics().items()}
            json.dumps(figures, allow_nan=False)
        except ANYTHING:
            log.exception("section %s: statistics failed", section.key)
            continue
        if figures:
            found[_name(section.key)] = figures
    return found


def milliseconds_since(moment: float) -> int:
    """Milliseconds since a moment of time.monotonic()."""
    return int((time.monotonic() - moment) * 1000)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _name(key: SectionKey) -> str:
    return f"{key.idstr}/{key.instance_id}" if key.instance_id else key.idstr
