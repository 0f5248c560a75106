"""Entry points of installed plugins: which there are, and the object behind one of them.

importlib.metadata lists what is installed, and does so again when a name is missing: a plugin that was installed a
moment ago is found. Stevedore loads the one driver of a name (a scheme, a machine) from that list. By itself it would
use a cache on disk that goes by modification times and can miss a new plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Final

from stevedore.driver import DriverManager

from corefw.errors import FOREIGN, PluginError, described, did_you_mean

TRANSPORTS: Final = "corefw.transport"
MACHINES: Final = "corefw.machine"
PLUGINS: Final = "corefw.plugins"
KERNELS: Final = "corefw.kernel"
GROUPS: Final = (TRANSPORTS, MACHINES, PLUGINS, KERNELS)

Factory = Callable[..., object]


class EntryPoints:
    """The entry points of every installed distribution, as of the last look."""

    def __init__(self) -> None:
        self._points = entry_points()

    def group(self, group: str) -> list[EntryPoint]:
        """The entry points of a group, each once, sorted by name and then by target."""
        found = {(point.name, point.value): point for point in self._points.select(group=group)}
        return [found[key] for key in sorted(found)]

    def driver(self, group: str, name: str) -> Factory | None:
        """The factory that an entry point names; None if no distribution has that name.

        Raises PluginError if it does not load, cannot be called, or if several distributions have the name.
        """
        if all(point.name != name for point in self.group(group)):
            self._points = entry_points()
        claims = [point for point in self.group(group) if point.name == name]
        if not claims:
            return None
        if len(claims) > 1:
            owners = ", ".join(f"{point.value} of {distribution(point)[0]}" for point in claims)
            raise PluginError(f"'{name}' is claimed more than once in {group}: {owners} (uninstall all but one)")
        try:
            (extension,) = _Driver(claims[0]).extensions
        except FOREIGN as error:
            raise _not_loaded(claims[0], error) from error
        factory: object = extension.plugin
        if not callable(factory):
            raise PluginError(
                f"plugin '{name}' ({claims[0].value}) gives {type(factory).__name__}, expected a class or function"
            )
        return factory

    def hint(self, group: str, wrong: str) -> str:
        """What to add to the error for an unknown name: the closest one, and all that are installed."""
        names = sorted({point.name for point in self.group(group)})
        return f"{did_you_mean(wrong, names)} (installed: {', '.join(names) or 'none'})"


if TYPE_CHECKING:
    _Manager = DriverManager[object]
else:
    _Manager = DriverManager  # which old versions of stevedore do not make generic


class _Driver(_Manager):
    """Stevedore's driver manager for an entry point that was found already."""

    def __init__(self, point: EntryPoint) -> None:
        self._point = point
        super().__init__(point.group, point.name, invoke_on_load=False, on_load_failure_callback=_reraise)

    def list_entry_points(self) -> list[EntryPoint]:
        return [self._point]


def _reraise(_manager: object, _point: EntryPoint, error: BaseException) -> None:
    raise error


def load(point: EntryPoint) -> object:
    """The object that an entry point names. Raises PluginError."""
    try:
        return point.load()
    except FOREIGN as error:
        raise _not_loaded(point, error) from error


def line(point: EntryPoint) -> str:
    """An entry point as it stands in entry_points.txt."""
    return f"{point.name} = {point.value}"


def distribution(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that an entry point belongs to; "?" if its metadata is missing."""
    return (point.dist.name, point.dist.version) if point.dist else ("?", "?")


def _not_loaded(point: EntryPoint, error: BaseException) -> PluginError:
    return PluginError(f"plugin '{point.name}' ({point.value}) failed to load: {described(error)}")
