"""What the answers of query-migrate mean, as phrases: the progress of a migration, and its sum when it is over.

docs/decisions/progress.md explains the figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from corefw.machine import RunState
from corefw.quantities import format_duration, format_milliseconds, format_size
from corefw.states import POSTCOPY, MigrationStatus

_MEGABIT: Final = 125_000
"""Bytes in one of QAPI's megabits (`mbps`)."""


@dataclass(frozen=True, slots=True)
class Progress:
    """An answer of query-migrate, in bytes, bytes per second and milliseconds. What is unknown is zero or None.

    total, remaining    over all live sections; of a real QEMU, its RAM
    missing             what has not arrived yet of the RAM of a destination in postcopy
    page_size           bytes
    requested           number of pages that the guest has asked for in postcopy
    passes              number of harvests of the dirty log, including the one of the present pass
    time_left           until the guest runs on the destination
    pass_time_left      until the present pass has been sent
    fraction            part of the guest's state that is up to date at the destination, 0 to 1
    """

    phase: str = "none"
    total: int = 0
    remaining: int = 0
    missing: int | None = None
    page_size: int = 4096
    requested: int = 0
    transferred: int = 0
    rate: float = 0.0
    dirty_rate: int = 0
    passes: int = 0
    time_left: int | None = None
    pass_time_left: int | None = None
    expected_downtime: int | None = None
    converges: bool | None = None
    elapsed: int = 0
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Progress:
        ram, own = answer.get("ram", {}), answer.get("x-migfw", {})
        phase = answer.get("status", "none")
        dirtied = 0 if phase in POSTCOPY else ram.get("dirty-pages-rate", 0)  # the guest runs elsewhere then
        measured = dirtied * ram.get("page-size", 4096)
        # QEMU reports the downtime limit until it has measured the dirty rate.
        downtime = answer.get("expected-downtime") if measured and not own else None
        return cls(
            phase=phase,
            total=own.get("total") or ram.get("total", 0),
            remaining=own["remaining"] if own.get("total") else ram.get("remaining", 0),
            missing=_missing(own),
            page_size=ram.get("page-size", 4096),
            requested=ram.get("postcopy-requests", 0),
            transferred=ram.get("transferred", 0),
            rate=ram.get("mbps", 0.0) * _MEGABIT,
            dirty_rate=own.get("dirty-rate", measured),
            passes=ram.get("dirty-sync-count", 0),
            time_left=own.get("time-left"),
            pass_time_left=own.get("pass-time-left"),
            expected_downtime=own.get("expected-downtime", downtime),
            converges=own.get("converges"),
            elapsed=answer.get("total-time", 0),
            warnings=tuple(own.get("warnings", ())),
        )

    @property
    def fraction(self) -> float:
        return min(1.0, max(0.0, 1 - self.remaining / self.total)) if self.total else 0.0

    @property
    def percent(self) -> str:
        """The fraction in percent, rounded down: 100 % means that nothing is left."""
        return f"{math.floor(100 * self.fraction)} %"

    def details(self) -> list[str]:
        """The known figures as phrases, most important first."""
        known = [f"{format_size(self.remaining)} of {format_size(self.total)} left"] if self.total else []
        if self.missing is not None:
            known.append(f"{format_size(self.missing)} of its RAM still to come")
        if self.phase in POSTCOPY:
            return known + self._postcopy_details()
        if self.converges is False:
            known.append("will not converge")
        elif self.time_left is not None:
            known.append(f"done in about {format_duration(self.time_left)}")
        elif self.pass_time_left is not None and self.remaining:
            known.append(f"this pass ends in about {format_duration(self.pass_time_left)}")
        if self.rate:
            known.append(f"{format_size(self.rate)}/s")
        if self.dirty_rate:
            known.append(f"dirtied {format_size(self.dirty_rate)}/s")
        if self.expected_downtime is not None:
            known.append(f"expected downtime {format_duration(self.expected_downtime)}")
        return known

    def _postcopy_details(self) -> list[str]:
        if not self.total:
            return []
        known = [f"{-(-self.remaining // self.page_size):,} pages", f"{self.requested:,} requested by the guest"]
        if self.phase == MigrationStatus.POSTCOPY_ACTIVE and self.rate:
            left = self.remaining / self.rate * 1000
            known += [f"done in about {format_duration(left)}", f"{format_size(self.rate)}/s"]
        return [*known, "the guest runs on the destination"]

    def heading(self) -> str:
        return f"{self.phase}, pass {self.passes}" if self.passes and self.phase not in POSTCOPY else self.phase

    def line(self) -> str:
        """All of it in one line."""
        percent = [self.percent] if self.total else []
        return ", ".join([self.heading(), *percent, *self.details()])


