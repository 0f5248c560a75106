"""Finds and calls plugins; the only module that imports pluggy and stevedore, beside the hook specs.

Stevedore finds the one driver of a name (a scheme, a machine), which is imported only when it is asked for; pluggy
calls many implementers. A plugin that fails to load is remembered with its reason and does not stop the others, but it
blocks migrations. One that fails when it is called is named in the error: whatever it raises becomes a PluginError.

importlib.metadata says what is installed, once, and again when a name is not there: that takes longer than dialling.
Stevedore's own cache on disk goes by modification times rounded to minutes and would miss a plugin that was just
installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import pluggy
from stevedore import driver, extension

from corefw import hookspecs
from corefw.channel import Transport, TransportContext
from corefw.errors import FOREIGN, MigfwError, PluginError, SettingsError, UriError, UsageError, did_you_mean, one_line
from corefw.machine import Machine, MachineConfig
from corefw.section import LoaderRegistry, SaverRegistry, SectionLoader, SectionSaver
from corefw.settings import Declarations, Settings
from corefw.states import MigrationStatus, Side
from corefw.uri import MigrationUri

if TYPE_CHECKING:
    from corefw.engine import Engine

TRANSPORTS: Final = "corefw.transport"
MACHINES: Final = "corefw.machine"
PLUGINS: Final = "corefw.plugins"
GROUPS: Final = (TRANSPORTS, MACHINES, PLUGINS)

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


@dataclass(frozen=True, slots=True)
class PluginCommand:
    """A QMP command, and the plugin that adds it."""

    plugin: str
    function: Callable[..., object]


class _EntryPointTransports:
    """The core's own plugin: a scheme is an entry point."""

    def __init__(self, installed: _Installed) -> None:
        self._installed = installed

    @hookspecs.hookimpl
    def corefw_transport(self, uri: MigrationUri, context: TransportContext) -> Transport | None:
        for name in uri.drivers():
            factory = _driver(self._installed, TRANSPORTS, name)
            if factory is not None:
                made = _call(f"transport '{name}'", factory, uri, context)
                if not isinstance(made, Transport):
                    raise PluginError(f"transport '{name}' gave {type(made).__name__}, expected a Transport")
                return made
        return None


