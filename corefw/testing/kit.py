"""A table of checks, and what runs them: each in a thread with a deadline, with a look at what it leaves behind."""

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
"""Seconds after it for threads, descriptors and processes to go away."""

_Case = TypeVar("_Case")


class Kit(Generic[_Case]):
    """The checks of one contract kit.

    checks   every check by name, in the order in which they run
    """

    def __init__(self) -> None:
        self.checks: Final[dict[str, Callable[[_Case], None]]] = {}

    def check(self, function: Callable[[_Case], None]) -> Callable[[_Case], None]:
        """Enter a check. It raises AssertionError, in one line, if the promise in its docstring is broken."""
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
    """The name of a check, as `only` and messages have it."""
    return check.__name__.removeprefix("_").replace("_", "-")


def chosen(checks: Iterable[str], only: Collection[str] | None) -> list[str]:
    """The names of the checks to run. Raises AssertionError if `only` has one that does not exist."""
    known = list(checks)
    unknown = set(only or ()) - set(known)
    assert not unknown, f"no check is called {', '.join(sorted(unknown))}: expected some of {', '.join(known)}"
    return [name for name in known if only is None or name in only]


@contextmanager
def naming(check: str) -> Iterator[None]:
    """Let every exception in the block become an AssertionError that names the check."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{check}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{check}: {type(error).__name__}: {error}") from error


def hook(plugin: object, name: str, **arguments: object) -> object:
    """What a plugin's hook returns, given the arguments that it takes. Raises AssertionError if it has no such hook, or
    what pluggy would refuse."""
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
