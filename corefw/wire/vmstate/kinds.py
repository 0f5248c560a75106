"""The kinds of scalars in device state, and their layouts on the wire.

One row of LAYOUTS holds everything about a kind: its name in QEMU's description, its big-endian layout, its range.
Source: QEMU 7.2, VMStateInfo (migration/vmstate-types.c).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from struct import Struct
from struct import error as StructError  # noqa: N812 - it is a class
from typing import TYPE_CHECKING, Any, Final, SupportsFloat

import numpy as np

from corefw.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Kind(StrEnum):
    """The kind of a scalar. `Kind("u64")` finds one by its short name."""

    U8 = "u8"
    U16 = "u16"
    U32 = "u32"
    U64 = "u64"
    I8 = "i8"
    I16 = "i16"
    I32 = "i32"
    I64 = "i64"
    BOOL = "bool"
    F64 = "f64"

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self]


@dataclass(frozen=True, slots=True)
class Layout:
    """A kind on the wire.

    type_name    in the description
    equal_name   the same for a value that must equal the destination's; "" if QEMU has no such kind
    struct       one value, big-endian
    minimum, maximum   None for a kind that is not an integer
    """

    kind: Kind
    type_name: str
    equal_name: str
    struct: Struct
    minimum: int | None
    maximum: int | None

    @property
    def size(self) -> int:
        return self.struct.size

    @property
    def code(self) -> str:
        """The format character, for packing many values at once."""
        return self.struct.format[1:]

    @property
    def wire_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.struct.format)

    @property
    def dtype(self) -> np.dtype[Any]:
        """wire_dtype in this host's byte order."""
        return self.wire_dtype.newbyteorder("=")

    @property
    def phrase(self) -> str:
        """What a value of this kind is, for messages."""
        if self.minimum is None:
            return "a number" if self.kind is Kind.F64 else "True or False"
        return f"an integer from {self.minimum} to {self.maximum}"


def _integer(kind: Kind, type_name: str, equal_name: str, code: str) -> Layout:
    layout = Struct(">" + code)
    bits = 8 * layout.size
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if code.islower() else (0, (1 << bits) - 1)
    return Layout(kind, type_name, equal_name, layout, low, high)


LAYOUTS: Final[Mapping[Kind, Layout]] = {
    Kind.U8: _integer(Kind.U8, "uint8", "uint8 equal", "B"),
    Kind.U16: _integer(Kind.U16, "uint16", "uint16 equal", "H"),
    Kind.U32: _integer(Kind.U32, "uint32", "uint32 equal", "I"),
    Kind.U64: _integer(Kind.U64, "uint64", "int64 equal", "Q"),  # QEMU's name for it, sign and all
    Kind.I8: _integer(Kind.I8, "int8", "", "b"),
    Kind.I16: _integer(Kind.I16, "int16", "", "h"),
    Kind.I32: _integer(Kind.I32, "int32", "int32 equal", "i"),
    Kind.I64: _integer(Kind.I64, "int64", "", "q"),
    Kind.BOOL: Layout(Kind.BOOL, "bool", "", Struct(">?"), None, None),
    # The bits of a C double as one u64. QEMU's devices send doubles as CPU_Double_U, which is the same eight bytes.
    Kind.F64: Layout(Kind.F64, "float64", "", Struct(">d"), None, None),
}


def pack_scalar(layout: Layout, value: object, where: str) -> bytes:
    """One value as bytes. Raises MachineError that names `where` and the range."""
    return layout.struct.pack(_checked(layout, value, where))


def pack_sequence(layout: Layout, values: Sequence[object], where: str) -> bytes:
    """Many Python values as bytes. Raises MachineError naming the first that does not fit."""
    if layout.minimum is not None:
        try:
            return Struct(f">{len(values)}{layout.code}").pack(*values)
        except StructError:
            pass  # the loop below finds which one does not fit
    checked = [_checked(layout, value, f"{where}[{i}]") for i, value in enumerate(values)]
    return Struct(f">{len(values)}{layout.code}").pack(*checked)


def pack_array(layout: Layout, values: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, Any]:
    """A NumPy array of any shape as a flat one in wire order; a copy only if it is in another order. Raises
    MachineError for values that do not fit."""
    flat = values.reshape(-1)
    if flat.dtype == layout.wire_dtype:
        return np.ascontiguousarray(flat)
    if flat.size and not np.can_cast(flat.dtype, layout.dtype, "safe"):
        _check_range(layout, flat, where)
    return np.ascontiguousarray(flat, dtype=layout.wire_dtype)


def _checked(layout: Layout, value: object, where: str) -> int | float | bool:
    try:
        if isinstance(value, bool | np.bool_):
            return bool(value)
        if layout.kind is Kind.F64 and isinstance(value, SupportsFloat):
            return float(value)
        number = operator.index(value)  # type: ignore[arg-type]  # raises TypeError for what is not an integer
    except (TypeError, ValueError, OverflowError):
        raise MachineError(f"{where}: {value!r} is not {layout.phrase}") from None
    low, high = (0, 1) if layout.minimum is None or layout.maximum is None else (layout.minimum, layout.maximum)
    if not low <= number <= high:
        raise MachineError(f"{where}: {number} does not fit, expected {layout.phrase}")
    return number


def _check_range(layout: Layout, flat: np.ndarray[Any, Any], where: str) -> None:
    """Raise MachineError for an element that the kind cannot hold. Not called for a dtype that always fits."""
    if flat.dtype.kind not in ("iub" if layout.kind is not Kind.F64 else "iubf"):
        raise MachineError(f"{where}: an array of {flat.dtype} cannot be sent as {layout.kind}, convert it first")
    if layout.kind is Kind.F64:
        return  # the largest integers lose digits, which is what Python's float() does too
    for index in (int(flat.argmin()), int(flat.argmax())):
        _checked(layout, flat[index], f"{where}[{index}]")
