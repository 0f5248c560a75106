"""The contract kit for the hook corefw_settings.

    from corefw.testing.settings import CHECKS, check_settings

    @pytest.mark.parametrize("check", CHECKS)
    def test_settings(check):
        check_settings(my_package.hooks, only=[check])

`check_settings` takes the plugin: the module or object with the hooks. Each check states one promise, and fails with an
AssertionError that says in one line what is wrong. It needs no test framework.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from corefw.declarations import Capability, Declarations, Kind, Parameter
from corefw.errors import SettingsError
from corefw.settings import Settings
from corefw.testing.kit import Kit, hook, one_line_of_text

__all__ = ["CHECKS", "check_settings"]

_KIT: Final[Kit[object]] = Kit()
CHECKS: Final = _KIT.checks
"""Every check by name, in the order in which they run."""

NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def check_settings(plugin: object, *, only: Collection[str] | None = None) -> list[str]:
    """Run every check (or `only` these); the names of those that were run.

    Raises AssertionError for the first promise that is broken.
    """
    return _KIT.run(plugin, only)


def _declared(plugin: object) -> Declarations:
    found = hook(plugin, "corefw_settings")
    assert isinstance(found, Declarations), f"corefw_settings gave {type(found).__name__}, expected Declarations"
    return found


def _entries(declared: Declarations) -> list[Capability | Parameter]:
    return [*declared.capabilities, *declared.parameters]


@_KIT.check
def _declarations(plugin: object) -> None:
    """The hook returns Declarations that fit the core's tables, the same ones each time."""
    declared = _declared(plugin)
    again = _declared(plugin)
    for what in ("capabilities", "parameters", "implements"):
        one, other = getattr(declared, what), getattr(again, what)
        assert one == other, f"asked twice, corefw_settings gave other {what}: {one} and {other}"
    Settings([declared])


@_KIT.check
def _names(plugin: object) -> None:
    """Names are lower case with hyphens, and begin with "x-", because a later QEMU may use any other name."""
    for entry in _entries(_declared(plugin)):
        for name in (entry.name, *entry.aliases):
            assert NAME.fullmatch(name), f"'{name}': expected small letters, digits and single hyphens"
        assert entry.name.startswith("x-"), f"'{entry.name}': expected a name that begins with x-"


@_KIT.check
def _help(plugin: object) -> None:
    """Each setting has a help text of one line."""
    for entry in _entries(_declared(plugin)):
        one_line_of_text(entry.help, f"the help of '{entry.name}'")


@_KIT.check
def _implemented(plugin: object) -> None:
    """The plugin implements what it adds: a setting that no plugin implements cannot be used."""
    declared = _declared(plugin)
    left = [entry.name for entry in _entries(declared) if entry.name not in declared.implements]
    assert not left, f"added, but not in `implements`: {', '.join(left)}"


@_KIT.check
def _defaults(plugin: object) -> None:
    """Each parameter's range makes sense, and its default is in it."""
    for one in _declared(plugin).parameters:
        assert one.minimum <= one.maximum, f"'{one.name}' has a range from {one.minimum} to {one.maximum}"
        if one.kind is Kind.CHOICE:
            assert one.choices, f"'{one.name}' is a choice of nothing"
        try:
            value = one.check(one.default)
        except SettingsError as error:
            raise AssertionError(f"the default of '{one.name}' is refused: {error}") from error
        assert value == one.default, f"the default of '{one.name}' is {one.default!r}, but checked it is {value!r}"


@_KIT.check
def _cross_checks(plugin: object) -> None:
    """Checks across settings accept the defaults. For any values they return None or a phrase, and raise nothing."""
    declared = _declared(plugin)
    settings = Settings([declared])
    for number, check in enumerate(declared.checks):
        why = check(settings.capabilities(), settings.parameters())
        assert why is None, f"check {number} refuses the defaults: {why}"
        for name in settings.capabilities():
            refusal = check(settings.capabilities() | {name: True}, settings.parameters())
            if refusal is not None:
                one_line_of_text(refusal, f"what check {number} says of '{name}'")
