"""Every plugin of this process: loaded, and called through its hooks.

A plugin that fails to load is remembered with its reason and does not stop the others, but it blocks migrations. One
that fails when it is called is named in the error (hookcalls.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import pluggy

from corefw import entrypoints, hookspecs
from corefw.channel import Transport, TransportContext
from corefw.declarations import Declarations
from corefw.entrypoints import GROUPS, MACHINES, PLUGINS, TRANSPORTS, EntryPoints
from corefw.errors import (
    FOREIGN,
    MigfwError,
    PluginError,
    SettingsError,
    UriError,
    UsageError,
    described,
    did_you_mean,
    one_line,
)
from corefw.hookcalls import PluginCommand, call, guarded, passed_over
from corefw.machine import Machine, MachineConfig
from corefw.registry import LoaderRegistry, SaverRegistry
from corefw.section import SectionLoader, SectionSaver
from corefw.settings import Settings
from corefw.states import MigrationStatus, Side
from corefw.uri import MigrationUri

if TYPE_CHECKING:
    from corefw.control import MigrationControl

_ADDITIONS: Final = {
    "corefw_transport": "transports",
    "corefw_section_savers": "section savers",
    "corefw_section_loaders": "section loaders",
    "corefw_blockers": "blockers",
    "corefw_state_changed": "an observer of statuses",
    "corefw_commands": "QMP commands",
}
"""What a plugin adds by implementing a hook."""

HOOKS: Final = tuple(sorted(name for name in vars(hookspecs) if name.startswith("corefw_")))
"""The names of all hooks."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One installed entry point. `error` is None when it loads; `adds` are phrases, for the group `corefw.plugins`."""

    group: str
    name: str
    target: str
    distribution: str
    version: str
    error: str | None
    adds: tuple[str, ...] = ()


