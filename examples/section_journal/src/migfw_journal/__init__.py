"""A journal of the hosts that a guest has lived on: the smallest complete section plugin.

The entry point names this module. migfw registers it and calls its hooks; journal.py has the state, section.py sends
and loads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from corefw.declarations import Capability, Declarations
from corefw.hookspecs import hookimpl
from corefw.section import SectionLoader, SectionSaver
from corefw.settings import Settings
from migfw_journal.journal import journal_of
from migfw_journal.section import CAPABILITY, JournalLoader, JournalSaver

if TYPE_CHECKING:
    from corefw.control import MigrationControl
    from corefw.machine import Machine


@hookimpl
def corefw_settings() -> Declarations:
    """Declare a capability of our own, and say that we implement it."""
    capability = Capability(CAPABILITY, "send the list of hosts that the guest has lived on")
    return Declarations(capabilities=(capability,), implements=frozenset({CAPABILITY}))


@hookimpl
def corefw_section_savers(machine: Machine, settings: Settings) -> Iterable[SectionSaver]:
    """Make a new saver for each migration; the journal itself stays with the machine."""
    return (JournalSaver(journal_of(machine), settings),)


@hookimpl
def corefw_section_loaders(machine: Machine) -> Iterable[SectionLoader]:
    return (JournalLoader(journal_of(machine)),)


@hookimpl
def corefw_commands(control: MigrationControl) -> Mapping[str, Callable[..., object]]:
    """QMP: {"execute": "x-query-journal"}."""

    def x_query_journal() -> list[dict[str, object]]:
        return [{"host": hop.host, "since": hop.since} for hop in journal_of(control.machine).hops]

    return {"x-query-journal": x_query_journal}
