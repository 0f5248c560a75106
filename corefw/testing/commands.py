"""The contract kit for the hook corefw_commands.

    from corefw.testing.commands import CHECKS, CommandsCase, check_commands

    CASE = CommandsCase(
        plugin=my_package.hooks,
        machine=lambda: MyMachine(MachineConfig()),
        calls={"x-query-finished": [{}, {"side": "destination"}]},
        refused={"x-query-finished": [{"side": "left"}]},
    )

    @pytest.mark.parametrize("check", CHECKS)
    def test_commands(check):
        check_commands(CASE, only=[check])

The commands get a KitControl: a MigrationControl without an engine, on which no migration is ever started. Each check
states one promise, and fails with an AssertionError that says in one line what is wrong. It needs no test framework.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from corefw.control import MigrationControl, MigrationReport
from corefw.dispatch import EventDispatcher, Observer
from corefw.errors import MigfwError, PluginError
from corefw.machine import Machine, RunState
from corefw.plugins import Plugins
from corefw.qmp.commands import CORE
from corefw.qmp.protocol import QmpError
from corefw.qmp.schema import Signature, signature
from corefw.settings import Settings
from corefw.states import MigrationStatus, Side
from corefw.testing.kit import Kit, hook
from corefw.testing.tasks import Task

__all__ = ["CHECKS", "CommandsCase", "KitControl", "check_commands"]

NAME: Final = re.compile(r"x-[a-z0-9]+(-[a-z0-9]+)*")
AT_ONCE: Final = 4
"""Threads that call a command at the same time."""

Arguments = Mapping[str, object]
"""The arguments of one call, by their names in QMP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandsCase:
    """The plugin to check.

    plugin    the module or object with the hook
    machine   makes the guest that the commands are about
    calls     for each command, arguments that it accepts; at least once for each
    refused   for some commands, arguments that they refuse
    """

    plugin: object
    machine: Callable[[], Machine]
    calls: Mapping[str, Sequence[Arguments]]
    refused: Mapping[str, Sequence[Arguments]] = field(default_factory=dict)


class KitControl(MigrationControl):
    """A MigrationControl without an engine: the guest and the settings are real, migrations are only recorded.

    asked    the requests in order: "migrate tcp:HOST:PORT", "cancel", ...
    events   publish events for observers here
    """

    def __init__(self, machine: Machine, settings: Settings) -> None:
        self.name = "kit"
        self.machine = machine
        self.settings = settings
        self.events: Final = EventDispatcher()
        self.asked: Final[list[str]] = []

    def status(self, side: Side) -> MigrationStatus:
        del side
        return MigrationStatus.NONE

    def report(self) -> MigrationReport:
        return MigrationReport(Side.DESTINATION, MigrationStatus.NONE)

    def observe(self, observer: Observer) -> Callable[[], None]:
        return self.events.observe(observer)

    def stop(self) -> None:
        self.asked.append("stop")
        self.machine.stop(RunState.PAUSED)

    def cont(self) -> None:
        self.asked.append("cont")
        self.machine.start()

    def migrate(self, uri: str) -> None:
        self.asked.append(f"migrate {uri}")

    def cancel(self) -> None:
        self.asked.append("cancel")

    def set_capabilities(self, changes: Mapping[str, bool]) -> None:
        self.asked.append("set_capabilities")
        self.settings.set_capabilities(changes)

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        self.asked.append("set_parameters")
        self.settings.set_parameters(changes)

    def add_blocker(self, reason: str) -> None:
        self.asked.append(f"add_blocker {reason}")

    def remove_blocker(self, reason: str) -> None:
        self.asked.append(f"remove_blocker {reason}")


_KIT: Final[Kit[CommandsCase]] = Kit()
CHECKS: Final = _KIT.checks
"""Every check by name, in the order in which they run."""


def check_commands(case: CommandsCase, *, only: Collection[str] | None = None) -> list[str]:
    """Run every check (or `only` these); the names of those that were run.

    Raises AssertionError for the first promise that is broken.
    """
    return _KIT.run(case, only)


@contextmanager
def _control(case: CommandsCase) -> Iterator[KitControl]:
    plugins = Plugins()
    plugins.register(case.plugin, "the plugin")
    machine = case.machine()
    try:
        yield KitControl(machine, plugins.settings())
    finally:
        machine.close()


def _commands(case: CommandsCase, control: MigrationControl) -> Mapping[str, Callable[..., object]]:
    found = hook(case.plugin, "corefw_commands", control=control)
    assert isinstance(found, Mapping), f"corefw_commands gave {type(found).__name__}, expected a mapping"
    return found


def _signature(name: str, function: Callable[..., object]) -> Signature:
    try:
        return signature(function)
    except PluginError as error:
        raise AssertionError(f"'{name}': {error}") from error


