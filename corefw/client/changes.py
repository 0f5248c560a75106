"""Settings as a user writes them on a command line, and how they are applied to an engine.

The tables of corefw.settings decide how a value is parsed ("500M" is a rate, "300ms" a time); the engine decides
whether it may be set. Wrong values are refused before anything starts, and several settings are changed together or not
at all.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from corefw.declarations import Capability, Parameter, Value
from corefw.errors import MigfwError, SettingsError, UsageError, did_you_mean
from corefw.quantities import parse_size, parse_switch
from corefw.settings import Settings

if TYPE_CHECKING:
    from corefw.plugins import Plugins
    from corefw.qmp.engines import EngineClient

CAPABILITY: Final = "--cap NAME, --cap NAME=on or --cap NAME=off"
PARAMETER: Final = "--param NAME=VALUE, as in --param downtime-limit=100ms"
"""The forms of --cap and --param, for error messages."""


# -- words -------------------------------------------------------------------------------------------------------------


def split_pairs(texts: Iterable[str], what: str) -> dict[str, str]:
    """Split ("a=1", "b=2") into {"a": "1", "b": "2"}. Raises UsageError if "=" is missing or a name is given twice."""
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"'{text}': expected {what}")
        if name in pairs:
            raise UsageError(f"'{name}' is given twice: '{pairs[name]}' and '{value}'")
        pairs[name] = value
    return pairs


def parse_switches(texts: Iterable[str], what: str) -> dict[str, bool]:
    """Parse ("a", "b=off") into {"a": True, "b": False}. Raises UsageError for any other word than on or off."""
    pairs = split_pairs((text if "=" in text else f"{text}=on" for text in texts), what)
    return {name: read_switch(name, word) for name, word in pairs.items()}


def read_switch(name: str, word: str) -> bool:
    """Parse the WORD of NAME=WORD. Raises UsageError."""
    try:
        return parse_switch(word)
    except UsageError:
        raise UsageError(f"'{name}={word}': expected {name}=on or {name}=off") from None


def set_parameters(settings: Settings, params: Iterable[str]) -> None:
    """Set what --param says on the settings of this process. Raises UsageError, SettingsError."""
    texts = split_pairs(params, PARAMETER)
    settings.set_parameters({name: settings.declared_parameter(name).parse(text) for name, text in texts.items()})


def split_for_relay(params: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split --param of a migration that this process relays: what QEMU gets, and what only plugins here declare."""
    of_qemu: list[str] = []
    of_plugins: list[str] = []
    for text in params:
        name = text.partition("=")[0]
        declared_here = _lookup(Settings(), name) is None and isinstance(_declared(name, plugins=True), Parameter)
        (of_plugins if declared_here else of_qemu).append(text)
    return of_qemu, of_plugins


# -- changes to an engine's settings -----------------------------------------------------------------------------------


def _parameters_of(engine: EngineClient) -> Mapping[str, Any]:
    """The values of all parameters; a migfw also tells of those that are not set (None)."""
    if engine.is_migfw:
        found: Mapping[str, Any] = engine.call("x-migfw-status")["settings"]["parameters"]
        return found
    return dict(engine.call("query-migrate-parameters"))


