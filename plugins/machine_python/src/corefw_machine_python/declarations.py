"""What a program declares: arrays (its RAM), fields (its device state) and options (what --opt takes).

A declaration is a descriptor on the class. A wrong declaration raises TypeError or ValueError when the class is
created, a wrong value when it is assigned; the traceback ends in the program's own line.
"""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Protocol, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from corefw.errors import UsageError
from corefw.quantities import parse_size, parse_switch

Shape = int | tuple[int, ...]
Value = int | float | bool | bytes | str

INTEGERS: Final = {f"{sign}{bits}": (sign, bits) for sign in "ui" for bits in (8, 16, 32, 64)}
ALIASES: Final = {"double": "f64"}
_SIZED: Final = re.compile(r"(bytes|str)\[([1-9][0-9]*)\]\Z")
MAX_SIZED: Final = 1 << 20
"""Maximum bytes of a field; use an array for more."""


class Options(Mapping[str, Any]):
    """A program's options: `options["dirty-rate"]`, or `options.dirty_rate`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        for spelt in (name, name.replace("_", "-")):
            if spelt in self.__dict__.get("_values", {}):
                return self._values[spelt]
        raise AttributeError(f"no option '{name}' (the program declares: {', '.join(self) or 'none'})")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


_PARSERS: Final[Mapping[type, Callable[[str], object]]] = {bool: parse_switch, int: int, float: float, str: str}


class Option:
    """See guest.option()."""

    def __init__(self, name: str, default: object, kind: Callable[[str], object] | None, help_text: str) -> None:
        self.name = name
        self.help = help_text
        self._parse = kind or _PARSERS.get(type(default), str)
        self.default = self.parse(default) if isinstance(default, str) else default

    def parse(self, text: str) -> object:
        """Parse the text after `--opt NAME=`. Raises UsageError."""
        try:
            return self._parse(text)
        except UsageError as error:
            raise UsageError(f"option '{self.name}': {error}") from None
        except (ValueError, TypeError, ArithmeticError):
            kind = getattr(self._parse, "__name__", "value")
            like = f"as in {self.name}={self.default}" if hasattr(self, "default") else "its own default"
            raise UsageError(f"option '{self.name}': '{text}' is no {kind} ({like})") from None


class HasOptions(Protocol):
    """What a descriptor needs from its program."""

    options: Options


FORKED: Final = object()
"""Replaces an array in a process that the guest has forked."""


class Array:
    """See guest.array()."""

    def __init__(self, name: str, shape: Shape | Callable[[Any], Shape], dtype: DTypeLike) -> None:
        if not 0 < len(name.encode()) < 256:
            raise ValueError(f"an array's name has 1 to 255 bytes, got '{name}'")
        self.name = name
        self._shape = shape
        self.dtype = np.dtype(dtype)
        if self.dtype.hasobject:
            raise TypeError(f"array '{name}': Python objects ({self.dtype}) cannot be stored in RAM that moves")
        self.attribute = name

    def __set_name__(self, owner: type, attribute: str) -> None:
        self.attribute = attribute

    def shape(self, options: Options) -> tuple[int, ...]:
        """The shape for these options. Raises UsageError."""
        try:
            shape = self._shape(options) if callable(self._shape) else self._shape
            sizes = (shape,) if isinstance(shape, int) else tuple(operator.index(size) for size in shape)
        except UsageError:
            raise
        except Exception as error:  # noqa: BLE001 - the author's own function: it may raise anything
            raise UsageError(f"array '{self.name}' has no shape with these options: {error}") from None
        if any(size <= 0 for size in sizes):
            raise UsageError(f"array '{self.name}' would have the shape {sizes}: every size has to be at least 1")
        return sizes

    @overload
    def __get__(self, program: None, owner: type) -> Array: ...
    @overload
    def __get__(self, program: HasOptions, owner: type) -> NDArray[Any]: ...
    def __get__(self, program: HasOptions | None, owner: type) -> Array | NDArray[Any]:
        if program is None:
            return self
        array: Any = program.__dict__.get(self.attribute)
        if array is FORKED:
            raise RuntimeError(
                f"array '{self.name}' does not exist in a forked process: use threads, or"
                " multiprocessing.get_context('spawn') and give the processes copies"
            )
        if array is None:
            raise AttributeError(f"array '{self.name}' does not exist yet: use it in setup(), after_start() or tick()")
        found: NDArray[Any] = array
        return found

    def __set__(self, program: HasOptions, value: object) -> None:
        # `self.grid += 1` also assigns the array to itself.
        if value is not program.__dict__.get(self.attribute):
            name = self.attribute
            raise AttributeError(f"an array's memory cannot be replaced: write into it, as in self.{name}[...] = value")

    def bind(self, program: HasOptions, memory: NDArray[np.uint8]) -> None:
        """Make the attribute a view of the first bytes of this memory."""
        shape = self.shape(program.options)
        length = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        program.__dict__[self.attribute] = memory[:length].view(self.dtype).reshape(shape)


@dataclass(frozen=True, slots=True)
class FieldType:
    """The type of a field. `size` is in bytes, for "bytes" and "str"."""

    kind: str
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> FieldType:
        """ "u64", "f64", "bool", "bytes[16]", "str[40]". Raises ValueError."""
        kind = ALIASES.get(text, text)
        if kind in INTEGERS or kind in ("f64", "bool"):
            return cls(kind)
        sized = _SIZED.match(text)
        if sized is None or int(sized[2]) > MAX_SIZED:
            known = ", ".join([*INTEGERS, "f64", "bool", "bytes[N]", "str[N]"])
            raise ValueError(f"'{text}' is not a field type: expected one of {known} (N at most {MAX_SIZED})")
        return cls(sized[1], int(sized[2]))

    def __str__(self) -> str:
        return f"{self.kind}[{self.size}]" if self.size else self.kind

    @property
    def zero(self) -> Value:
        zeros: dict[str, Value] = {"f64": 0.0, "bool": False, "bytes": bytes(self.size), "str": ""}
        return zeros.get(self.kind, 0)

    def check(self, value: object) -> Value:
        """Convert a value to the form that is stored. Raises TypeError, ValueError with a phrase that follows the
        field's name."""
        if self.kind in INTEGERS:
            return self._check_integer(value)
        if self.kind == "f64":
            if not isinstance(value, int | float | np.number):
                raise TypeError(f"is an f64, got {value!r}")
            return float(value)
        if self.kind == "bool":
            if not isinstance(value, bool | np.bool_):
                raise TypeError(f"is bool, got {value!r}")
            return bool(value)
        return self._check_bytes(value)

    def _check_integer(self, value: object) -> int:
        sign, bits = INTEGERS[self.kind]
        low, high = (0, (1 << bits) - 1) if sign == "u" else (-(1 << bits - 1), (1 << bits - 1) - 1)
        try:
            number = operator.index(value)  # type: ignore[arg-type]  # whatever is no integer raises TypeError
        except TypeError:
            raise TypeError(f"is {self.kind}, got {value!r}") from None
        if not low <= number <= high:
            raise ValueError(f"is {self.kind}: {number} is not in {low} to {high}")
        return number

    def _check_bytes(self, value: object) -> bytes | str:
        text = isinstance(value, str)
        if text is not (self.kind == "str") or not isinstance(value, str | bytes | bytearray | memoryview):
            raise TypeError(f"is {self}, got {value!r}")
        data = value.encode() if isinstance(value, str) else bytes(value)
        if len(data) > self.size:
            raise ValueError(f"is {self}: {len(data)} bytes are too many")
        if isinstance(value, str):
            if "\0" in value:
                raise ValueError(f"is {self}: text with a NUL")
            return value
        return data.ljust(self.size, b"\0")