def _missing(own: Mapping[str, Any]) -> int | None:
    """Bytes of RAM that a destination in postcopy lacks, as the loaders say; None elsewhere."""
    found = [one["missing"] for one in own.get("sections", {}).values() if "missing" in one]
    return sum(found) if found else None


# -- when it is over ---------------------------------------------------------------------------------------------------


_WHEREABOUTS: Final[Mapping[str, str]] = {
    "stored": "stored in the file; it no longer runs here",
    "unconfirmed": "stopped here: its arrival was not confirmed (if it arrived, 'migfw quit'; if not, 'migfw cont')",
}
"""Where the guest is, unless it has simply moved."""


def throughput(answer: Mapping[str, Any]) -> float:
    """Bytes per second, not counting the setup time; 0 if unknown."""
    milliseconds = answer.get("total-time", 0) - answer.get("setup-time", 0)
    transferred: int = answer.get("ram", {}).get("transferred", 0)
    return transferred * 1000 / milliseconds if milliseconds > 0 else 0.0


def cancelled(answer: Mapping[str, Any], run_state: str) -> str:
    """The status after a cancel, and why the guest is not running here if it is not."""
    status, reason = str(answer.get("status", "none")), str(answer.get("x-migfw", {}).get("reason", ""))
    return f"{status} ({reason})" if reason and run_state == RunState.POSTMIGRATE else status


def switched(answer: Mapping[str, Any]) -> str | None:
    """When and why the migration switched to postcopy, as a phrase; None if it has not, or if that is not known."""
    how = answer.get("x-migfw", {}).get("postcopy-switch")
    if how is None:
        return None
    when = f"after {format_milliseconds(how['time'])} in pass {how['pass']}, with {format_size(how['remaining'])} left"
    return f"{when}: {how['reason']}"


def _live_sections(answer: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that each live section has sent. A destination reports only what the plugins' loaders say of themselves."""
    if "ram" not in answer:
        return {}
    sections = answer.get("x-migfw", {}).get("sections", {})
    return {name: one["sent"] for name, one in sections.items() if one.get("total")}


def summary(answer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Turn the last answer of query-migrate into (name, value) lines. What the answer lacks is left out."""
    ram = answer.get("ram", {})
    facts = [("status", str(answer.get("status", "none")))]
    if "error-desc" in answer:
        facts.append(("error", str(answer["error-desc"])))
    for name, key in (("total time", "total-time"), ("setup time", "setup-time"), ("downtime", "downtime")):
        if key in answer:
            facts.append((name, format_milliseconds(answer[key])))
    if rate := throughput(answer):
        facts.append(("throughput", f"{format_size(rate)}/s"))
    if "dirty-sync-count" in ram:
        facts.append(("passes", str(ram["dirty-sync-count"])))
    if "transferred" in ram:
        facts.append(("sent", f"{format_size(ram['transferred'])} for {format_size(ram.get('total', 0))} of RAM"))
    if how := switched(answer):
        facts.append(("switched", how))
    if after := ram.get("postcopy-bytes"):
        facts.append(("postcopy", f"{format_size(after)} sent while the guest ran on the destination"))
    if len(live := _live_sections(answer)) > 1:
        facts.append(("sections", ", ".join(f"{name} {format_size(sent)}" for name, sent in live.items())))
    if "normal" in ram:
        facts.append(("pages", f"{ram['normal']:,} sent whole, {ram.get('duplicate', 0):,} zero"))
    if guest := _WHEREABOUTS.get(answer.get("x-migfw", {}).get("guest", "")):
        facts.append(("guest", guest))
    facts += [("warning", str(warning)) for warning in answer.get("x-migfw", {}).get("warnings", ())]
    return facts
