"""The fields of a table: each reads one attribute of the state from the stream, and writes it there.

Invariant: `load` and `save` of a field agree byte for byte. A length that came from the peer is compared with the
field's `limit` before anything is allocated. Source: QEMU 7.2, VMSTATE_* (include/migration/vmstate.h).

    Scalar      VMSTATE_UINT32 and the like; equal=True is VMSTATE_UINT32_EQUAL
    Array       VMSTATE_UINT32_ARRAY, and VMSTATE_VARRAY if the count is another attribute      (arrays.py)
    Buffer      VMSTATE_BUFFER, and VMSTATE_VBUFFER if the size is another attribute
    Unused      VMSTATE_UNUSED
    Struct      VMSTATE_STRUCT                                                                    (tables.py)
    StructArray VMSTATE_STRUCT_ARRAY, VMSTATE_STRUCT_VARRAY                                       (tables.py)
    Validate    VMSTATE_VALIDATE

Threads: a table is immutable and may be shared; a state belongs to one thread at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from corefw.errors import MachineError, RemoteStreamError
from corefw.wire.stream import StreamReader, StreamWriter
from corefw.wire.vmstate.kinds import Kind, pack_scalar

Description = dict[str, Any]
"""One object of the JSON at the end of the stream."""

Exists = Callable[[Any, int], bool]
"""(state, version_id) -> whether the field is in the stream (QEMU's field_exists)."""

LARGE: Final = 1 << 16
"""Fields of this many bytes or more are sent from where they are instead of being copied into the writer's buffer."""


@dataclass(frozen=True, slots=True)
class Field(ABC):
    """One row of a table.

    name        in the description and in messages
    attribute   of the state; by default it has the field's name
    since       the first version of the table that has the field
    exists      if given, it alone decides whether the field is there; when loading it sees the fields before this one
    """

    name: str
    attribute: str = field(default="", kw_only=True)
    since: int = field(default=0, kw_only=True)
    exists: Exists | None = field(default=None, kw_only=True)

    def present(self, state: object, version_id: int) -> bool:
        return self.since <= version_id if self.exists is None else self.exists(state, version_id)

    @property
    def compressible(self) -> bool:
        """Whether several elements may be described as one (QEMU's vmsd_can_compress)."""
        return self.exists is None

    @property
    def what(self) -> str:
        return f"field '{self.name}'"

    @abstractmethod
    def load(self, reader: StreamReader, state: object) -> None:
        """Read the field into `state`. Raises RemoteStreamError."""

    @abstractmethod
    def save(self, writer: StreamWriter, state: object, where: str) -> list[Description]:
        """Write the field. Returns its entries in the description, without their name. Raises MachineError for a value
        that does not fit; the message begins with `where` ("device 'rtc'")."""

    def get(self, state: object, where: str) -> Any:
        """The attribute's value. Raises MachineError if the state has no such attribute."""
        return attribute_of(state, self.attribute or self.name, where)

    def held(self, state: object) -> Any:
        """The attribute's value, or None if the state has no such attribute."""
        return getattr(state, self.attribute or self.name, None)

    def set(self, state: object, value: object) -> None:
        setattr(state, self.attribute or self.name, value)


def attribute_of(state: object, name: str, where: str) -> Any:
    try:
        return getattr(state, name)
    except AttributeError:
        raise MachineError(f"{where}: the state, a {type(state).__name__}, has no attribute '{name}'") from None


@dataclass(frozen=True, slots=True)
class Scalar(Field):
    """One number or truth value. Loading makes the attribute an int, a bool or a float.

    equal   the value that arrives has to equal the destination's (a size, an address)
    """

    kind: Kind
    equal: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.equal and not self.kind.layout.equal_name:
            raise ValueError(f"field '{self.name}': QEMU has no {self.kind} that must be equal")

    def load(self, reader: StreamReader, state: object) -> None:
        at, layout = reader.offset, self.kind.layout
        data = reader.read(layout.size, self.what)
        if self.kind is Kind.BOOL and data[0] > 1:
            raise RemoteStreamError(at, reader.where, f"0 or 1 in {self.what}", str(data[0]))
        (value,) = layout.struct.unpack(data)
        if self.equal and value != (here := self.get(state, reader.where)):
            raise RemoteStreamError(at, reader.where, f"{here} in {self.what}, as it is here", str(value))
        self.set(state, value)

    def save(self, writer: StreamWriter, state: object, where: str) -> list[Description]:
        layout = self.kind.layout
        writer.write(pack_scalar(layout, self.get(state, where), f"{where}, {self.what}"))
        return [{"type": layout.equal_name if self.equal else layout.type_name, "size": layout.size}]


@dataclass(frozen=True, slots=True)
class Counted(Field, ABC):
    """A field that has a length: a number, or the name of an attribute that was loaded earlier.

    limit   the largest length to accept; required if the length comes from the stream
    """

    count: int | str
    limit: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.count, str) and self.limit is None:
            raise ValueError(f"field '{self.name}' gets its length from the stream: give it a limit")
        if isinstance(self.count, int) and (self.limit is not None or self.count < 0):
            raise ValueError(f"field '{self.name}': a fixed length is not negative and has no limit")

    def count_to_load(self, reader: StreamReader, state: object) -> int:
        if isinstance(self.count, int):
            return self.count
        count = attribute_of(state, self.count, reader.where)
        assert self.limit is not None
        if not isinstance(count, int | np.integer) or not 0 <= count <= self.limit:
            raise reader.error(f"a length from 0 to {self.limit} for {self.what}", f"{self.count} = {count!r}")
        return int(count)

    def count_to_save(self, state: object, where: str) -> int:
        if isinstance(self.count, int):
            return self.count
        count = attribute_of(state, self.count, where)
        assert self.limit is not None
        if not isinstance(count, int | np.integer) or not 0 <= count <= self.limit:
            raise MachineError(f"{where}, {self.what}: {self.count} is {count!r}, expected 0 to {self.limit}")
        return int(count)

    def check_length(self, length: int, count: int, where: str) -> None:
        if length != count:
            reason = "" if isinstance(self.count, int) else f" as '{self.count}' says"
            raise MachineError(f"{where}, {self.what}: has {length} elements, expected {count}{reason}")


