"""Guards around the hook implementations of plugins.

Pluggy's own caller calls the hooks, so hook wrappers, `tryfirst`, `trylast` and tracing work as pluggy documents them.
It does not say which plugin raised an error, and it ends the call at the first one. So each plugin is registered with
pluggy as an object of guards, one around each of its implementations. A guard names the plugin in every error, checks
what the plugin returns, and where the hook promises it keeps a failure from silencing the others (RULES).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, Final, cast

import pluggy

from corefw import hookspecs
from corefw.channel import Transport
from corefw.declarations import Declarations
from corefw.errors import FOREIGN, MigfwError, PluginError, described
from corefw.section import SectionLoader, SectionSaver

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PluginCommand:
    """A QMP command, and the plugin that adds it."""

    plugin: str
    function: Callable[..., object]


def guarded(plugin: object, name: str, manager: pluggy.PluginManager) -> object:
    """What to register with pluggy in place of a plugin. Raises PluginError for a wrapper that cannot be one."""
    guards = _Guards(plugin)
    for attribute in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, attribute)
        if options is None:
            continue
        function: Callable[..., Any] = getattr(plugin, attribute)
        implementation = _Implementation(name, options.get("specname") or attribute, function)
        if not (options.get("wrapper") or options.get("hookwrapper")):
            guard = implementation.guard()
        elif options.get("hookwrapper") or not inspect.isgeneratorfunction(function):
            raise PluginError(f"{implementation} is no hook wrapper: expected a generator with hookimpl(wrapper=True)")
        else:
            guard = implementation.wrapper_guard()
        setattr(guards, attribute, pluggy.HookimplMarker(hookspecs.PROJECT)(guard, **options))
    return guards


def call(what: str, function: Callable[..., object], *arguments: object) -> object:
    """Call a plugin. A MigfwError goes through; anything else that it raises becomes a PluginError naming `what`."""
    try:
        return function(*arguments)
    except MigfwError:
        raise
    except FOREIGN as error:
        raise PluginError(f"{what} failed: {described(error)}") from error


@contextmanager
def passed_over() -> Iterator[list[PluginError]]:
    """A list of the plugins that fail during a call of corefw_transport: they count as not having the scheme."""
    failed: list[PluginError] = []
    token = _PASSED_OVER.set(failed)
    try:
        yield failed
    finally:
        _PASSED_OVER.reset(token)


class _Guards:
    """Stands for a plugin in pluggy's eyes: has a guard for each of its hook implementations."""

    def __init__(self, plugin: object) -> None:
        self._plugin = plugin

    def __repr__(self) -> str:
        return repr(self._plugin)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What holds for the implementations of one hook.

    check    gives an answer in the form in which the others see it, or raises PluginError naming the plugin
    failed   gives the answer of an implementation that raised a MigfwError, or raises that
    first    the hook ends at the first answer that is not None (pluggy's firstresult)
    """

    check: Callable[[_Implementation, Any], Any]
    failed: Callable[[_Implementation, MigfwError], Any]
    first: bool = False


@dataclass(frozen=True, slots=True)
class _Implementation:
    """One plugin's implementation of one hook."""

    plugin: str
    hook: str
    function: Callable[..., Any]

    def __str__(self) -> str:
        return f"plugin '{self.plugin}' ({self.hook})"

    def guard(self) -> Callable[..., object]:
        @wraps(self.function)
        def guard(*arguments: object) -> object:
            rule = RULES[self.hook]
            try:
                return rule.check(self, call(str(self), self.function, *arguments))
            except MigfwError as error:
                return rule.failed(self, error)

        return guard

    def wrapper_guard(self) -> Callable[..., Generator[None, Any, object]]:
        @wraps(self.function)
        def guard(*arguments: object) -> Generator[None, Any, object]:
            rule = RULES[self.hook]
            wrapper: Generator[None, Any, object] = self.function(*arguments)
            try:
                call(str(self), _begin, wrapper)
            except MigfwError as error:
                return _extended((yield), rule.failed(self, error))
            inner, raised = None, None
            try:
                inner = yield
            except MigfwError as error:  # it names the plugin that it comes from
                raised = error
            try:
                return self._resumed(wrapper, inner, raised)
            except MigfwError as error:
                if error is raised:
                    raise
                answer = rule.failed(self, error)
            if raised is not None:
                raise raised
            return _extended(inner, answer)

        return guard

    def _resumed(self, wrapper: Generator[None, Any, object], inner: object, raised: MigfwError | None) -> object:
        """What a wrapper makes of the outcome of the implementations inside it. Raises MigfwError."""
        try:
            if raised is None:
                wrapper.send(inner)
            else:
                wrapper.throw(raised)
        except StopIteration as end:
            return self._checked(end.value)
        except MigfwError:
            raise
        except FOREIGN as error:
            raise PluginError(f"{self} failed: {described(error)}") from error
        raise PluginError(f"{self} failed: a hook wrapper has to yield once")

    def _checked(self, result: object) -> object:
        rule = RULES[self.hook]
        if rule.first:
            return rule.check(self, result)
        if not isinstance(result, list):
            raise PluginError(f"{self} gave {type(result).__name__}, expected the list of results")
        return [rule.check(self, answer) for answer in result if answer is not None]


def _begin(wrapper: Generator[None, Any, object]) -> None:
    if next(wrapper, _ENDED) is _ENDED:
        raise TypeError("a hook wrapper has to yield once")


_ENDED: Final = object()


def _extended(results: Any, answer: object) -> object:
    return results if answer is None else [*results, answer]


# -- what holds for each hook ------------------------------------------------------------------------------------------


_PASSED_OVER: Final[ContextVar[list[PluginError]]] = ContextVar("passed over")
"""Failures during the present call of corefw_transport."""


def _raise(_: _Implementation, error: MigfwError) -> None:
    raise error


def _log(by: _Implementation, error: MigfwError) -> None:
    log.error("plugin '%s' failed in %s: %s", by.plugin, by.hook, error, exc_info=error)


def _pass_over(_: _Implementation, error: MigfwError) -> None:
    if not isinstance(error, PluginError):
        raise error
    _PASSED_OVER.get().append(error)


def _transport(by: _Implementation, answer: object) -> Transport | None:
    if isinstance(answer, Transport | None):
        return answer
    raise _gave(by, answer, "a Transport")


def _declarations(by: _Implementation, answer: object) -> Declarations:
    if isinstance(answer, Declarations):
        return answer
    raise _gave(by, answer, "Declarations")


def _commands(by: _Implementation, answer: object) -> dict[str, PluginCommand] | None:
    if answer is None:
        return None
    if not isinstance(answer, Mapping):
        raise _gave(by, answer, "a mapping")
    return {
        name: one if isinstance(one, PluginCommand) else PluginCommand(by.plugin, one) for name, one in answer.items()
    }


def _listed(by: _Implementation, answer: object) -> list[object] | None:
    """The items of an answer. Generators run here, so that their errors have a name."""
    if answer is None:
        return None
    if not isinstance(answer, Iterable) or isinstance(answer, str):
        raise _gave(by, answer, "a list")
    items: Iterable[object] = answer
    return cast("list[object]", call(str(by), list, items))


def _list_of(kind: type) -> Callable[[_Implementation, object], list[object] | None]:
    def check(by: _Implementation, answer: object) -> list[object] | None:
        found = _listed(by, answer)
        for item in found or ():
            if not isinstance(item, kind):
                raise PluginError(f"plugin '{by.plugin}': {item!r} is not a {kind.__name__}")
        return found

    return check


def _gave(by: _Implementation, answer: object, expected: str) -> PluginError:
    return PluginError(f"{by} gave {type(answer).__name__}, expected {expected}")


RULES: Final[Mapping[str, _Rule]] = {
    "corefw_transport": _Rule(_transport, _pass_over, first=True),
    "corefw_section_savers": _Rule(_list_of(SectionSaver), _raise),
    "corefw_section_loaders": _Rule(_list_of(SectionLoader), _raise),
    "corefw_blockers": _Rule(_listed, lambda _, error: [str(error)]),
    "corefw_settings": _Rule(_declarations, _raise),
    "corefw_state_changed": _Rule(lambda _by, _answer: None, _log),
    "corefw_commands": _Rule(_commands, _log),
}
