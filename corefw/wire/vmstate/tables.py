"""A device's table, and the structs and subsections in it.

Invariant: one VMState drives load, save and the description, so they cannot disagree. A table is a constant and holds
no state. Source: QEMU 7.2, migration/vmstate.c.

On the wire a table is its fields in order, then those of its subsections that are needed: u8 0x05, string name, u32
version, and the subsection's own table. No length is written, so a reader cannot skip a subsection that it does not
know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from corefw.errors import MachineError, RemoteStreamError, StreamError
from corefw.wire.constants import SectionType
from corefw.wire.stream import StreamReader, StreamWriter
from corefw.wire.vmstate.arrays import describe_elements
from corefw.wire.vmstate.fields import Counted, Description, Field


class Refused(StreamError):
    """Raised by a post_load for a state that is not acceptable. `expected` and `got` are phrases."""

    def __init__(self, expected: str, got: str) -> None:
        self.expected = expected
        self.got = got
        super().__init__(f"expected {expected}, got {got}")


@dataclass(frozen=True, slots=True, kw_only=True)
class VMState:
    """QEMU's VMStateDescription.

    name                 of the table; a subsection's begins with its parent's, as in "rtc/alarm"
    version_id           the version that save writes
    minimum_version_id   the oldest that load understands; version_id by default
    fields, subsections  see the module
    needed               called with the state: whether the section or subsection is sent at all
    pre_load, post_load  called around loading: pre_load(state), post_load(state, version_id). To refuse the state that
                         came, raise Refused, or any StreamError with the reason
    pre_save, post_save  called around saving: pre_save(state), post_save(state); post_save after an error too
    unmigratable         why a device with this table cannot migrate, or None
    priority             the section's place in the stream (section.Priority); None: the usual place of a device
    """

    name: str = field(kw_only=False)
    version_id: int = 1
    minimum_version_id: int | None = None
    fields: tuple[Field, ...] = ()
    subsections: tuple[VMState, ...] = ()
    needed: Callable[[Any], bool] | None = None
    pre_load: Callable[[Any], None] | None = None
    post_load: Callable[[Any, int], None] | None = None
    pre_save: Callable[[Any], None] | None = None
    post_save: Callable[[Any], None] | None = None
    unmigratable: str | None = None
    priority: int | None = None
    _shown: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ValueError for a table that cannot work, which is a bug of its author."""
        if not 0 < len(self.name.encode()) < 256:
            raise ValueError(f"a table's name has 1 to 255 bytes, got '{self.name}'")
        if not 0 <= self.oldest <= self.version_id < 1 << 32:
            raise ValueError(f"table '{self.name}' has version {self.version_id}, but reads {self.oldest} and later")
        for sub in self.subsections:
            if not sub.name.startswith(self.name) or sub.name == self.name:
                raise ValueError(f"a subsection of '{self.name}' is called '{self.name}/...', not '{sub.name}'")
        if len({sub.name for sub in self.subsections}) < len(self.subsections):
            raise ValueError(f"table '{self.name}' has two subsections of one name")
        object.__setattr__(self, "_shown", tuple(_shown([row.name for row in self.fields])))

    @property
    def oldest(self) -> int:
        """The oldest version that load understands."""
        return self.version_id if self.minimum_version_id is None else self.minimum_version_id

    @property
    def compressible(self) -> bool:
        """Whether several structs with this table may be described as one."""
        return not self.subsections and all(row.compressible for row in self.fields)

    def is_needed(self, state: object) -> bool:
        return self.needed is None or self.needed(state)

    # -- load and save ---------------------------------------------------------------------------------------------

    def load(self, reader: StreamReader, state: object, version_id: int) -> None:
        """Read a section's whole body into `state`; `version_id` is what its header says.

        Raises RemoteStreamError with the reader's `where`; the state is then half loaded, and to be thrown away. Reads
        not one byte too many, but looks at the next one: in a stream something always follows a section, and at the end
        of the stream a subsection may be missing.
        """
        seen = self._load(reader, state, version_id)
        if _is_subsection(reader):
            raise reader.error(self._expected(seen), f"subsection '{_peek_name(reader)}'")
        if not reader.peek(1):
            raise reader.error(f"what follows '{self.name}'", "the end of the stream")

    def save(self, writer: StreamWriter, state: object) -> Description:
        """Write a section's whole body. Returns its description: vmsd_name, version, fields, and subsections if any.

        Raises MachineError naming device and field for a value that does not fit.
        """
        return self._save(writer, state, f"device '{self.name}'")

    def _load(self, reader: StreamReader, state: object, version_id: int) -> set[str]:
        """Load a table that may be inside another one. Returns the names of the subsections that came."""
        if not self.oldest <= version_id <= self.version_id:
            versions = " to ".join(str(version) for version in sorted({self.oldest, self.version_id}))
            raise reader.error(f"version {versions} of '{self.name}'", f"version {version_id}")
        if self.pre_load is not None:
            self.pre_load(state)
        for row in self.fields:
            if row.present(state, version_id):
                row.load(reader, state)
        seen = self._load_subsections(reader, state)
        if self.post_load is not None:
            self._after_load(self.post_load, reader, state, version_id)
        return seen

    def _after_load(
        self, post_load: Callable[[Any, int], None], reader: StreamReader, state: object, version_id: int
    ) -> None:
        try:
            post_load(state, version_id)
        except RemoteStreamError:
            raise
        except Refused as error:
            raise reader.error(error.expected, error.got) from None
        except StreamError as error:
            raise reader.error(f"a state that '{self.name}' accepts", str(error)) from None

    def _save(self, writer: StreamWriter, state: object, where: str) -> Description:
        if self.pre_save is not None:
            self.pre_save(state)
        try:
            fields: list[Description] = []
            for row, name in zip(self.fields, self._shown, strict=True):
                if row.present(state, self.version_id):
                    fields += [{"name": name, **entry} for entry in row.save(writer, state, where)]
            described: Description = {"vmsd_name": self.name, "version": self.version_id, "fields": fields}
            subsections = [
                sub._save_subsection(writer, state, where) for sub in self.subsections if sub.is_needed(state)
            ]
            if subsections:
                described["subsections"] = subsections
            return described
        finally:
            if self.post_save is not None:
                self.post_save(state)

    # -- subsections -----------------------------------------------------------------------------------------------

    def _load_subsections(self, reader: StreamReader, state: object) -> set[str]:
        """Load subsections until one repeats. That one belongs to the next struct if the table has no fields; otherwise
        load() refuses it."""
        seen: set[str] = set()
        while (name := self._next_subsection(reader)) is not None and name not in seen:
            table = next((sub for sub in self.subsections if sub.name == name), None)
            if table is None:
                raise reader.error(self._expected(seen), f"subsection '{name}'")
            seen.add(name)
            reader.u8("the subsection's type")
            reader.string("the subsection's name")
            version_id = reader.be32("the subsection's version")
            with _within(reader, f"subsection '{name}'"):
                table._load(reader, state, version_id)
        return seen

    def _next_subsection(self, reader: StreamReader) -> str | None:
        """The name of the subsection that comes next, if it is this table's: one that it knows, or that begins with its
        own name and a slash.

        Inside a struct an 0x05 may also be the next field's first byte; as in QEMU, the name tells them apart. It looks
        no further than necessary: a source that waits for an answer may not send any more bytes.
        """
        mine = self.name.encode()
        if not _is_subsection(reader) or _peek_byte(reader, 1) <= len(mine):
            return None
        if any(_peek_byte(reader, 2 + i) != byte for i, byte in enumerate(mine)):
            return None
        name = _peek_name(reader)
        mine_by_name = name.startswith(self.name + "/") or any(sub.name == name for sub in self.subsections)
        return name if mine_by_name else None

    def _expected(self, seen: set[str]) -> str:
        rest = [f"'{sub.name}'" for sub in self.subsections if sub.name not in seen]
        return f"the end of '{self.name}'" + (f" or one of its subsections {', '.join(rest)}" if rest else "")

    def _save_subsection(self, writer: StreamWriter, state: object, where: str) -> Description:
        writer.u8(SectionType.SUBSECTION)
        writer.string(self.name)
        writer.be32(self.version_id)
        return self._save(writer, state, where)


