"""Arrays of scalars, read, byte-swapped and written in one go however many elements they have.

A NumPy array that has as many elements as arrive, and a dtype that holds every value of the kind, is filled in place,
so that other references to it see the new values. A list stays a list, a tuple a tuple, and so on; anything else
becomes a NumPy array. Values to be sent are checked for range first, unless their dtype always fits.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from corefw.errors import MachineError, RemoteStreamError
from corefw.wire.stream import StreamReader, StreamWriter
from corefw.wire.vmstate.fields import Counted, Description, write
from corefw.wire.vmstate.kinds import Kind, Layout, pack_array, pack_sequence

_SWAPPED: Final = sys.byteorder == "little"


@dataclass(frozen=True, slots=True)
class Array(Counted):
    """Scalars of one kind in a NumPy array of any shape, a list, a tuple, an array.array, or bytes for u8. `limit` is a
    number of elements."""

    kind: Kind

    def load(self, reader: StreamReader, state: object) -> None:
        count, layout = self.count_to_load(reader, state), self.kind.layout
        here = self.held(state)
        if isinstance(here, np.ndarray) and here.size == count and here.flags.writeable:
            if self._fills_straight(here):
                self._load_straight(reader, here)
                return
            if np.can_cast(layout.dtype, here.dtype, "safe"):
                here[...] = self._read(reader, layout, count).reshape(here.shape)
                return
        values = self._read(reader, layout, count)
        if isinstance(here, list | tuple):
            self.set(state, type(here)(values.tolist()))
        elif isinstance(here, bytes | bytearray) and self.kind is Kind.U8:
            self.set(state, type(here)(values.tobytes()))
        elif isinstance(here, array.array):
            self.set(state, array.array(here.typecode, values.tolist()))
        else:
            self.set(state, values.astype(layout.dtype))

    def _fills_straight(self, here: np.ndarray[Any, Any]) -> bool:
        """Whether the stream's bytes may be read straight into the array's memory. (Booleans are checked first.)"""
        same = here.dtype == self.kind.layout.dtype and here.flags.c_contiguous
        return same and here.size > 0 and self.kind is not Kind.BOOL

    def _load_straight(self, reader: StreamReader, here: np.ndarray[Any, Any]) -> None:
        reader.read_into(here.reshape(-1).view(np.uint8).data, self.what)
        if _SWAPPED:
            here.byteswap(inplace=True)

    def _read(self, reader: StreamReader, layout: Layout, count: int) -> np.ndarray[Any, Any]:
        at = reader.offset
        data = reader.read(count * layout.size, self.what)
        if self.kind is Kind.BOOL and max(data, default=0) > 1:
            index = next(i for i, byte in enumerate(data) if byte > 1)
            raise RemoteStreamError(at + index, reader.where, f"0 or 1 in {self.what}", str(data[index]))
        return np.frombuffer(data, layout.wire_dtype)

    def save(self, writer: StreamWriter, state: object, where: str) -> list[Description]:
        value, layout = self.get(state, where), self.kind.layout
        count = self.count_to_save(state, where)
        there = f"{where}, {self.what}"
        if isinstance(value, np.ndarray):
            self.check_length(value.size, count, where)
            data = pack_array(layout, value, there).view(np.uint8).data
        elif isinstance(value, bytes | bytearray) and self.kind is Kind.U8:
            self.check_length(len(value), count, where)
            data = memoryview(value)
        elif isinstance(value, Sequence | array.array) and not isinstance(value, str):
            self.check_length(len(value), count, where)
            data = memoryview(pack_sequence(layout, value, there))
        else:
            raise MachineError(f"{there}: expected an array or a sequence, got {type(value).__name__}")
        write(writer, data)
        element: Description = {"type": layout.type_name, "size": layout.size}
        if self.compressible and count > 1:
            return [{"array_len": count, **element}]  # all elements are alike, and there may be millions
        return describe_elements([element] * count, self.compressible)


def describe_elements(elements: list[Description], compressible: bool) -> list[Description]:
    """Describe an array as QEMU does: one entry with array_len if the elements may be compressed and are alike, or else
    an entry with an index for each. A single element is described as if it were not an array; an empty array is left
    out."""
    if len(elements) <= 1:
        return elements
    if compressible and all(element == elements[0] for element in elements):
        return [{"array_len": len(elements), **elements[0]}]
    return [{"index": i, **element} for i, element in enumerate(elements)]
