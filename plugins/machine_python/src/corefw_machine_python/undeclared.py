"""Finds undeclared state of a program, which a migration would leave behind.

What exists after __init__() also exists at the destination, with the same contents: attributes of the object and of its
classes, and globals of the modules that define them. Anything that appears or changes afterwards is state, unless it is
declared, after_start() assigns it, or before_stop() deletes it.

Contents are compared by digests, up to `NODES` objects deep: containers, arrays, random generators, and the program's
own objects, classes and functions. Other objects (loggers, locks, connections, functools caches) are compared by
identity. Runs in the guest's process, between two ticks.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import itertools
import queue
import random
import sys
import types
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import date, timedelta
from datetime import time as clock_time
from numbers import Number
from typing import Any, Final

import numpy as np

from corefw_machine_python.guest import Program

NODES: Final = 2_000
"""Maximum objects in one digest; of a larger container, the length and the first objects count."""

DEPTH: Final = 20
SAMPLE: Final = 1 << 16
"""Maximum bytes of a string or array in a digest; of longer ones, the length and a sample of this size count."""

_ALWAYS: Final = frozenset({"options", "finished"})
_NAMESPACES: Final = (type, types.ModuleType)


def message(program: str, names: Iterable[str]) -> str:
    """The error message: what is undeclared, and what to do."""
    return (
        f"program '{program}' has state that would not move: {', '.join(names)} (declare it with guest.field,"
        " guest.array, guest.value or guest.rng, or set it in after_start(); --allow-undeclared leaves it"
        " behind)"
    )


class Place:
    """A namespace: the program, one of its classes, or one of its modules."""

    def __init__(self, owner: object, prefix: str, ignored: frozenset[str]) -> None:
        self.prefix = prefix
        self._owner = owner
        self._ignored = ignored

    def names(self) -> dict[str, object]:
        """The names that exist now and may be state."""
        found = dict(vars(self._owner))
        if not isinstance(self._owner, _NAMESPACES):
            found |= _slots(self._owner)
        return {name: value for name, value in found.items() if name not in self._ignored and not _dunder(name)}


class Watch:
    """Watches one program for undeclared state. Created after __init__() has returned and the arrays are mapped."""

    def __init__(self, program: Program, declared: Iterable[str]) -> None:
        self._program = program
        mine = [one for one in type(program).__mro__ if issubclass(one, Program) and one is not Program]
        modules = {one.__module__: sys.modules[one.__module__] for one in mine if one.__module__ in sys.modules}
        self._own = frozenset(modules)
        names = frozenset(declared)
        self._places = (
            Place(program, "self", names | _ALWAYS | _lazy(mine)),
            *(Place(one, one.__name__, names | {"_abc_impl"}) for one in mine),
            *(Place(module, name, frozenset()) for name, module in modules.items()),
        )
        self._made_again = {(0, name) for name in _deleted_by_before_stop(mine)}
        self._first = {key: self._digest(value) for key, value in self._everything()}

    def found(self) -> list[str]:
        """Names of undeclared state, such as "self.items", "Heat.total", "heat.counter"."""
        return [
            f"{self._places[place].prefix}.{name}"
            for (place, name), value in self._everything()
            if (place, name) not in self._made_again and self._first.get((place, name)) != self._digest(value)
        ]

    @contextmanager
    def after_start(self) -> Iterator[None]:
        """Context for after_start(): what it assigns, or changes in existing objects, is made again at the destination,
        so it is not state."""
        before = dict(self._everything())
        digests = {key: self._digest(value) for key, value in before.items() if key in self._first}
        assigned: set[str] = set()
        with _noting_assignments(self._program, assigned):
            yield
        self._made_again |= {(0, name) for name in assigned}
        for key, value in self._everything():
            if key not in before or before[key] is not value:
                self._made_again.add(key)
            elif key in digests and (now := self._digest(value)) != digests[key]:
                self._first[key] = now

    def _everything(self) -> Iterator[tuple[tuple[int, str], object]]:
        for number, place in enumerate(self._places):
            for name, value in place.names().items():
                if not isinstance(value, types.ModuleType):
                    yield (number, name), value

    def _digest(self, value: object) -> bytes:
        return _Digest(self._own).of(value)


def _dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _lazy(classes: Iterable[type]) -> frozenset[str]:
    """Names of cached properties, which are computed again on demand."""
    return frozenset(
        name for one in classes for name, value in vars(one).items() if isinstance(value, functools.cached_property)
    )


def _slots(owner: object) -> dict[str, object]:
    """Values in __slots__ that are set."""
    names = [
        name
        for one in type(owner).__mro__
        for name, value in vars(one).items()
        if isinstance(value, types.MemberDescriptorType) and one.__module__ != "builtins"
    ]
    return {name: getattr(owner, name) for name in names if hasattr(owner, name)}


def _deleted_by_before_stop(classes: Iterable[type]) -> set[str]:
    """Attributes that before_stop() deletes with `del self.NAME`: they never exist when the program moves."""
    codes = [code for one in classes if (code := getattr(vars(one).get("before_stop"), "__code__", None))]
    return {str(step.argval) for code in codes for step in dis.get_instructions(code) if step.opname == "DELETE_ATTR"}


@contextmanager
def _noting_assignments(program: Program, names: set[str]) -> Iterator[None]:
    """Collect the names that are assigned on the program, even if to the same object."""

    def note(self: Program, name: str, value: object) -> None:
        if self is program:
            names.add(name)
        object.__setattr__(self, name, value)

    # Only during after_start(): assignments in a tick cost nothing extra.
    setattr(Program, "__setattr__", note)  # noqa: B010 - mypy refuses to assign a method
    try:
        yield
    finally:
        del Program.__setattr__


class _Digest:
    """Digest of a value and everything it contains."""

    def __init__(self, own: frozenset[str]) -> None:
        self._own = own
        self._left = NODES
        self._hash = hashlib.blake2b(digest_size=16)
        self._seen: set[int] = set()

    def of(self, value: object) -> bytes:
        try:
            self._add(value, 0)
        except Exception:  # noqa: BLE001 - a user's object may raise anything when inspected, or change meanwhile
            self._token("?")
        return self._hash.digest()

    def _token(self, *parts: object) -> None:
        self._hash.update(repr(parts).encode("utf-8", "backslashreplace"))

    def _add(self, value: object, depth: int) -> None:
        self._left -= 1
        kind = type(value)
        self._token(kind.__qualname__)
        if self._left < 0 or depth > DEPTH:
            return
        if isinstance(value, int):
            self._token(hex(value))
        elif value is None or isinstance(value, float | complex):
            self._token(value)
        elif isinstance(value, str):
            self._sample(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, bytes | bytearray | array):
            self._sample(memoryview(value).cast("B") if len(value) else b"")
        elif isinstance(value, np.ndarray | np.generic):
            self._add_array(np.asarray(value))
        elif id(value) in self._seen:
            self._token("again")
        elif not self._add_inside(value, depth + 1):
            self._token(id(value))

    def _add_inside(self, value: object, depth: int) -> bool:
        """Add a value that contains others; False if it is not inspected."""
        self._seen.add(id(value))
        if isinstance(value, dict | types.MappingProxyType):
            self._token(len(value))
            for key, inner in itertools.islice(list(value.items()), max(0, self._left)):
                self._add(key, depth)
                self._add(inner, depth)
        elif isinstance(value, list | tuple | deque):
            self._token(len(value))
            for inner in itertools.islice(list(value), max(0, self._left)):
                self._add(inner, depth)
        elif isinstance(value, set | frozenset):
            elements = list(itertools.islice(list(value), max(0, self._left)))
            self._left -= len(elements)
            self._token(len(value), *sorted(_Digest(self._own).of(element) for element in elements))
        elif isinstance(value, itertools.count | Number | date | clock_time | timedelta):
            self._token(repr(value))
        elif (held := _held(value)) is not None:
            self._add(held, depth)
        elif isinstance(value, types.FunctionType):
            return self._is_own(value) and self._add_function(value, depth)
        elif isinstance(value, type):
            return self._is_own(value) and self._add_class(value, depth)
        elif self._is_own(type(value)) and not isinstance(value, Program):
            lazy = _lazy(type(value).__mro__)
            fields = dict(getattr(value, "__dict__", {})) | _slots(value)
            self._add({name: inner for name, inner in fields.items() if name not in lazy}, depth)
        else:
            return False
        return True

    def _is_own(self, value: type | types.FunctionType) -> bool:
        return value.__module__ in self._own

    def _add_function(self, value: types.FunctionType, depth: int) -> bool:
        """Add what a function keeps between calls: defaults, closure variables, attributes."""
        self._token(id(value.__code__))
        self._add((value.__defaults__, value.__kwdefaults__, vars(value)), depth)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                self._add(cell.cell_contents, depth)
        return True

    def _add_class(self, value: type, depth: int) -> bool:
        """Add the attributes of a class, except an Enum, which caches lookups in itself, and a Program, which is a
        Place of its own."""
        if issubclass(value, enum.Enum | Program):
            return False
        self._token(id(value))
        self._add({name: inner for name, inner in vars(value).items() if not _dunder(name)}, depth)
        return True

    def _add_array(self, value: np.ndarray[Any, Any]) -> None:
        self._token(value.dtype.str, value.shape)
        if value.dtype.hasobject:
            self._token(id(value))
        elif value.size:
            flat = value.reshape(-1)
            step = max(1, value.nbytes // SAMPLE)
            self._token(zlib.crc32(np.ascontiguousarray(flat[::step]).tobytes()[:SAMPLE]), flat[-1].tobytes())

    def _sample(self, data: bytes | memoryview) -> None:
        step = max(1, len(data) // SAMPLE)
        self._token(len(data), zlib.crc32(bytes(data[::step])), bytes(data[-8:]))


def _held(value: object) -> object | None:
    """The contents of a library's object; None if it is not inspected."""
    match value:
        case types.MethodType():
            return value.__self__, value.__func__
        case types.BuiltinMethodType():
            return value.__self__, value.__name__
        case functools.partial():
            return value.func, value.args, value.keywords
        case types.SimpleNamespace():
            return vars(value)
        case queue.Queue():
            return deque(value.queue)
    return _generator_state(value)


def _generator_state(value: object) -> object | None:
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        state: object = value.bit_generator.state
        return state
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    return None