class Stored(ABC):
    """A declaration of device state.

    name    name of the attribute, also in the stream
    since   first version of the program that has it
    """

    def __init__(self, since: int) -> None:
        self.since = since
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def type_name(self) -> str:
        """The type as text, which fully determines the form in the stream."""

    @abstractmethod
    def stored(self, program: object) -> object:
        """The value in the form that the engine receives. Raises TypeError or ValueError if it cannot move."""

    @abstractmethod
    def restore(self, program: object, stored: Any) -> None:
        """Set the value from the form that stored() returned. Raises ValueError."""


class Field(Stored):
    """See guest.field()."""

    def __init__(self, kind: str, default: Value | None, since: int) -> None:
        super().__init__(since)
        self.type = FieldType.parse(kind)
        self.default = self.type.zero if default is None else self.type.check(default)

    @property
    def type_name(self) -> str:
        return str(self.type)

    def stored(self, program: object) -> object:
        value = self.__get__(program, type(program))
        if not self.type.size:
            return value
        data = value.encode() if isinstance(value, str) else bytes(value)
        return data.ljust(self.type.size, b"\0").hex()

    def restore(self, program: object, stored: Any) -> None:
        if self.type.size:
            data = bytes.fromhex(stored)
            stored = data.rstrip(b"\0").decode() if self.type.kind == "str" else data
        self.__set__(program, stored)

    @overload
    def __get__(self, program: None, owner: type) -> Field: ...
    @overload
    def __get__(self, program: object, owner: type) -> Any: ...
    def __get__(self, program: object | None, owner: type) -> Any:
        return self if program is None else program.__dict__.get(self.name, self.default)

    def __set__(self, program: object, value: Any) -> None:
        try:
            program.__dict__[self.name] = self.type.check(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"field '{self.name}' {error}") from None


@dataclass(frozen=True, slots=True)
class Declarations:
    """All declarations of a program class in source order, base classes first."""

    arrays: tuple[Array, ...]
    fields: tuple[Stored, ...]
    options: tuple[Option, ...]

    MAX_ARRAYS: ClassVar[int] = 250
    """The kernel passes at most 253 descriptors in one message."""

    @property
    def attributes(self) -> set[str]:
        """Attribute names of the arrays and fields."""
        return {one.attribute for one in self.arrays} | {one.name for one in self.fields}

    @classmethod
    def of(cls, program: type) -> Declarations:
        """Collect the declarations of a class. Raises ValueError if it declares a name twice."""
        found: dict[str, object] = {}
        for base in reversed(program.__mro__):
            found.update(vars(base))
        arrays = tuple(one for one in found.values() if isinstance(one, Array))
        options = tuple(one for one in found.values() if isinstance(one, Option))
        for what, names in (("arrays", [one.name for one in arrays]), ("options", [one.name for one in options])):
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"two {what} have the name '{min(twice)}'")
        if len(arrays) > cls.MAX_ARRAYS:
            raise ValueError(f"{len(arrays)} arrays are more than the {cls.MAX_ARRAYS} that a program can have")
        return cls(arrays, tuple(one for one in found.values() if isinstance(one, Stored)), options)

    def parse_options(self, given: Mapping[str, str]) -> Options:
        """Parse the values of `--opt`, adding defaults. Raises UsageError."""
        known = {option.name: option for option in self.options}
        if wrong := next((name for name in given if name not in known), None):
            listed = ", ".join(known) or "none"
            raise UsageError(f"the program has no option '{wrong}' (its options: {listed})")
        return Options(
            {name: option.parse(given[name]) if name in given else option.default for name, option in known.items()}
        )


def size(text: str) -> int:
    """ "512M" -> bytes, for guest.option(kind=guest.size)."""
    return parse_size(text)