@dataclass(frozen=True, slots=True)
class Struct(Field):
    """An object inside the state, with a table of its own, always in that table's current version.

    make   makes the object if the attribute is missing or None; without `make` the object has to exist before loading
    """

    table: VMState
    make: Callable[[], object] | None = field(default=None, kw_only=True)

    @property
    def compressible(self) -> bool:
        return self.exists is None and self.table.compressible

    def load(self, reader: StreamReader, state: object) -> None:
        inner = self.held(state)
        if inner is None and self.make is not None:
            inner = self.make()
            self.set(state, inner)
        if inner is None:
            raise MachineError(f"{reader.where}: '{self.name}' is not there to be loaded, and its table has no `make`")
        with _within(reader, self.name):
            self.table._load(reader, inner, self.table.version_id)

    def save(self, writer: StreamWriter, state: object, where: str) -> list[Description]:
        return [_save_struct(self.table, writer, self.get(state, where), f"{where}, {self.name}")]


@dataclass(frozen=True, slots=True)
class StructArray(Counted):
    """A sequence of objects inside the state, all with the same table.

    make   makes an object; needed if the sequence may have another length than what arrives, and then becomes a list
    """

    table: VMState
    make: Callable[[], object] | None = field(default=None, kw_only=True)

    @property
    def compressible(self) -> bool:
        return self.exists is None and self.table.compressible

    def load(self, reader: StreamReader, state: object) -> None:
        count = self.count_to_load(reader, state)
        here = self.held(state)
        make = self.make
        if here is not None and len(here) == count:
            for i, inner in enumerate(here):
                self._load_element(reader, inner, i)
        elif make is not None:
            made: list[object] = []
            self.set(state, made)
            for i in range(count):  # one by one: memory grows with what has arrived
                made.append(make())
                self._load_element(reader, made[-1], i)
        else:
            held = 0 if here is None else len(here)
            raise reader.error(f"{held} elements of {self.what}, as there are here", str(count))

    def _load_element(self, reader: StreamReader, inner: object, index: int) -> None:
        with _within(reader, f"{self.name}[{index}]"):
            self.table._load(reader, inner, self.table.version_id)

    def save(self, writer: StreamWriter, state: object, where: str) -> list[Description]:
        inner = self.get(state, where)
        self.check_length(len(inner), self.count_to_save(state, where), where)
        saved = [_save_struct(self.table, writer, one, f"{where}, {self.name}[{i}]") for i, one in enumerate(inner)]
        return describe_elements(saved, self.compressible)


