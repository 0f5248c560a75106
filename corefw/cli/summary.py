"""What a finished migration was like: a few lines for people, one document for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from corefw.machine import RunState
from corefw.quantities import format_milliseconds, format_size

_WHEREABOUTS: Final[Mapping[str, str]] = {
    "stored": "stored in the file; it no longer runs here",
    "unconfirmed": "stopped here: nobody confirmed that it arrived (if it did, 'migfw quit'; if not, 'migfw cont')",
}
"""Where the guest is, unless it simply moved."""


def throughput(answer: Mapping[str, Any]) -> float:
    """Bytes per second over the time that data flowed; 0 when that is not known."""
    milliseconds = answer.get("total-time", 0) - answer.get("setup-time", 0)
    transferred: int = answer.get("ram", {}).get("transferred", 0)
    return transferred * 1000 / milliseconds if milliseconds > 0 else 0.0


def cancelled(answer: Mapping[str, Any], run_state: str) -> str:
    """The status after a cancel; where the guest did not come back, why not."""
    status, reason = str(answer.get("status", "none")), str(answer.get("x-migfw", {}).get("reason", ""))
    return f"{status} ({reason})" if reason and run_state == RunState.POSTMIGRATE else status


def _live_sections(answer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    sections = answer.get("x-migfw", {}).get("sections", {})
    return {name: one for name, one in sections.items() if one["total"]}


def summary(answer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """query-migrate's last answer as (name, value) lines. What the engine did not say is left out."""
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
    if len(live := _live_sections(answer)) > 1:
        facts.append(("sections", ", ".join(f"{name} {format_size(one['sent'])}" for name, one in live.items())))
    if "normal" in ram:
        facts.append(("pages", f"{ram['normal']:,} sent whole, {ram.get('duplicate', 0):,} zero"))
    if guest := _WHEREABOUTS.get(answer.get("x-migfw", {}).get("guest", "")):
        facts.append(("guest", guest))
    facts += [("warning", str(warning)) for warning in answer.get("x-migfw", {}).get("warnings", ())]
    return facts