class Plugins:
    """Every plugin of this process. Make one with `Plugins.load()`.

    failures   "name = target" of each entry point in `corefw.plugins` that was left out -> why
    """

    def __init__(self) -> None:
        self._entry_points = EntryPoints()
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        if log.isEnabledFor(logging.DEBUG):
            self._manager.trace.root.setwriter(lambda text: log.debug("%s", text.rstrip()))
            self._manager.enable_tracing()
        self._plugins: dict[str, object] = {}
        self._declarations: dict[str, Declarations] = {}
        self.failures: dict[str, str] = {}
        self.register(_EntryPointTransports(self._entry_points), "corefw:entry-point-transports")

    @classmethod
    def load(cls) -> Plugins:
        """Load everything in the group `corefw.plugins`. Does not raise for a plugin.

        Pluggy calls the plugin that was registered last first. So they are registered from last to first, and hooks are
        called in the order of the names.
        """
        plugins = cls()
        for point in sorted(plugins._entry_points.group(PLUGINS), key=lambda point: point.name, reverse=True):
            try:
                plugins.register(entrypoints.load(point), point.name)
            except PluginError as error:
                plugins.failures[entrypoints.line(point)] = str(error)
                log.warning("%s; it is left out", error)
        return plugins

    def register(self, plugin: object, name: str | None = None) -> None:
        """Add a plugin from inside a program. All or nothing.

        Raises PluginError for a hook that does not exist or takes other arguments, a name or plugin that is registered
        already, and declarations that do not go with those of the others.
        """
        if plugin is None or isinstance(plugin, type):
            raise PluginError(f"plugin '{name}' is {plugin!r}: expected a module or an object with hooks, not a class")
        name = name or str(self._manager.get_canonical_name(plugin))
        if name in self._plugins or any(plugin is one for one in self._plugins.values()):
            raise PluginError(f"plugin '{name}' is already registered: choose another name for this one")
        guards = None
        try:
            guards = guarded(plugin, name, self._manager)
            self._manager.register(guards, name)
            self._manager.check_pending()
            self._declare(name, guards)
        except (pluggy.PluginValidationError, MigfwError) as error:
            if guards is not None and self._manager.has_plugin(name):
                self._manager.unregister(guards, name)
            text = one_line(str(error))
            named = "" if text.startswith(f"plugin '{name}'") else f"plugin '{name}': "
            raise PluginError(f"{named}{text}{_nearest_hook(plugin)}") from None
        self._plugins[name] = plugin

    def _declare(self, name: str, guards: object) -> None:
        """Ask a new plugin for its settings and see whether they go with the others'. Wrappers of plugins that were
        registered before it see its answer."""
        declaring = [one.plugin for one in self._manager.hook.corefw_settings.get_hookimpls() if not one.wrapper]
        if guards not in declaring:
            return
        others = [one for one in declaring if one is not guards]
        found: list[Declarations] = self._manager.subset_hook_caller("corefw_settings", others)()
        for declared in found:
            try:
                Settings([*self._declarations.values(), declared])
            except SettingsError:
                raise
            except FOREIGN as error:
                raise PluginError(f"its Declarations are not in order: {described(error)}") from error
            self._declarations[name] = declared

    # -- one name, one driver --------------------------------------------------------------------------------------

    def transport(self, uri: MigrationUri | str, settings: Settings | None = None) -> Transport:
        """The transport for a URI. Raises UriError (unknown scheme, wrong address) or PluginError.

        The transport reads its parameters from `settings`, by default those of `settings()`. If a plugin fails, the
        next one is asked; its error is raised only if no other plugin knows the scheme.
        """
        return self.transport_context(settings).transport(uri)

    def transport_context(self, settings: Settings | None = None) -> TransportContext:
        """What a transport is made with: these settings, and the transports of all plugins."""
        return TransportContext(self.settings() if settings is None else settings, self._make_transport)

    def _make_transport(self, parsed: MigrationUri, context: TransportContext) -> Transport:
        with passed_over() as failed:
            made: Transport | None = self._manager.hook.corefw_transport(uri=parsed, context=context)
        for error in failed if made is not None else failed[:-1]:
            log.warning("%s", error)
        if made is not None:
            return made
        if failed:
            raise failed[-1]
        raise UriError(
            f"'{parsed}': no installed plugin has the scheme '{parsed.scheme}'"
            f"{self._entry_points.hint(TRANSPORTS, parsed.scheme)}"
        )

    def machine(self, kind: str, config: MachineConfig) -> Machine:
        """Make a machine of this kind. Raises UsageError (unknown kind, wrong options), MachineError, PluginError."""
        factory = self._entry_points.driver(MACHINES, kind)
        if factory is None:
            raise UsageError(f"no installed plugin has a machine '{kind}'{self._entry_points.hint(MACHINES, kind)}")
        made = call(f"machine '{kind}'", factory, config)
        if not isinstance(made, Machine):
            raise PluginError(f"machine '{kind}' gave {type(made).__name__}, expected a Machine")
        made.options = MappingProxyType(dict(config.options))
        return made

    def programs(self, kind: str) -> Sequence[str]:
        """Names of the programs that come with a kind of machine. Raises PluginError."""
        factory = self._entry_points.driver(MACHINES, kind)
        return factory.programs if isinstance(factory, type) and issubclass(factory, Machine) else ()

    # -- many implementers -----------------------------------------------------------------------------------------

    def settings(self) -> Settings:
        """The table of all settings that the core and the plugins declare, at their defaults."""
        return Settings(self._declarations.values())

    def section_savers(self, machine: Machine, settings: Settings) -> SaverRegistry:
        """New savers for one migration. Raises PluginError: without one of them the guest would not be whole."""
        found: list[list[SectionSaver]] = self._manager.hook.corefw_section_savers(machine=machine, settings=settings)
        return SaverRegistry(saver for savers in found for saver in savers)

    def section_loaders(self, machine: Machine, settings: Settings) -> LoaderRegistry:
        """New loaders for one migration. Raises PluginError: without one of them the guest would not be whole."""
        found: list[list[SectionLoader]] = self._manager.hook.corefw_section_loaders(machine=machine, settings=settings)
        return LoaderRegistry(loader for loaders in found for loader in loaders)

    def blockers(self, machine: Machine, settings: Settings) -> list[str]:
        """Every reason against a migration.

        An installed plugin that failed to load is a reason, and so is one that fails to answer: it may carry a part of
        the guest, or have had a reason of its own.
        """
        broken = [f"{why} (repair or uninstall it, then start the engine again)" for why in self.failures.values()]
        found: list[list[str]] = self._manager.hook.corefw_blockers(machine=machine, settings=settings)
        return broken + [str(reason) for reasons in found for reason in reasons]

    def state_changed(self, side: Side, old: MigrationStatus, new: MigrationStatus) -> None:
        """Call every plugin that observes statuses. A failure is logged and does not affect the others."""
        self._manager.hook.corefw_state_changed(side=side, old=old, new=new)

    def commands(self, control: MigrationControl) -> dict[str, PluginCommand]:
        """QMP commands of the plugins, by name. A plugin that fails to answer, and a name that is taken, are logged and
        left out. Whether a function can be a command is not checked here."""
        merged: dict[str, PluginCommand] = {}
        found: list[dict[str, PluginCommand]] = self._manager.hook.corefw_commands(control=control)
        for commands in found:
            for name, command in commands.items():
                if name in merged:
                    log.error("plugin '%s' adds the command '%s' that another plugin has", command.plugin, name)
                else:
                    merged[name] = command
        return merged

    # -- what is there ---------------------------------------------------------------------------------------------

    def inventory(self) -> Iterator[PluginInfo]:
        """Every installed entry point, with the reason if it does not load."""
        for group in GROUPS:
            for point in self._entry_points.group(group):
                if group == PLUGINS:
                    error = self.failures.get(entrypoints.line(point))
                else:
                    error = self._driver_error(group, point.name)
                adds = tuple(self._additions(point.name)) if group == PLUGINS and error is None else ()
                yield PluginInfo(group, point.name, point.value, *entrypoints.distribution(point), error, adds)

    def _driver_error(self, group: str, name: str) -> str | None:
        try:
            self._entry_points.driver(group, name)
        except PluginError as error:
            return str(error)
        return None

    def _additions(self, name: str) -> Iterator[str]:
        """What a loaded plugin adds, as phrases."""
        for hook, what in _ADDITIONS.items():
            caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
            if any(implementation.plugin_name == name for implementation in caller.get_hookimpls()):
                yield what
        declared = self._declarations.get(name, Declarations())
        own = {one.name for one in declared.capabilities} | {one.name for one in declared.parameters}
        yield from (f"capability {one.name}" for one in declared.capabilities)
        yield from (f"parameter {one.name}" for one in declared.parameters)
        yield from (f"support of {known}" for known in sorted(declared.implements - own))

    @property
    def declarations(self) -> Mapping[str, Declarations]:
        """The settings that plugins declare, by the plugin's name."""
        return MappingProxyType(self._declarations)


class _EntryPointTransports:
    """The core's own plugin: a scheme is an entry point."""

    def __init__(self, entry_points: EntryPoints) -> None:
        self._entry_points = entry_points

    @hookspecs.hookimpl(trylast=True)
    def corefw_transport(self, uri: MigrationUri, context: TransportContext) -> Transport | None:
        for name in uri.drivers():
            factory = self._entry_points.driver(TRANSPORTS, name)
            if factory is not None:
                made = call(f"transport '{name}'", factory, uri, context)
                if not isinstance(made, Transport):
                    raise PluginError(f"transport '{name}' gave {type(made).__name__}, expected a Transport")
                return made
        return None


def _nearest_hook(plugin: object) -> str:
    """ " (did you mean corefw_blockers?)" if a plugin has a misspelt hook; else ""."""
    misspelt = [name for name in dir(plugin) if name.startswith("corefw_") and name not in HOOKS]
    return next((hint for name in misspelt if (hint := did_you_mean(name, HOOKS))), "")
