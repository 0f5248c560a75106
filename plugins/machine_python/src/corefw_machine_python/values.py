"""guest.value, guest.rng and guest.section: state of variable length.

The first two are sent as text (see jsonlike), a section as the bytes that the program's own function returns.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from base64 import b64decode, b64encode
from collections.abc import Callable
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


class Unsavable(Exception):
    """What a section's save() returned cannot be sent."""


class OwnSection(MadeOnDemand):
    """See guest.section()."""

    def __init__(
        self,
        make: Callable[[], object],
        save: Callable[[Any], bytes],
        load: Callable[[bytes, int], object],
        versions: tuple[int, int],
        limit: int,
        since: int,
    ) -> None:
        """`versions` are the oldest that `load` reads and the one that `save` writes."""
        super().__init__(since)
        oldest, newest = versions
        if not 0 <= oldest <= newest < 1 << 32:
            raise ValueError(f"a section's versions are 0 <= minimum_version <= version < 2**32, got {versions}")
        if not 0 < limit <= MAX_LIMIT:
            raise ValueError(f"a section's limit is 1 byte to {format_size(MAX_LIMIT)}, got {limit}")
        for name, function in (("make", make), ("save", save), ("load", load)):
            if not callable(function):
                raise TypeError(f"a section's {name} is a function, got {function!r}")
        self.versions = versions
        self.limit = limit
        self._make, self._save, self._load = make, save, load

    @property
    def type_name(self) -> str:
        return f"section[{self.limit}]"

    def _first(self) -> object:
        return self._make()

    def __set__(self, program: object, value: object) -> None:
        program.__dict__[self.name] = value

    def stored(self, program: object) -> str:
        """Raises Unsavable, and what the program's function raises."""
        data = self._save(self.__get__(program, type(program)))
        if not isinstance(data, bytes | bytearray | memoryview):
            raise Unsavable(f"save() of section '{self.name}' returned {type(data).__name__}, expected bytes")
        if len(data) > self.limit:
            raise Unsavable(
                f"section '{self.name}' has {format_size(len(data))}, its limit is {format_size(self.limit)}"
                " (keep less in it, or give it a larger limit=)"
            )
        return f"{self.versions[1]}:{b64encode(data).decode()}"

    def restore(self, program: object, stored: Any) -> None:
        """Raises what the program's function raises."""
        version, _, data = stored.partition(":")
        program.__dict__[self.name] = self._load(b64decode(data), int(version))


def _state(generator: Any) -> object:
    if isinstance(generator, random.Random):
        return generator.getstate()
    return {name: _plain(value) for name, value in generator.bit_generator.state.items()}


def _plain(value: Any) -> Any:
    """Convert NumPy numbers to Python's."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value.item() if isinstance(value, np.generic) else value
