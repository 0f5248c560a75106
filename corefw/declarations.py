"""How a plugin, or the core, declares capabilities and parameters; corefw.settings has their present values.

Sizes are bytes, and times milliseconds unless a parameter's kind is SECONDS, as in QMP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from corefw.errors import SettingsError, UsageError, did_you_mean
from corefw.jsontext import JsonError, parse_json
from corefw.quantities import parse_milliseconds, parse_seconds, parse_size, parse_switch

Value = int | bool | str | tuple[object, ...] | None


class Kind(StrEnum):
    """What a parameter's value is."""

    INTEGER = "integer"
    SIZE = "size"
    RATE = "rate"
    MILLISECONDS = "milliseconds"
    SECONDS = "seconds"
    BOOLEAN = "boolean"
    STRING = "string"
    CHOICE = "choice"
    LIST = "list"
    OBJECTS = "objects"
    """A list of JSON objects; None as long as it is not set."""


@dataclass(frozen=True, slots=True)
class Capability:
    """A feature that a migration may use; off by default. `aliases` are earlier names that are still accepted."""

    name: str
    help: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A value that tunes a migration. `power_of_two` applies to sizes; `choices` are the values of a choice."""

    name: str
    kind: Kind
    default: Value
    help: str
    minimum: int = 0
    maximum: int = 2**63 - 1
    power_of_two: bool = False
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    def check(self, value: object) -> Value:
        """Return the value if it is valid. Raises SettingsError that says what would be."""
        if self.kind in _PLAIN_TYPES:
            return self._check_type(value)
        if self.kind is Kind.CHOICE:
            if not isinstance(value, str) or value not in self.choices:
                hint = did_you_mean(value, self.choices) if isinstance(value, str) else ""
                raise SettingsError(f"parameter '{self.name}' expects {' or '.join(self.choices)}, got {value!r}{hint}")
            return value
        if not isinstance(value, int) or isinstance(value, bool):
            raise SettingsError(f"parameter '{self.name}' expects an integer, got {value!r}")
        if not self.minimum <= value <= self.maximum:
            raise SettingsError(
                f"parameter '{self.name}' expects {self._unit()} from {self.minimum} to {self.maximum}, got {value}"
            )
        if self.power_of_two and value & (value - 1):
            raise SettingsError(f"parameter '{self.name}' expects a power of two, got {value}")
        return value

    def _check_type(self, value: object) -> Value:
        if self.kind is Kind.STRING and value is None:
            return ""
        if self.kind is Kind.OBJECTS and value is None:
            return None
        kind, phrase = _PLAIN_TYPES[self.kind]
        if not isinstance(value, kind):
            raise SettingsError(f"parameter '{self.name}' expects {phrase}, got {value!r}")
        return tuple(value) if isinstance(value, list | tuple) else value

    def parse(self, text: str) -> Value:
        """Parse a value as written on a command line. Raises SettingsError."""
        if self.kind is Kind.STRING:
            return text
        if self.kind is Kind.CHOICE:
            return self.check(text)
        if self.kind is Kind.LIST:
            return tuple(text.split())
        if self.kind is Kind.OBJECTS:
            return self.check(_parse_json(self.name, text))
        try:
            if self.kind is Kind.BOOLEAN:
                return parse_switch(text)
            if self.kind in (Kind.SIZE, Kind.RATE):
                return self.check(parse_size(text))
            if self.kind is Kind.MILLISECONDS:
                return self.check(parse_milliseconds(text))
            if self.kind is Kind.SECONDS:
                return self.check(parse_seconds(text))
            return self.check(int(text))
        except SettingsError:
            raise
        except (UsageError, ValueError):
            raise SettingsError(f"parameter '{self.name}' expects {self._unit()}, got '{text}'") from None

    def _unit(self) -> str:
        return {
            Kind.SIZE: "a size in bytes (K, M, G)",
            Kind.RATE: "bytes per second (K, M, G)",
            Kind.MILLISECONDS: "a time in milliseconds",
            Kind.SECONDS: "a time in seconds (10, 10s, 2m)",
            Kind.BOOLEAN: "on or off",
        }.get(self.kind, "an integer")


_PLAIN_TYPES: Final[Mapping[Kind, tuple[Any, str]]] = {
    Kind.BOOLEAN: (bool, "true or false"),
    Kind.STRING: (str, "a string"),
    Kind.LIST: ((list, tuple), "a list"),
    Kind.OBJECTS: ((list, tuple), "a list of objects"),
}


def _parse_json(name: str, text: str) -> object:
    try:
        return parse_json(text)
    except JsonError as error:
        raise SettingsError(f"parameter '{name}' expects a list of objects in JSON, got '{text}' ({error})") from None


Check = Callable[[Mapping[str, bool], Mapping[str, Value]], str | None]
"""A function of the capabilities and parameters as they would be; returns what is wrong with them, or None."""


@dataclass(frozen=True, slots=True)
class Declarations:
    """What a plugin adds to the tables: capabilities and parameters, the names of those it `implements` (its own or
    the core's), and checks across several of them."""

    capabilities: tuple[Capability, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    implements: frozenset[str] = frozenset()
    checks: tuple[Check, ...] = ()
