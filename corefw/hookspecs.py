"""The extension points. A plugin is a module or object with functions of these names marked `@hookimpl`, registered
under the entry point group `corefw.plugins`.

Two groups beside it name one driver each, loaded only when it is asked for: `corefw.transport` (the entry point's name
is the URI scheme, or `NAME+` for a layer over any other scheme; its object is
`factory(uri: MigrationUri, context: TransportContext) -> Transport`) and `corefw.machine`
(`factory(config: MachineConfig) -> Machine`). Hooks are called when a migration begins and for questions about one,
never on the hot path; all of them in the thread of the caller. Pluggy calls them, the plugin that was registered last
first; installed plugins are called in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Final, TypeVar, overload

import pluggy

if TYPE_CHECKING:
    from corefw.channel import Transport, TransportContext
    from corefw.control import MigrationControl
    from corefw.declarations import Declarations
    from corefw.machine import Machine
    from corefw.section import SectionLoader, SectionSaver
    from corefw.settings import Settings
    from corefw.states import MigrationStatus, Side
    from corefw.uri import MigrationUri

PROJECT: Final = "corefw"

_Function = TypeVar("_Function", bound=Callable[..., object])


@overload
def hookimpl(function: _Function, /) -> _Function: ...


@overload
def hookimpl(
    *, wrapper: bool = False, tryfirst: bool = False, trylast: bool = False
) -> Callable[[_Function], _Function]: ...


def hookimpl(
    function: _Function | None = None, /, *, wrapper: bool = False, tryfirst: bool = False, trylast: bool = False
) -> _Function | Callable[[_Function], _Function]:
    """Mark a plugin's implementation of a hook.

    wrapper    a generator that yields once: what is yielded to it is the list of all results, and what it returns takes
               their place
    tryfirst   call this implementation before the others
    trylast    call it after them
    """
    mark = pluggy.HookimplMarker(PROJECT)
    if function is not None:
        return mark(function)
    return mark(wrapper=wrapper, tryfirst=tryfirst, trylast=trylast)


hookspec = pluggy.HookspecMarker(PROJECT)


@hookspec(firstresult=True)
def corefw_transport(uri: MigrationUri, context: TransportContext) -> Transport | None:
    """The transport for this URI, or None if this plugin does not know its scheme. Raises UriError if the URI is wrong.

    The core's own implementation, asked last, loads the scheme's entry point. Implement this hook to add a scheme from
    inside a program, without packaging it.
    """


@hookspec
def corefw_section_savers(machine: Machine, settings: Settings) -> Iterable[SectionSaver]:
    """New savers for one migration of this machine away from here. Called at the start of each migration, and whenever
    someone asks whether the guest can migrate: making a saver must not change anything."""
    return ()


@hookspec
def corefw_section_loaders(machine: Machine, settings: Settings) -> Iterable[SectionLoader]:
    """New loaders for one migration into this machine. Called when it begins to wait for a source: making a loader must
    not change anything."""
    return ()


@hookspec
def corefw_blockers(machine: Machine, settings: Settings) -> Iterable[str]:
    """Reasons why this machine cannot migrate now, as phrases: "'grid' is attached to a GPU (detach it first)"."""
    return ()


@hookspec
def corefw_settings() -> Declarations:
    """Capabilities and parameters that this plugin adds, and the known ones that it implements."""
    raise NotImplementedError


@hookspec
def corefw_state_changed(side: Side, old: MigrationStatus, new: MigrationStatus) -> None:
    """A migration's status changed. Called with no lock held, in the order of the changes; what is raised is logged and
    goes no further."""


@hookspec
def corefw_commands(control: MigrationControl) -> Mapping[str, Callable[..., object]]:
    """QMP commands that this plugin adds: name -> function of the command's arguments (keywords, JSON values; "-" in a
    name becomes "_"), returning a JSON value. Its signature is the command's schema; errors are MigfwErrors. `control`
    is what the functions use to see and steer the engine. A wrapper sees mappings of name -> PluginCommand."""
    return {}