@dataclass(slots=True)
class Changes:
    """Capabilities and parameters to set on an engine."""

    capabilities: dict[str, bool] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)

    def apply(self, engine: EngineClient) -> None:
        """Set everything. If the engine refuses something, restores the previous values and raises UsageError."""
        with self.applied(engine):
            pass

    @contextlib.contextmanager
    def applied(self, engine: EngineClient) -> Iterator[Changes]:
        """Set everything for a migration that the block starts.

        Yields the previous values, for `revert`. They are restored if the engine refuses something, here or in the
        block, or if the block is left by an exception while no migration runs.
        """
        before = self._before(engine)
        try:
            self._set(engine)
            yield before
        except UsageError:
            before._restore(engine)
            raise
        except BaseException:
            with contextlib.suppress(MigfwError):  # if the engine is gone, so are its settings
                if not engine.is_migrating():
                    before._restore(engine)
            raise

    def revert(self, engine: EngineClient, before: Changes) -> None:
        """Restore `before`, except for what another client has changed since. Does nothing if the engine has gone."""
        with contextlib.suppress(MigfwError):
            now = self._before(engine)
            Changes(
                {
                    name: old
                    for name, old in before.capabilities.items()
                    if now.capabilities[name] == self.capabilities[name]
                },
                {name: old for name, old in before.parameters.items() if now.parameters[name] == self.parameters[name]},
            )._restore(engine)

    def _before(self, engine: EngineClient) -> Changes:
        """The engine's present values of everything that is to be set. Raises UsageError for an unknown parameter."""
        known = _parameters_of(engine) if self.parameters else {}
        for name in self.parameters:
            if engine.is_migfw and name not in known:
                hint = did_you_mean(name, known)
                raise UsageError(f"unknown parameter '{name}'{hint}: expected one of {', '.join(known)}")
        states = engine.call("query-migrate-capabilities") if self.capabilities else []
        return Changes(
            {one["capability"]: one["state"] for one in states if one["capability"] in self.capabilities},
            {name: known[name] for name in self.parameters if name in known},
        )

    def _set(self, engine: EngineClient) -> None:
        self._set_parameters(engine)
        self._set_capabilities(engine)

    def _restore(self, engine: EngineClient) -> None:
        """Undo `_set`, in reverse order so that the engine sees the same combinations. Ignores what it refuses: that
        was never changed."""
        for part in (self._set_capabilities, self._set_parameters):
            with contextlib.suppress(MigfwError):
                part(engine)

    def _set_parameters(self, engine: EngineClient) -> None:
        if self.parameters:
            engine.call("migrate-set-parameters", **self.parameters)

    def _set_capabilities(self, engine: EngineClient) -> None:
        if self.capabilities:
            wanted = [{"capability": name, "state": state} for name, state in self.capabilities.items()]
            engine.call("migrate-set-capabilities", capabilities=wanted)


def read_changes(caps: Iterable[str], params: Iterable[str], *, plugins: bool = True) -> Changes:
    """Parse --cap and --param. Raises UsageError for a value that cannot be parsed.

    `plugins` looks up names that the core does not declare in the installed plugins. For a QEMU it is False, and names
    that are not declared are passed on.
    """
    return Changes(
        {_real_name(name, plugins=plugins): state for name, state in parse_switches(caps, CAPABILITY).items()},
        dict(_parameter(name, text, plugins=plugins) for name, text in split_pairs(params, PARAMETER).items()),
    )


def read_mixed(pairs: Iterable[str], capabilities: frozenset[str], *, plugins: bool = True) -> Changes:
    """Parse the NAME=VALUE of `migfw set`, which may name either kind. `capabilities` are the engine's own."""
    changes = Changes()
    for name, text in split_pairs(pairs, "NAME=VALUE, as in downtime-limit=100ms or return-path=on").items():
        real = _real_name(name, plugins=plugins)
        if real in capabilities or isinstance(_declared(name, plugins=plugins), Capability):
            changes.capabilities[real] = read_switch(name, text)
        else:
            changes.parameters.update([_parameter(name, text, plugins=plugins)])
    return changes


def _parameter(name: str, text: str, *, plugins: bool) -> tuple[str, Value]:
    declared = _declared(name, plugins=plugins)
    if isinstance(declared, Parameter):
        return declared.name, declared.parse(text)
    return name, _parse_undeclared(text)


def _parse_undeclared(text: str) -> Value:
    """Parse the value of a parameter that is not in the tables: on or off, a number or size, or else a string."""
    with contextlib.suppress(UsageError):
        return parse_switch(text)
    return parse_size(text) if re.fullmatch(r"\d+(\.\d+)?[KMGTkmgt]?(iB|B)?", text) else text


def _real_name(name: str, *, plugins: bool) -> str:
    declared = _declared(name, plugins=plugins)
    return declared.name if declared else name


def _declared(name: str, *, plugins: bool) -> Capability | Parameter | None:
    """A name's declaration. The plugins are loaded only if the core does not declare it."""
    return _lookup(Settings(), name) or (_lookup(all_settings(), name) if plugins else None)


def _lookup(settings: Settings, name: str) -> Capability | Parameter | None:
    for find in (settings.declared_capability, settings.declared_parameter):
        try:
            return find(name)
        except SettingsError:
            continue
    return None


@cache
def installed() -> Plugins:
    """The plugins of this process, loaded when they are first needed."""
    from corefw.plugins import Plugins

    return Plugins.load()


@cache
def all_settings() -> Settings:
    """The settings that the core and the installed plugins declare."""
    return installed().settings()