class Plugins:
    """Every plugin of this process. Make one with `Plugins.load()`.

    failures   "name = target" of each entry point in `corefw.plugins` that was left out -> why
    """

    def __init__(self) -> None:
        self._installed = _Installed()
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self._declarations: dict[str, Declarations] = {}
        self.failures: dict[str, str] = {}
        self.register(_EntryPointTransports(self._installed), "corefw:entry-point-transports")

    @classmethod
    def load(cls) -> Plugins:
        """Load everything in the group `corefw.plugins`, in the order of the names. Does not raise for a plugin."""
        plugins = cls()
        for point in plugins._installed.group(PLUGINS):
            try:
                plugins.register(_load(point), point.name)
            except PluginError as error:
                plugins.failures[_line(point)] = str(error)
                log.warning("%s; it is left out", error)
        return plugins

    def register(self, plugin: object, name: str | None = None) -> None:
        """Add a plugin from inside a program. All or nothing.

        Raises PluginError for a hook that does not exist or takes other arguments, a name or plugin that is registered
        already, and declarations that do not go with those of the others.
        """
        if plugin is None or isinstance(plugin, type):
            raise PluginError(f"plugin '{name}' is {plugin!r}: expected a module or an object with hooks, not a class")
        name = name or self._manager.get_canonical_name(plugin)
        if self._manager.has_plugin(name) or self._manager.is_registered(plugin):
            raise PluginError(f"plugin '{name}' is already registered: choose another name for this one")
        try:
            self._manager.register(plugin, name)
            self._manager.check_pending()
            self._declare(name, plugin)
        except (pluggy.PluginValidationError, MigfwError) as error:
            if self._manager.has_plugin(name):
                self._manager.unregister(plugin, name)
            raise PluginError(f"plugin '{name}': {_one_line(error)}{_nearest_hook(plugin)}") from None

    def _declare(self, name: str, plugin: object) -> None:
        """Ask a new plugin for its settings and see whether they go with the others'."""
        for implementation in self._manager.hook.corefw_settings.get_hookimpls():
            if implementation.plugin is plugin:
                declared = _call("corefw_settings", implementation.function)
                if not isinstance(declared, Declarations):
                    raise PluginError(f"corefw_settings gave {type(declared).__name__}, expected Declarations")
                try:
                    Settings([*self._declarations.values(), declared])
                except SettingsError:
                    raise
                except FOREIGN as error:
                    raise PluginError(f"its Declarations are not in order: {_one_line(error)}") from error
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
        failed: list[PluginError] = []
        for name, ask in self._implementers("corefw_transport", last_first=True):
            try:
                made = ask(uri=parsed, context=context)
                if made is not None and not isinstance(made, Transport):
                    raise PluginError(f"plugin '{name}' gave {type(made).__name__}, expected a Transport")
            except PluginError as error:
                failed.append(error)
                continue
            if made is not None:
                _warn(failed)
                return made
        if failed:
            _warn(failed[:-1])
            raise failed[-1]
        raise UriError(
            f"'{parsed}': no installed plugin has the scheme '{parsed.scheme}'"
            f"{self._installed.hint(TRANSPORTS, parsed.scheme)}"
        )

    def machine(self, kind: str, config: MachineConfig) -> Machine:
        """Make a machine of this kind. Raises UsageError (unknown kind, wrong options), MachineError, PluginError."""
        factory = _driver(self._installed, MACHINES, kind)
        if factory is None:
            raise UsageError(f"no installed plugin has a machine '{kind}'{self._installed.hint(MACHINES, kind)}")
        made = _call(f"machine '{kind}'", factory, config)
        if not isinstance(made, Machine):
            raise PluginError(f"machine '{kind}' gave {type(made).__name__}, expected a Machine")
        return made

    # -- many implementers -----------------------------------------------------------------------------------------

    def settings(self) -> Settings:
        """The table of all settings that the core and the plugins declare, at their defaults."""
        return Settings(self._declarations.values())

    def section_savers(self, machine: Machine, settings: Settings) -> SaverRegistry:
        """New savers for one migration. Raises PluginError: without one of them the guest would not be whole."""
        registry = SaverRegistry()
        for name, ask in self._implementers("corefw_section_savers"):
            for saver in _listed(name, "corefw_section_savers", ask(machine=machine, settings=settings)):
                if not isinstance(saver, SectionSaver):
                    raise PluginError(f"plugin '{name}': {saver!r} is not a SectionSaver")
                registry.add(saver)
        return registry

    def section_loaders(self, machine: Machine, settings: Settings) -> LoaderRegistry:
        """New loaders for one migration. Raises PluginError: without one of them the guest would not be whole."""
        registry = LoaderRegistry()
        for name, ask in self._implementers("corefw_section_loaders"):
            for loader in _listed(name, "corefw_section_loaders", ask(machine=machine, settings=settings)):
                if not isinstance(loader, SectionLoader):
                    raise PluginError(f"plugin '{name}': {loader!r} is not a SectionLoader")
                registry.add(loader)
        return registry

    def blockers(self, machine: Machine, settings: Settings) -> list[str]:
        """Every reason against a migration.

        An installed plugin that failed to load is a reason, and so is one that fails to answer: nobody knows what
        it would have carried of the guest, or forbidden.
        """
        reasons = [
            f"{failure} (repair or uninstall it, then start the engine again)" for failure in self.failures.values()
        ]
        for name, ask in self._implementers("corefw_blockers"):
            try:
                found = _listed(name, "corefw_blockers", ask(machine=machine, settings=settings))
                reasons += [str(reason) for reason in found]
            except MigfwError as error:
                reasons.append(str(error))
        return reasons

    def state_changed(self, side: Side, old: MigrationStatus, new: MigrationStatus) -> None:
        """Tell every observer; one that raises is logged and does not keep the others from hearing it."""
        for name, ask in self._implementers("corefw_state_changed"):
            try:
                ask(side=side, old=old, new=new)
            except MigfwError:
                log.exception("plugin '%s' failed in corefw_state_changed", name)

    def commands(self, engine: Engine) -> dict[str, PluginCommand]:
        """QMP commands of the plugins. A plugin that fails to answer, and a name that is taken, are logged and left
        out. Whether a function can be a command is for the caller to see."""
        merged: dict[str, PluginCommand] = {}
        for name, ask in self._implementers("corefw_commands"):
            try:
                commands = ask(engine=engine)
            except MigfwError:
                log.exception("plugin '%s' failed in corefw_commands", name)
                continue
            if not isinstance(commands, Mapping | None):
                log.error("plugin '%s' (corefw_commands) gave %s, expected a mapping", name, type(commands).__name__)
                continue
            for command, function in (commands or {}).items():
                if command in merged:
                    log.error("plugin '%s' adds the command '%s' that another plugin has", name, command)
                else:
                    merged[command] = PluginCommand(name, function)
        return merged

    def _implementers(self, hook: str, last_first: bool = False) -> Iterator[tuple[str, Callable[..., object]]]:
        """The plugins that implement a hook, first registered first, each with a function that asks it alone."""
        caller: pluggy.HookCaller = getattr(self._manager.hook, hook)
        found = caller.get_hookimpls()
        for implementation in reversed(found) if last_first else found:
            yield implementation.plugin_name, _asker(hook, implementation)

    # -- what is there ---------------------------------------------------------------------------------------------

    def inventory(self) -> Iterator[PluginInfo]:
        """Every installed entry point, loaded to see whether it does."""
        for group in GROUPS:
            for point in self._installed.group(group):
                failed = self.failures.get(_line(point))
                error = failed if group == PLUGINS else _driver_error(self._installed, point)
                name, version = (point.dist.name, point.dist.version) if point.dist else ("?", "?")
                adds = tuple(self._additions(point.name)) if group == PLUGINS and error is None else ()
                yield PluginInfo(group, point.name, point.value, name, version, error, adds)

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


