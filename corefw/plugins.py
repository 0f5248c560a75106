"""Finds plugins and asks them. The only importer of pluggy and stevedore, beside the hook specs.

The law: stevedore for one name and one driver (a scheme, a machine), imported only when asked for; pluggy for many
implementers. A plugin that fails to load is remembered with its reason and takes nobody down.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pluggy
from stevedore import driver, extension
from stevedore.exception import NoMatches

from corefw import hookspecs
from corefw.channel import Transport
from corefw.errors import MigfwError, PluginError, UriError, UsageError
from corefw.machine import Machine, MachineConfig
from corefw.section import SectionHandler, SectionRegistry
from corefw.settings import Settings
from corefw.states import MigrationStatus, Side
from corefw.uri import MigrationUri

if TYPE_CHECKING:
    from corefw.engine import Engine

TRANSPORTS: Final = "corefw.transport"
MACHINES: Final = "corefw.machine"
PLUGINS: Final = "corefw.plugins"
GROUPS: Final = (TRANSPORTS, MACHINES, PLUGINS)

_T = TypeVar("_T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One installed entry point. `error` is None when it loads."""

    group: str
    name: str
    target: str
    distribution: str
    version: str
    error: str | None


class _EntryPointTransports:
    """The core's own plugin: a scheme is an entry point."""

    @hookspecs.hookimpl
    def corefw_transport(self, uri: MigrationUri) -> Transport | None:
        factory = _driver(TRANSPORTS, uri.scheme)
        return None if factory is None else _made(factory, uri, Transport, f"transport '{uri.scheme}'")


class Plugins:
    """Every plugin of this process. Make one with `Plugins.load()`."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._manager.register(_EntryPointTransports(), "corefw:entry-point-transports")
        self.failures: dict[str, str] = {}

    @classmethod
    def load(cls) -> Plugins:
        """Load everything in the group `corefw.plugins`."""
        plugins = cls()
        found = extension.ExtensionManager(
            PLUGINS,
            invoke_on_load=False,
            on_load_failure_callback=plugins._failed,
        )
        for one in found:
            plugins._register(one.name, one.plugin)
        return plugins

    def register(self, plugin: object, name: str | None = None) -> None:
        """Add a plugin from inside a program. Raises PluginError for a hook that does not exist, a name taken twice."""
        registered = self._manager.register(plugin, name)
        if registered is None:
            raise PluginError(f"a plugin with the name '{name}' is registered already")
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            self._manager.unregister(plugin)
            raise PluginError(f"plugin '{registered}': {error}") from None

    def _register(self, name: str, plugin: object) -> None:
        try:
            self.register(plugin, name)
        except (PluginError, ValueError, pluggy.PluginValidationError) as error:
            self.failures[name] = str(error)
            log.warning("plugin '%s' is left out: %s", name, error)

    def _failed(self, _manager: object, entry_point: EntryPoint, error: BaseException) -> None:
        self.failures[entry_point.name] = f"{type(error).__name__}: {error}"
        log.warning("plugin '%s' failed to load: %s", entry_point.name, error)

    # -- one name, one driver --------------------------------------------------------------------------------------

    def transport(self, uri: MigrationUri | str) -> Transport:
        """The transport for a URI. Raises UriError (nobody knows the scheme; the rest is wrong), PluginError."""
        parsed = MigrationUri.parse(uri) if isinstance(uri, str) else uri
        transport = self._manager.hook.corefw_transport(uri=parsed)
        if transport is None:
            known = ", ".join(sorted({point.name for point in entry_points(group=TRANSPORTS)})) or "none"
            raise UriError(f"'{parsed}': no installed plugin has the scheme '{parsed.scheme}' (installed: {known})")
        assert isinstance(transport, Transport)
        return transport

    def machine(self, kind: str, config: MachineConfig) -> Machine:
        """Make a machine of this kind. Raises UsageError (unknown kind, wrong options), MachineError."""
        factory = _driver(MACHINES, kind)
        if factory is None:
            known = ", ".join(sorted({point.name for point in entry_points(group=MACHINES)})) or "none"
            raise UsageError(f"no installed plugin has a machine '{kind}' (installed: {known})")
        return _made(factory, config, Machine, f"machine '{kind}'")

    # -- many implementers -----------------------------------------------------------------------------------------

    def settings(self) -> Settings:
        """The table of all settings that the core and the plugins declare, at their defaults."""
        return Settings(self._manager.hook.corefw_settings())

    def section_handlers(self, machine: Machine, settings: Settings) -> SectionRegistry:
        registry = SectionRegistry()
        for handlers in reversed(self._manager.hook.corefw_section_handlers(machine=machine, settings=settings)):
            for handler in handlers:
                if not isinstance(handler, SectionHandler):
                    raise PluginError(f"{handler!r} is no SectionHandler: corefw_section_handlers has to return those")
                registry.add(handler)
        return registry

    def blockers(self, machine: Machine, settings: Settings) -> list[str]:
        found = self._manager.hook.corefw_blockers(machine=machine, settings=settings)
        return [reason for reasons in reversed(found) for reason in reasons]

    def state_changed(self, side: Side, old: MigrationStatus, new: MigrationStatus) -> None:
        """Tell every observer; one that raises is logged and does not keep the others from hearing it."""
        for implementation in self._manager.hook.corefw_state_changed.get_hookimpls():
            arguments = {"side": side, "old": old, "new": new}
            try:
                implementation.function(*(arguments[name] for name in implementation.argnames))
            except Exception:
                log.exception("plugin '%s' failed in corefw_state_changed", implementation.plugin_name)

    def commands(self, engine: Engine) -> dict[str, Callable[..., object]]:
        merged: dict[str, Callable[..., object]] = {}
        commands: Mapping[str, Callable[..., object]]
        for commands in reversed(self._manager.hook.corefw_commands(engine=engine)):
            merged.update(commands)
        return merged

    # -- what is there ---------------------------------------------------------------------------------------------

    def inventory(self) -> Iterator[PluginInfo]:
        """Every installed entry point, loaded to see whether it does."""
        for group in GROUPS:
            for point in sorted(entry_points(group=group), key=lambda point: point.name):
                error = self.failures.get(point.name) if group == PLUGINS else _load_error(point)
                name, version = (point.dist.name, point.dist.version) if point.dist else ("?", "?")
                yield PluginInfo(group, point.name, point.value, name, version, error)


def _load_error(point: EntryPoint) -> str | None:
    try:
        point.load()
    except Exception as error:  # a plugin may fail in any way; that is what is asked here
        return f"{type(error).__name__}: {error}"
    return None


def _driver(group: str, name: str) -> Callable[[Any], object] | None:
    """The object behind one entry point; None when nobody has that name. Raises PluginError when it does not load."""
    try:
        # `.driver` would give the class where an instance is falsy, so the factory is called here, not by stevedore.
        found = driver.DriverManager(group, name, invoke_on_load=False, on_load_failure_callback=_raise)
    except NoMatches:
        return None
    factory: Callable[[Any], object] = found.driver
    return factory


def _raise(_manager: object, entry_point: EntryPoint, error: BaseException) -> None:
    raise PluginError(f"plugin '{entry_point.name}' ({entry_point.value}) failed to load: {error}") from error


def _made(factory: Callable[[Any], object], argument: object, kind: type[_T], what: str) -> _T:
    try:
        made = factory(argument)
    except MigfwError:
        raise
    except Exception as error:
        raise PluginError(f"{what} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        raise PluginError(f"{what} made a {type(made).__name__}, expected a {kind.__name__}")
    return made