def _called(name: str, function: Callable[..., object], arguments: Arguments) -> object:
    """Call a command as the QMP server does. Raises AssertionError unless it returns a JSON value."""
    shown = f"{name} {json.dumps(arguments)}"
    try:
        bound: dict[str, Any] = _signature(name, function).bind(arguments)
        answer = function(**bound)
    except MigfwError as error:
        raise AssertionError(f"{shown}: expected an answer, got {type(error).__name__}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{shown} raised {type(error).__name__}: {error}") from error
    try:
        json.dumps(answer, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{shown} returned what JSON cannot say: {error}") from error
    return answer


@_KIT.check
def _names(case: CommandsCase) -> None:
    """Names begin with "x-" and are not the core's; the case has a call for each command, and for no other."""
    with _control(case) as control:
        commands = _commands(case, control)
        for name in commands:
            assert name not in CORE, f"'{name}': the core has a command of that name"
            assert NAME.fullmatch(name), f"'{name}': expected x-, then small letters, digits and single hyphens"
            assert case.calls.get(name), f"'{name}': the case has no call of it"
        unknown = {*case.calls, *case.refused} - commands.keys()
        assert not unknown, f"the case calls what is no command of the plugin: {', '.join(sorted(unknown))}"


@_KIT.check
def _schemas(case: CommandsCase) -> None:
    """Each function's signature is a schema."""
    with _control(case) as control:
        for name, function in _commands(case, control).items():
            _signature(name, function)


@_KIT.check
def _asking_does_nothing(case: CommandsCase) -> None:
    """The hook only returns functions, the same ones each time; it starts and changes nothing."""
    with _control(case) as control:
        before = (control.machine.run_state, control.settings.capabilities(), control.settings.parameters())
        first, second = set(_commands(case, control)), set(_commands(case, control))
        assert first == second, f"asked twice, it gave {sorted(first)} and {sorted(second)}"
        after = (control.machine.run_state, control.settings.capabilities(), control.settings.parameters())
        assert not control.asked and before == after, f"the hook itself did something: {control.asked or after}"


@_KIT.check
def _calls(case: CommandsCase) -> None:
    """A valid call returns a JSON value, and may be repeated."""
    with _control(case) as control:
        commands = _commands(case, control)
        for name, calls in case.calls.items():
            for arguments in (*calls, *calls):
                _called(name, commands[name], arguments)


@_KIT.check
def _refusals(case: CommandsCase) -> None:
    """An invalid call raises a MigfwError of one line; so does any call with an argument that does not exist."""
    with _control(case) as control:
        commands = _commands(case, control)
        for name, calls in case.refused.items():
            for arguments in calls:
                _refused(name, commands[name], arguments)
        for name, function in commands.items():
            form = _signature(name, function)
            if form.others is None:
                _refused(name, function, {"no-such-argument": 1})


def _refused(name: str, function: Callable[..., object], arguments: Arguments) -> None:
    shown = f"{name} {json.dumps(arguments)}"
    try:
        bound: dict[str, Any] = _signature(name, function).bind(arguments)
        answer = function(**bound)
    except QmpError:
        return
    except MigfwError as error:
        assert str(error), f"{shown} was refused without a reason"
        return
    except Exception as error:
        raise AssertionError(f"{shown}: expected a MigfwError, got {type(error).__name__}: {error}") from error
    raise AssertionError(f"{shown}: expected a MigfwError, got {answer!r}")


@_KIT.check
def _from_any_thread(case: CommandsCase) -> None:
    """Several clients may call a command at the same time."""
    with _control(case) as control:
        commands = _commands(case, control)
        for name, calls in case.calls.items():
            tasks = [
                Task(f"calling {name}", _called, name, commands[name], arguments)
                for arguments in calls
                for _ in range(AT_ONCE)
            ]
            for task in tasks:
                task.result()


@_KIT.check
def _whatever_the_guest_does(case: CommandsCase) -> None:
    """While the guest runs and after it was closed, a call returns or raises a MigfwError."""
    with _control(case) as control:
        commands = _commands(case, control)
        control.machine.start()
        for name, calls in case.calls.items():
            for arguments in calls:
                _called(name, commands[name], arguments)
        control.machine.close()
        for name, calls in case.calls.items():
            for arguments in calls:
                _returns_or_refuses(name, commands[name], arguments)


def _returns_or_refuses(name: str, function: Callable[..., object], arguments: Arguments) -> None:
    bound: dict[str, Any] = _signature(name, function).bind(arguments)
    try:
        function(**bound)
    except MigfwError:
        pass
    except Exception as error:
        raise AssertionError(f"{name} after the guest was closed raised {type(error).__name__}: {error}") from error
