"""guest.value and guest.rng: state of variable length, sent as text (see jsonlike)."""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import Any, ClassVar, Final, Literal, Self, overload

import numpy as np

from corefw.quantities import format_size
from corefw_machine_python import jsonlike
from corefw_machine_python.declarations import Stored

MAX_LIMIT: Final = 64 << 20
DEFAULT_LIMIT: Final = 1 << 20

Kind = Literal["numpy", "random"]


class MadeOnDemand(Stored):
    """A field whose initial value is created on first access."""

    @overload
    def __get__(self, program: None, owner: type) -> Self: ...
    @overload
    def __get__(self, program: object, owner: type) -> Any: ...
    def __get__(self, program: object | None, owner: type) -> Any:
        if program is None:
            return self
        if self.name not in program.__dict__:
            program.__dict__[self.name] = self._first()
        return program.__dict__[self.name]

    @abstractmethod
    def _first(self) -> object:
        """Create the initial object for one program."""


class Value(MadeOnDemand):
    """See guest.value()."""

    def __init__(self, default: object, limit: int, since: int) -> None:
        super().__init__(since)
        if not 0 < limit <= MAX_LIMIT:
            raise ValueError(f"a value's limit is 1 byte to {format_size(MAX_LIMIT)}, got {limit}")
        self.limit = limit
        try:
            self._default = jsonlike.encode(default, limit)
        except (TypeError, ValueError) as error:
            raise type(error)(f"a value's default{error}") from None

    @property
    def type_name(self) -> str:
        return f"value[{self.limit}]"

    def _first(self) -> object:
        return jsonlike.decode(self._default)

    def __set__(self, program: object, value: object) -> None:
        self._encode(value)
        program.__dict__[self.name] = value

    def stored(self, program: object) -> str:
        return self._encode(self.__get__(program, type(program)))

    def _encode(self, value: object) -> str:
        try:
            return jsonlike.encode(value, self.limit)
        except (TypeError, ValueError) as error:
            raise type(error)(f"value '{self.name}'{error}") from None

    def restore(self, program: object, stored: Any) -> None:
        program.__dict__[self.name] = jsonlike.decode(stored)


class Rng(MadeOnDemand):
    """See guest.rng()."""

    KINDS: ClassVar[dict[str, type]] = {"numpy": np.random.Generator, "random": random.Random}

    def __init__(self, seed: int | None, kind: Kind, since: int) -> None:
        super().__init__(since)
        if kind not in jsonlike.GENERATORS:
            raise ValueError(f"a generator's kind is one of {', '.join(jsonlike.GENERATORS)}, got '{kind}'")
        self.kind = kind
        self.seed = seed

    @property
    def type_name(self) -> str:
        return f"rng[{self.kind}]"

    def _first(self) -> object:
        make = np.random.default_rng if self.kind == "numpy" else random.Random
        return make(self.seed)

    def __set__(self, program: object, value: object) -> None:
        if not isinstance(value, self.KINDS[self.kind]):
            raise TypeError(f"rng '{self.name}' is {self.type_name}, got {type(value).__name__}")
        self._check(_state(value))
        program.__dict__[self.name] = value

    def _check(self, state: object) -> None:
        try:
            jsonlike.check_generator(self.kind, state)
        except ValueError:
            what = "a Generator with PCG64 (numpy.random.default_rng())" if self.kind == "numpy" else "a random.Random"
            raise TypeError(f"rng '{self.name}': expected {what}") from None

    def stored(self, program: object) -> str:
        return jsonlike.encode(_state(self.__get__(program, type(program))), jsonlike.GENERATOR_LIMIT)

    def restore(self, program: object, stored: Any) -> None:
        """Restore the state of the existing generator: the program may hold references to it."""
        generator, state = self.__get__(program, type(program)), jsonlike.decode(stored)
        self._check(state)
        if isinstance(generator, random.Random):
            generator.setstate(state)
        else:
            generator.bit_generator.state = state


def _state(generator: Any) -> object:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return {name: _plain(value) for name, value in generator.bit_generator.state.items()}


def _plain(value: Any) -> Any:
    """Convert NumPy numbers to Python's."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value.item() if isinstance(value, np.generic) else value
