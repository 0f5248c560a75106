"""The contract kits for settings, blockers and commands catch every way to break a contract; good plugins pass.

Each broken plugin is a good one with one thing changed; the kit has to name that thing, in the check made for it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import pytest

from corefw.control import MigrationControl
from corefw.declarations import Capability, Declarations, Kind, Parameter
from corefw.errors import StateError
from corefw.hookspecs import hookimpl
from corefw.machine import Machine, RunState
from corefw.settings import Settings
from corefw.testing import blockers, commands, settings
from corefw.testing.blockers import BlockersCase, check_blockers
from corefw.testing.commands import CommandsCase, check_commands
from corefw.testing.settings import check_settings
from tests.helpers.machines import CountingMachine

NIGHT = Capability("x-night-only", "migrate at night only")
BEGINS = Parameter("x-night-begins", Kind.INTEGER, 22, "the hour at which night begins", 0, 23)
OWN = frozenset({"x-night-only", "x-night-begins"})


def plugin(**hooks: Callable[..., object]) -> object:
    class Plugin:
        pass

    made = Plugin()
    for name, function in hooks.items():
        setattr(made, name, hookimpl(function))
    return made


class Guest(CountingMachine):
    closed = False

    def close(self) -> None:
        super().close()
        self.closed = True


def machine() -> Guest:
    return Guest(pages=16)


def broken(run: Callable[[], object]) -> str:
    with pytest.raises(AssertionError) as caught:
        run()
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- settings ------------------------------------------------------------------------------------------------------


def declared(**changes: Any) -> object:
    whole: dict[str, Any] = {"capabilities": (NIGHT,), "parameters": (BEGINS,), "implements": OWN} | changes
    return plugin(corefw_settings=lambda: Declarations(**whole))


@pytest.mark.parametrize("check", settings.CHECKS)
def test_good_settings_pass(check: str) -> None:
    night = declared(checks=(lambda enabled, _: "not with events" if enabled["events"] else None,))
    assert check_settings(night, only=[check]) == [check]


numbers = itertools.count()

SETTINGS: Mapping[str, tuple[object, str, str]] = {
    "no hook": (plugin(), "declarations", "has no hook corefw_settings"),
    "no declarations": (plugin(corefw_settings=lambda: None), "declarations", "gave NoneType, expected Declarations"),
    "a bug": (plugin(corefw_settings=lambda: 1 // 0), "declarations", "failed: ZeroDivisionError"),
    "other ones each time": (
        plugin(corefw_settings=lambda: Declarations((Capability(f"x-{next(numbers)}", "more"),))),
        "declarations",
        "asked twice, corefw_settings gave other capabilities",
    ),
    "a name of the core's": (
        declared(capabilities=(NIGHT, Capability("events", "again"))),
        "declarations",
        "'events' is declared by two plugins",
    ),
    "capital letters": (declared(capabilities=(Capability("x-Night", "no"),)), "declarations", "no plugin declares"),
    "a name with underscores": (
        declared(capabilities=(Capability("x_night", "no"),), implements=frozenset({"x_night"})),
        "names",
        "'x_night': expected small letters, digits and single hyphens",
    ),
    "a name that may be QEMU's": (
        declared(capabilities=(Capability("night", "no"),), implements=frozenset({"night"})),
        "names",
        "'night': expected a name that begins with x-",
    ),
    "no help": (
        declared(capabilities=(Capability("x-night-only", ""),)),
        "help",
        "the help of 'x-night-only' is empty",
    ),
    "help of two lines": (
        declared(capabilities=(Capability("x-night-only", "one\ntwo"),)),
        "help",
        "expected one printable line",
    ),
    "nothing implemented": (declared(implements=frozenset()), "implemented", "x-night-only, x-night-begins"),
    "a default out of range": (
        declared(parameters=(Parameter("x-night-begins", Kind.INTEGER, 24, "too late", 0, 23),)),
        "defaults",
        "the default of 'x-night-begins' is refused: parameter 'x-night-begins' expects an integer from 0 to 23",
    ),
    "an empty range": (
        declared(parameters=(Parameter("x-night-begins", Kind.INTEGER, 2, "none", 3, 1),)),
        "defaults",
        "'x-night-begins' has a range from 3 to 1",
    ),
    "a choice of nothing": (
        declared(parameters=(Parameter("x-night-begins", Kind.CHOICE, "late", "none"),)),
        "defaults",
        "'x-night-begins' is a choice of nothing",
    ),
    "a check that refuses the defaults": (
        declared(checks=(lambda *_: "never",)),
        "cross-checks",
        "check 0 refuses the defaults: never",
    ),
    "a check that raises": (
        declared(checks=(lambda enabled, _: 1 // 0 if enabled["events"] else None,)),
        "cross-checks",
        "ZeroDivisionError",
    ),
    "a check that says True": (
        declared(checks=(lambda enabled, _: True if enabled["events"] else None,)),
        "cross-checks",
        "what check 0 says of 'events' is True, expected a text",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_broken_settings_are_caught(case: str) -> None:
    bad, check, message = SETTINGS[case]
    said = broken(lambda: check_settings(bad, only=[check]))
    assert said.startswith(f"{check}: ") and message in said, said


# -- blockers ------------------------------------------------------------------------------------------------------


def attached(machine: Machine) -> list[str]:
    return ["'grid' is attached to a GPU (detach it first)"] if getattr(machine, "attached", False) else []


def attach(machine: Machine, _: Settings, *, value: bool = True) -> None:
    cast("Any", machine).attached = value


def blocking(corefw_blockers: Callable[..., object]) -> BlockersCase:
    return BlockersCase(
        plugin=plugin(corefw_blockers=corefw_blockers),
        machine=machine,
        block=attach,
        unblock=lambda machine, given: attach(machine, given, value=False),
    )


@pytest.mark.parametrize("check", blockers.CHECKS)
def test_good_blockers_pass(check: str) -> None:
    def lazily(machine: Machine) -> Iterable[str]:
        yield from attached(machine)

    for hook in (attached, lazily, lambda machine: attached(machine) or None):
        assert check_blockers(blocking(hook), only=[check]) == [check]


def stops_the_guest(machine: Machine) -> list[str]:
    machine.set_run_state(RunState.PAUSED)
    return attached(machine)


def while_it_lives(machine: Machine) -> list[str]:
    if machine.run_state in (RunState.SHUTDOWN, RunState.RUNNING):
        raise RuntimeError("it moves")
    return attached(machine)


def busy() -> Callable[[Machine], list[str]]:
    """Refuses to be asked by two threads at once."""
    free, both = threading.Lock(), threading.Barrier(2)

    def ask(machine: Machine) -> list[str]:
        if threading.current_thread().name.startswith("kit: asking"):
            both.wait(20)
            if not free.acquire(blocking=False):
                return ["busy"]
        return attached(machine)

    return ask


BLOCKERS: Mapping[str, tuple[Callable[..., object], str, str]] = {
    "always": (lambda: ["never mind"], "come-and-go", "nothing is in the way yet, but there are reasons"),
    "never": (lambda machine: [], "come-and-go", "after block() there is no reason"),
    "a text": (lambda machine: "no" if attached(machine) else [], "come-and-go", "gave a text, expected a list"),
    "a number": (lambda: 5, "come-and-go", "gave int, expected a list of texts"),
    "a bug": (lambda: 1 // 0, "come-and-go", "corefw_blockers raised ZeroDivisionError"),
    "no text": (lambda machine: attached(machine) and [5], "distinct", "a reason is 5, expected a text"),
    "an empty text": (lambda machine: attached(machine) and [""], "distinct", "a reason is empty"),
    "two lines": (lambda machine: attached(machine) and ["a\nb"], "distinct", "expected one printable line"),
    "twice": (lambda machine: attached(machine) * 2, "distinct", "a reason is there twice"),
    "it stops the guest": (stops_the_guest, "changes-nothing", "asking changed"),
    "another one each time": (
        lambda machine: attached(machine) and [f"reason {next(numbers)}"],
        "changes-nothing",
        "asked twice, it gave",
    ),
    "not while it runs": (while_it_lives, "whatever-the-guest-does", "raised RuntimeError: it moves"),
    "not at the same time": (busy(), "from-any-thread", "threads got different answers"),
}


@pytest.mark.parametrize("case", BLOCKERS)
def test_broken_blockers_are_caught(case: str) -> None:
    hook, check, message = BLOCKERS[case]
    said = broken(lambda: check_blockers(blocking(hook), only=[check]))
    assert said.startswith(f"{check}: ") and message in said, said


# -- commands ------------------------------------------------------------------------------------------------------


def journal(control: MigrationControl) -> Mapping[str, Callable[..., object]]:
    def x_journal(limit: int = 10) -> list[str]:
        if limit < 0:
            raise StateError(f"limit {limit} is negative: expected 0 or more")
        return [str(control.machine.run_state)][:limit]

    return {"x-journal": x_journal}


Calls = Mapping[str, Sequence[Mapping[str, object]]]
CALLS: Calls = {"x-journal": [{}, {"limit": 1}]}


def commanding(
    corefw_commands: Callable[..., object], calls: Calls = CALLS, refused: Calls | None = None
) -> CommandsCase:
    return CommandsCase(
        plugin=plugin(corefw_commands=corefw_commands),
        machine=machine,
        calls=calls,
        refused={"x-journal": [{"limit": -1}, {"limit": "x"}]} if refused is None else refused,
    )


@pytest.mark.parametrize("check", commands.CHECKS)
def test_good_commands_pass(check: str) -> None:
    assert check_commands(commanding(journal), only=[check]) == [check]


def one(function: Callable[..., object], name: str = "x-journal") -> Callable[..., object]:
    return lambda: {name: function}


def hasty(control: MigrationControl) -> Mapping[str, Callable[..., object]]:
    control.cancel()
    return journal(control)


def positional(*values: int) -> int:
    return len(values)


def crashes(limit: int = 0) -> int:
    return 1 // limit


def once() -> Callable[[], int]:
    left = [1]
    return lambda: left.pop()


def while_it_is_there(control: MigrationControl) -> Mapping[str, Callable[..., object]]:
    def x_journal() -> int:
        if getattr(control.machine, "closed", False):
            raise RuntimeError("gone")
        return 1

    return {"x-journal": x_journal}


COMMANDS: Mapping[str, tuple[CommandsCase, str, str]] = {
    "no mapping": (commanding(lambda: ["x-journal"]), "names", "gave list, expected a mapping"),
    "a bug": (commanding(lambda: 1 // 0), "names", "corefw_commands raised ZeroDivisionError"),
    "the core's name": (commanding(one(len, "stop"), {"stop": [{}]}), "names", "the core has a command of that name"),
    "no x-": (commanding(one(len, "journal"), {"journal": [{}]}), "names", "'journal': expected x-"),
    "never called": (commanding(journal, {}), "names", "the case has no call of it"),
    "not there": (commanding(journal, {**CALLS, "x-other": [{}]}), "names", "no command of the plugin: x-other"),
    "no schema": (commanding(one(positional)), "schemas", "is not a valid command schema"),
    "it acts at once": (
        commanding(hasty),
        "asking-does-nothing",
        "hook itself did something: ['cancel', 'cancel']",
    ),
    "it crashes": (commanding(one(crashes)), "calls", "x-journal {} raised ZeroDivisionError"),
    "no JSON": (commanding(one(lambda: {1, 2}), {"x-journal": [{}]}), "calls", "returned what JSON cannot say"),
    "only once": (commanding(one(once()), {"x-journal": [{}]}), "calls", "raised IndexError"),
    "it refuses what is right": (
        commanding(journal, {"x-journal": [{"limit": -1}]}),
        "calls",
        'x-journal {"limit": -1}: expected an answer, got StateError',
    ),
    "it takes what is wrong": (
        commanding(journal, refused={"x-journal": [{"limit": 1}]}),
        "refusals",
        'x-journal {"limit": 1}: expected a MigfwError, got',
    ),
    "it crashes on what is wrong": (
        commanding(one(crashes), refused={"x-journal": [{"limit": 0}]}),
        "refusals",
        "expected a MigfwError, got ZeroDivisionError",
    ),
    "not of the guest that ended": (
        commanding(while_it_is_there, {"x-journal": [{}]}),
        "whatever-the-guest-does",
        "x-journal after the guest was closed raised RuntimeError: gone",
    ),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_broken_commands_are_caught(case: str) -> None:
    bad, check, message = COMMANDS[case]
    said = broken(lambda: check_commands(bad, only=[check]))
    assert said.startswith(f"{check}: ") and message in said, said


@pytest.mark.parametrize("run", [check_settings, check_blockers, check_commands])
def test_a_check_that_does_not_exist(run: Callable[..., object]) -> None:
    with pytest.raises(AssertionError, match="no check is called nothing: expected some of"):
        run(None, only=["nothing"])