@dataclass(frozen=True, slots=True)
class Buffer(Counted):
    """Bytes. A bytearray, a writable memoryview or a NumPy array of that many bytes is filled in place; any other
    attribute becomes `bytes`. `limit` is a number of bytes."""

    def load(self, reader: StreamReader, state: object) -> None:
        count = self.count_to_load(reader, state)
        view = _bytes_of(self.held(state))
        if view is not None and not view.readonly and view.nbytes == count:
            reader.read_into(view, self.what)
        else:
            self.set(state, reader.read(count, self.what))

    def save(self, writer: StreamWriter, state: object, where: str) -> list[Description]:
        value = self.get(state, where)
        data = _bytes_of(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
        if data is None:
            raise MachineError(f"{where}, {self.what}: expected bytes, got {type(value).__name__}")
        self.check_length(data.nbytes, self.count_to_save(state, where), where)
        write(writer, data)
        return [{"type": "buffer", "size": data.nbytes}]


@dataclass(frozen=True, slots=True)
class Unused(Field):
    """Bytes that only older versions used: zeros are sent, anything is accepted."""

    size: int
    name: str = field(default="unused", kw_only=True)

    def load(self, reader: StreamReader, state: object) -> None:
        reader.read(self.size, self.what)

    def save(self, writer: StreamWriter, state: object, where: str) -> list[Description]:
        write(writer, bytes(self.size))
        return [{"type": "unused_buffer", "size": self.size}]


@dataclass(frozen=True, slots=True)
class Validate(Field):
    """A check without bytes: `test(state)` has to hold after the fields before it, when loading and when saving.

    name   what is required, as a phrase: "fewer columns than 100"
    """

    test: Callable[[Any], bool]

    @property
    def compressible(self) -> bool:
        return False  # QEMU's VMSTATE_VALIDATE has a field_exists

    def load(self, reader: StreamReader, state: object) -> None:
        if not self.test(state):
            raise reader.error(self.name, "a state that is different")

    def save(self, writer: StreamWriter, state: object, where: str) -> list[Description]:
        if not self.test(state):
            raise MachineError(f"{where}: expected {self.name}, the state is different")
        return []


def write(writer: StreamWriter, data: bytes | memoryview) -> None:
    """Write data: small data through the writer's buffer, large data from where it is."""
    if len(data) < LARGE:
        writer.write(data)
    else:
        writer.payload(data)


def _bytes_of(value: object) -> memoryview | None:
    """The object's own memory as bytes; None if it has none, or not in one piece."""
    if isinstance(value, np.ndarray):
        return value.reshape(-1).view(np.uint8).data if value.flags.c_contiguous else None
    if not isinstance(value, bytes | bytearray | memoryview):
        return None
    view = memoryview(value)
    if not view.c_contiguous:
        return None
    return view.cast("B") if view.nbytes else memoryview(b"")  # an empty view cannot be cast