def _warn(errors: Iterable[PluginError]) -> None:
    for error in errors:
        log.warning("%s", error)


def _asker(hook: str, implementation: pluggy.HookImpl) -> Callable[..., object]:
    def ask(**arguments: object) -> object:
        wanted = (arguments[name] for name in implementation.argnames)
        return _call(f"plugin '{implementation.plugin_name}' ({hook})", implementation.function, *wanted)

    return ask


def _call(what: str, function: Callable[..., object], *arguments: object) -> object:
    """Call a plugin. A MigfwError goes through; anything else that it raises becomes a PluginError naming `what`."""
    try:
        return function(*arguments)
    except MigfwError:
        raise
    except FOREIGN as error:
        raise PluginError(f"{what} failed: {_one_line(error)}") from error


def _listed(name: str, hook: str, answer: object) -> list[object]:
    """What a hook returned, as a list. Generators run here, so that their errors have a name."""
    if answer is None:
        return []
    if not isinstance(answer, Iterable) or isinstance(answer, str):
        raise PluginError(f"plugin '{name}' ({hook}) gave {type(answer).__name__}, expected a list")
    items: Iterable[object] = answer
    made = _call(f"plugin '{name}' ({hook})", list, items)
    assert isinstance(made, list)
    return made


# -- entry points --------------------------------------------------------------------------------------------------


class _Installed:
    """The entry points of every distribution, as they were when somebody last looked."""

    def __init__(self) -> None:
        self._points = entry_points()

    def look_again(self) -> None:
        self._points = entry_points()

    def group(self, group: str) -> list[EntryPoint]:
        """The entry points of a group, each once, in the order of their names."""
        found = {(point.name, point.value): point for point in self._points.select(group=group)}
        return [found[key] for key in sorted(found)]

    def hint(self, group: str, wrong: str) -> str:
        """What to say behind a name that nobody has: the nearest one, and all that are installed."""
        names = sorted({point.name for point in self.group(group)})
        return f"{did_you_mean(wrong, names)} (installed: {', '.join(names) or 'none'})"


def _line(point: EntryPoint) -> str:
    """As it stands in entry_points.txt."""
    return f"{point.name} = {point.value}"


def _load(point: EntryPoint) -> object:
    try:
        return point.load()
    except FOREIGN as error:
        raise _not_loaded(point, error) from error


def _not_loaded(point: EntryPoint, error: BaseException) -> PluginError:
    return PluginError(f"plugin '{point.name}' ({point.value}) failed to load: {_one_line(error)}")


def _driver_error(installed: _Installed, point: EntryPoint) -> str | None:
    try:
        _driver(installed, point.group, point.name)
    except PluginError as error:
        return str(error)
    return None


def _driver(installed: _Installed, group: str, name: str) -> Callable[..., object] | None:
    """The factory behind one entry point; None when nobody has that name. Raises PluginError when it does not load."""
    if all(point.name != name for point in installed.group(group)):
        installed.look_again()
    points = installed.group(group)
    mine = [point for point in points if point.name == name]
    if not mine:
        return None
    if len(mine) > 1:
        owners = ", ".join(f"{point.value} of {point.dist.name if point.dist else '?'}" for point in mine)
        raise PluginError(f"'{name}' is claimed more than once in {group}: {owners} (uninstall all but one)")
    extension.ExtensionManager.ENTRY_POINT_CACHE[group] = points
    try:
        # `.driver` would give the class where an instance is falsy, so the factory is called here, not by stevedore.
        manager: driver.DriverManager[object] = driver.DriverManager(
            group, name, invoke_on_load=False, on_load_failure_callback=_reraise
        )
    except FOREIGN as error:
        raise _not_loaded(mine[0], error) from error
    factory = manager.driver
    if not callable(factory):
        raise PluginError(
            f"plugin '{name}' ({mine[0].value}) gives {type(factory).__name__}, expected a class or function"
        )
    return factory


def _reraise(_manager: object, _point: EntryPoint, error: BaseException) -> None:
    raise error


# -- words ---------------------------------------------------------------------------------------------------------


def _one_line(error: BaseException) -> str:
    text = one_line(str(error))
    return text if isinstance(error, MigfwError | pluggy.PluginValidationError) else f"{type(error).__name__}: {text}"


def _nearest_hook(plugin: object) -> str:
    """ " (did you mean corefw_blockers?)" where a plugin has a name like a hook's that is none."""
    misspelt = [name for name in dir(plugin) if name.startswith("corefw_") and name not in HOOKS]
    return next((hint for name in misspelt if (hint := did_you_mean(name, HOOKS))), "")
