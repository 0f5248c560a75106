"""Capabilities and parameters as people write them -> as QMP takes them.

Invariant: the tables decide how a value reads ("500M" is a rate, "300ms" a time); whether it may be set is the engine's
to say. Several changes are made all together, or none of them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from corefw.cli.options import PARAMETER, parse_switches, read_switch, split_pairs
from corefw.errors import MigfwError, SettingsError, UsageError
from corefw.quantities import parse_size, parse_switch
from corefw.settings import Capability, Parameter, Settings, Value

if TYPE_CHECKING:
    from corefw.cli.engines import EngineClient


@dataclass(slots=True)
class Changes:
    """What to set before something starts."""

    capabilities: dict[str, bool] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)

    def apply(self, engine: EngineClient) -> None:
        """Set everything. Raises UsageError when the engine refuses something; then all is as it was."""
        with self.applied(engine):
            pass

    @contextlib.contextmanager
    def applied(self, engine: EngineClient) -> Iterator[None]:
        """Set everything, for a migration that the block starts. When something is refused, here or in the block, or
        the block is left before a migration runs, all is as it was."""
        before = self._before(engine)
        try:
            self._set(engine)
            yield
        except UsageError:
            before._restore(engine)
            raise
        except BaseException:
            with contextlib.suppress(MigfwError):  # when the engine is gone, so are its settings
                if not engine.is_migrating():
                    before._restore(engine)
            raise

    def _before(self, engine: EngineClient) -> Changes:
        """What the engine has now for everything that is to be set. Raises UsageError for an unknown parameter."""
        known = engine.call("query-migrate-parameters") if self.parameters else {}
        for name in self.parameters:
            if engine.is_migfw and name not in known:
                raise UsageError(f"unknown parameter '{name}': expected one of {', '.join(known)}")
        states = engine.call("query-migrate-capabilities") if self.capabilities else []
        return Changes(
            {one["capability"]: one["state"] for one in states if one["capability"] in self.capabilities},
            {name: known[name] for name in self.parameters if name in known},
        )

    def _set(self, engine: EngineClient) -> None:
        self._set_parameters(engine)
        self._set_capabilities(engine)

    def _restore(self, engine: EngineClient) -> None:
        """In the other order, so that the engine checks the same combinations; what it refuses had not been changed."""
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
    """--cap and --param. `plugins` asks the installed plugins about names that the core does not declare (a QEMU has
    names of its own, which are passed on). Raises UsageError for a value that does not read."""
    return Changes(
        {
            _real_name(name, plugins=plugins): state
            for name, state in parse_switches(caps, "--cap NAME, --cap NAME=on or --cap NAME=off").items()
        },
        dict(_parameter(name, text, plugins=plugins) for name, text in split_pairs(params, PARAMETER).items()),
    )


def read_mixed(pairs: Iterable[str], capabilities: frozenset[str], *, plugins: bool = True) -> Changes:
    """`migfw set`: NAME=VALUE of both kinds; `capabilities` are those that the engine has, whatever the tables say."""
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
    return name, _guess(text)


def _guess(text: str) -> Value:
    """A value whose kind nobody here knows: on or off, a number or size, or else a string."""
    with contextlib.suppress(UsageError):
        return parse_switch(text)
    return parse_size(text) if re.fullmatch(r"\d+(\.\d+)?[KMGTkmgt]?(iB|B)?", text) else text


def _real_name(name: str, *, plugins: bool) -> str:
    declared = _declared(name, plugins=plugins)
    return declared.name if declared else name


def _declared(name: str, *, plugins: bool) -> Capability | Parameter | None:
    """What the tables say of a name; the plugins' are loaded only when the core's do not have it."""
    return _lookup(Settings(), name) or (_lookup(all_settings(), name) if plugins else None)


def _lookup(settings: Settings, name: str) -> Capability | Parameter | None:
    for find in (settings.declared_capability, settings.declared_parameter):
        try:
            return find(name)
        except SettingsError:
            continue
    return None


@cache
def all_settings() -> Settings:
    """What the core and the installed plugins declare."""
    from corefw.plugins import Plugins

    return Plugins.load().settings()
