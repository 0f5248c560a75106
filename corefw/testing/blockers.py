"""The contract kit for the hook corefw_blockers.

    from corefw.testing.blockers import CHECKS, BlockersCase, check_blockers

    CASE = BlockersCase(
        plugin=my_package.hooks,
        machine=lambda: MyMachine(MachineConfig()),
        block=lambda machine, settings: settings.set_capabilities({"x-night-only": True}),
        unblock=lambda machine, settings: settings.set_capabilities({"x-night-only": False}),
    )

    @pytest.mark.parametrize("check", CHECKS)
    def test_blockers(check):
        check_blockers(CASE, only=[check])

Each check states one promise, and fails with an AssertionError that says in one line what is wrong. Machines are closed
after each check. It needs no test framework.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from corefw.machine import DEAD, Machine, RunState
from corefw.plugins import Plugins
from corefw.settings import Settings
from corefw.testing.kit import Kit, hook, one_line_of_text
from corefw.testing.tasks import Task

__all__ = ["CHECKS", "BlockersCase", "check_blockers"]

AT_ONCE: Final = 4
"""Threads that ask at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockersCase:
    """The plugin to check.

    plugin    the module or object with the hook
    machine   makes a machine that nothing prevents from migrating
    block     creates the condition that the plugin blocks; called with the machine and the settings
    unblock   ends that condition
    """

    plugin: object
    machine: Callable[[], Machine]
    block: Callable[[Machine, Settings], object]
    unblock: Callable[[Machine, Settings], object]


_KIT: Final[Kit[BlockersCase]] = Kit()
CHECKS: Final = _KIT.checks
"""Every check by name, in the order in which they run."""


def check_blockers(case: BlockersCase, *, only: Collection[str] | None = None) -> list[str]:
    """Run every check (or `only` these); the names of those that were run.

    Raises AssertionError for the first promise that is broken.
    """
    return _KIT.run(case, only)


@contextmanager
def _guest(case: BlockersCase) -> Iterator[tuple[Machine, Settings]]:
    plugins = Plugins()
    plugins.register(case.plugin, "the plugin")
    machine = case.machine()
    try:
        yield machine, plugins.settings()
    finally:
        machine.close()


def _reasons(case: BlockersCase, machine: Machine, settings: Settings) -> list[str]:
    found = hook(case.plugin, "corefw_blockers", machine=machine, settings=settings)
    if found is None:
        return []
    assert isinstance(found, Iterable), f"corefw_blockers gave {type(found).__name__}, expected a list of texts"
    assert not isinstance(found, str), "corefw_blockers gave a text, expected a list of texts"
    reasons = list(found)
    for reason in reasons:
        one_line_of_text(reason, "a reason")
    return reasons


@_KIT.check
def _come_and_go(case: BlockersCase) -> None:
    """There is no reason while nothing blocks, one as soon as something does, and none once it has ended."""
    with _guest(case) as (machine, settings):
        before = _reasons(case, machine, settings)
        assert before == [], f"nothing is in the way yet, but there are reasons: {before}"
        case.block(machine, settings)
        assert _reasons(case, machine, settings), "after block() there is no reason"
        case.unblock(machine, settings)
        after = _reasons(case, machine, settings)
        assert after == [], f"after unblock() there are still reasons: {after}"


@_KIT.check
def _distinct(case: BlockersCase) -> None:
    """Each reason is one line of text, and none is repeated."""
    with _guest(case) as (machine, settings):
        case.block(machine, settings)
        reasons = _reasons(case, machine, settings)
        assert len(set(reasons)) == len(reasons), f"a reason is there twice: {reasons}"


@_KIT.check
def _changes_nothing(case: BlockersCase) -> None:
    """Asking changes nothing: the next answer is the same, as are the guest's run state and all settings."""
    with _guest(case) as (machine, settings):
        case.block(machine, settings)

        def state() -> tuple[object, ...]:
            return machine.run_state, settings.capabilities(), settings.parameters()

        before, first = state(), _reasons(case, machine, settings)
        assert state() == before, f"asking changed {before} to {state()}"
        second = _reasons(case, machine, settings)
        assert first == second, f"asked twice, it gave {first} and {second}"


@_KIT.check
def _whatever_the_guest_does(case: BlockersCase) -> None:
    """It answers in every run state of the guest, including after the machine was closed."""
    with _guest(case) as (machine, settings):
        case.block(machine, settings)
        machine.start()
        assert machine.run_state is RunState.RUNNING or machine.run_state in DEAD
        _reasons(case, machine, settings)
        machine.stop(RunState.PAUSED)
        assert _reasons(case, machine, settings), "the guest was stopped, and no reason is left"
        machine.close()
        _reasons(case, machine, settings)


@_KIT.check
def _from_any_thread(case: BlockersCase) -> None:
    """Several threads may ask at the same time; they get the same answer."""
    with _guest(case) as (machine, settings):
        case.block(machine, settings)
        asking = [Task("asking for blockers", _reasons, case, machine, settings) for _ in range(AT_ONCE)]
        answers = [task.result() for task in asking]
        assert all(answer == answers[0] for answer in answers), f"threads got different answers: {answers}"
