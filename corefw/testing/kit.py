"""A table of checks and its runner: each check has a thread and a deadline, and must leave nothing behind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

from corefw.errors import MigfwError, PluginError
from corefw.plugins import Plugins
from corefw.testing.tasks import Possessions, Task

CHECK_DEADLINE: Final = 180.0
"""Seconds for one check."""

LETTING_GO: Final = 30.0
"""Seconds after a check for threads, descriptors and processes to go away."""

_Case = TypeVar("_Case")


class Kit(Generic[_Case]):
    """The checks of one contract kit.

    checks   every check by name, in the order in which they run
    """

    def __init__(self) -> None:
        self.checks: Final[dict[str, Callable[[_Case], None]]] = {}

    def check(self, function: Callable[[_Case], None]) -> Callable[[_Case], None]:
        """Add a check, which raises an AssertionError of one line if the promise in its docstring is broken."""
        self.checks[name_of(function)] = function
        return function

    def run(self, case: _Case, only: Collection[str] | None) -> list[str]:
        """Run every check (or `only` these); the names of those that were run.

        Raises AssertionError for the first promise that is broken.
        """
        names = chosen(self.checks, only)
        for name in names:
            before = Possessions.now()
            with naming(name):
                Task("the check", self.checks[name], case).result(CHECK_DEADLINE)
                before.assert_no_more(LETTING_GO)
        return names


def name_of(check: Callable[..., object]) -> str:
    """The name of a check, in `only` and in messages."""
    return check.__name__.removeprefix("_").replace("_", "-")


def chosen(checks: Iterable[str], only: Collection[str] | None) -> list[str]:
    """The names of the checks to run. Raises AssertionError if `only` has one that does not exist."""
    known = list(checks)
    unknown = set(only or ()) - set(known)
    assert not unknown, f"no check is called {', '.join(sorted(unknown))}: expected some of {', '.join(known)}"
    return [name for name in known if only is None or name in only]


@contextmanager
def naming(check: str) -> Iterator[None]:
    """Turn every exception in the block into an AssertionError that names the check."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{check}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{check}: {type(error).__name__}: {error}") from error


def hook(plugin: object, name: str, **arguments: object) -> object:
    """Call a plugin's hook with the arguments that it takes. Raises AssertionError if the plugin does not have the
    hook, or if pluggy would refuse it."""
    function = getattr(plugin, name, None)
    assert callable(function), f"{plugin!r} has no hook {name}"
    try:
        Plugins().register(plugin)
    except PluginError as error:
        raise AssertionError(str(error)) from error
    try:
        return function(**{one: arguments[one] for one in inspect.signature(function).parameters})
    except MigfwError:
        raise
    except Exception as error:
        raise AssertionError(f"{name} raised {type(error).__name__}: {error}") from error


def one_line_of_text(value: object, what: str) -> None:
    """Raise AssertionError unless this is a text of one printable line."""
    assert isinstance(value, str), f"{what} is {value!r}, expected a text"
    assert value.strip(), f"{what} is empty"
    assert value.isprintable(), f"{what} is {value!r}, expected one printable line"