def _save_struct(table: VMState, writer: StreamWriter, state: object, where: str) -> Description:
    start = writer.position
    described = table._save(writer, state, where)
    return {"type": "struct", "struct": described, "size": writer.position - start}


def _shown(names: list[str]) -> Iterator[str]:
    """The fields' names for the description: as in QEMU, names that occur several times are numbered."""
    for i, name in enumerate(names):
        yield name if names.count(name) == 1 else f"{name}[{names[:i].count(name)}]"


def _is_subsection(reader: StreamReader) -> bool:
    return reader.peek(1) == bytes([SectionType.SUBSECTION])


def _peek_byte(reader: StreamReader, index: int) -> int:
    """Peek at a byte of a possible subsection head. Raises RemoteStreamError if the stream ends before it."""
    head = reader.peek(index + 1)
    if len(head) <= index:
        raise reader.error("the head of a subsection", f"the end of the stream after {len(head)} bytes")
    return head[index]


def _peek_name(reader: StreamReader) -> str:
    """The name of the subsection that comes next."""
    length = _peek_byte(reader, 1)
    if length:
        _peek_byte(reader, 1 + length)
    return reader.peek(2 + length)[2:].decode(errors="replace")


@contextmanager
def _within(reader: StreamReader, part: str) -> Iterator[None]:
    """Name a part of what is being read in the reader's messages."""
    outer = reader.where
    reader.where = f"{outer}, {part}"
    try:
        yield
    finally:
        reader.where = outer
