"""VMState: golden bytes of every field, what each refuses, and the errors."""

from __future__ import annotations

import array
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from corefw.errors import MachineError, RemoteStreamError, StreamError
from corefw.wire.stream import MemorySink, MemorySource, StreamReader, StreamWriter
from corefw.wire.vmstate import (
    Array,
    Buffer,
    Description,
    Field,
    Kind,
    Refused,
    Scalar,
    Struct,
    StructArray,
    Unused,
    Validate,
    VMState,
)

FOLLOWS = b"\x7e\0\0\0\7\0"
"""A footer and the end of the stream."""


def save(table: VMState, **state: Any) -> tuple[bytes, Description]:
    sink = MemorySink()
    writer = StreamWriter(sink)
    description = table.save(writer, SimpleNamespace(**state))
    writer.flush()
    return bytes(sink.data), description


def load(table: VMState, body: bytes, version: int | None = None, /, **state: Any) -> Any:
    reader = StreamReader(MemorySource(body + FOLLOWS), where="section 'dev' (instance 0)")
    loaded = SimpleNamespace(**state)
    table.load(reader, loaded, table.version_id if version is None else version)
    assert reader.offset == len(body)
    return loaded


def table_of(*fields: Field, **more: Any) -> VMState:
    return VMState("dev", fields=fields, **more)


# -- scalars -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value", "data", "type_name"),
    [
        (Kind.U8, 200, "c8", "uint8"),
        (Kind.U16, 0x1234, "1234", "uint16"),
        (Kind.U32, 0x12345678, "12345678", "uint32"),
        (Kind.U64, 2**64 - 1, "ff" * 8, "uint64"),
        (Kind.I8, -2, "fe", "int8"),
        (Kind.I16, -2, "fffe", "int16"),
        (Kind.I32, -(2**31), "80000000", "int32"),
        (Kind.I64, -1, "ff" * 8, "int64"),
        (Kind.BOOL, True, "01", "bool"),
        (Kind.F64, 1.0, "3ff0000000000000", "float64"),
    ],
)
def test_scalar_bytes_and_description(kind: Kind, value: object, data: str, type_name: str) -> None:
    table = table_of(Scalar("x", kind))
    body, description = save(table, x=value)
    assert body.hex() == data
    assert description["fields"] == [{"name": "x", "type": type_name, "size": len(body)}]
    loaded = load(table, body).x
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize("value", [np.uint32(7), np.int8(7), 7, True])
def test_scalar_takes_whatever_has_an_index(value: object) -> None:
    assert save(table_of(Scalar("x", Kind.U32)), x=value)[0] == int(value).to_bytes(4, "big")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        (Kind.U8, 256, "device 'dev', field 'x': 256 does not fit, expected an integer from 0 to 255"),
        (Kind.U8, -1, "-1 does not fit, expected an integer from 0 to 255"),
        (Kind.I16, 32768, "expected an integer from -32768 to 32767"),
        (Kind.U32, 1.5, "1.5 is not an integer from 0 to 4294967295"),
        (Kind.U32, None, "None is not an integer"),
        (Kind.BOOL, 2, "2 does not fit, expected True or False"),
        (Kind.BOOL, "yes", "'yes' is not True or False"),
        (Kind.F64, "1.5", "'1.5' is not a number"),
    ],
)
def test_scalar_that_does_not_fit_is_named(kind: Kind, value: object, says: str) -> None:
    with pytest.raises(MachineError, match=re.escape(says)):
        save(table_of(Scalar("x", kind)), x=value)


def test_missing_attribute_is_named() -> None:
    with pytest.raises(MachineError, match="device 'dev': the state, a SimpleNamespace, has no attribute 'x'"):
        save(table_of(Scalar("x", Kind.U8)))


def test_bool_other_than_0_and_1_is_refused() -> None:
    with pytest.raises(RemoteStreamError, match="expected 0 or 1 in field 'x', got 2") as caught:
        load(table_of(Scalar("y", Kind.U8), Scalar("x", Kind.BOOL)), b"\0\2")
    assert (caught.value.offset, caught.value.where) == (1, "section 'dev' (instance 0)")


def test_equal_field() -> None:
    table = table_of(Scalar("n", Kind.U64, equal=True))
    body, description = save(table, n=4)
    assert description["fields"][0]["type"] == "int64 equal"
    assert load(table, body, n=4).n == 4
    with pytest.raises(RemoteStreamError, match="expected 5 in field 'n', as it is here, got 4"):
        load(table, body, n=5)
    with pytest.raises(ValueError, match="QEMU has no i8 that must be equal"):
        Scalar("n", Kind.I8, equal=True)


def test_attribute_may_have_another_name_than_the_field() -> None:
    table = table_of(Scalar("wire-name", Kind.U8, attribute="python_name"))
    body, description = save(table, python_name=3)
    assert description["fields"][0]["name"] == "wire-name"
    assert load(table, body).python_name == 3


# -- versions ------------------------------------------------------------------------------------------------------


VERSIONED = table_of(Scalar("a", Kind.U8), Scalar("b", Kind.U8, since=3), version_id=3, minimum_version_id=2)


def test_field_is_there_from_its_version_on() -> None:
    assert load(VERSIONED, b"\1\2", 3) == SimpleNamespace(a=1, b=2)
    assert load(VERSIONED, b"\1", 2) == SimpleNamespace(a=1)


@pytest.mark.parametrize("version", [1, 4])
def test_other_versions_are_refused(version: int) -> None:
    with pytest.raises(RemoteStreamError, match=f"expected version 2 to 3 of 'dev', got version {version}"):
        load(VERSIONED, b"\1\2", version)


def test_minimum_version_is_the_version_unless_given() -> None:
    with pytest.raises(RemoteStreamError, match="expected version 2 of 'dev', got version 1"):
        load(table_of(version_id=2), b"", 1)


def test_exists_decides_alone_and_sees_what_was_loaded() -> None:
    table = table_of(
        Scalar("has", Kind.BOOL), Scalar("x", Kind.U8, since=9, exists=lambda state, _: state.has), version_id=1
    )
    assert save(table, has=True, x=5)[0] == b"\1\5"
    assert save(table, has=False)[0] == b"\0"
    assert load(table, b"\1\5") == SimpleNamespace(has=True, x=5)
    assert load(table, b"\0") == SimpleNamespace(has=False)


def test_names_that_occur_twice_are_numbered() -> None:
    table = table_of(Unused(1), Scalar("a", Kind.U8), Unused(2))
    assert [one["name"] for one in save(table, a=1)[1]["fields"]] == ["unused[0]", "a", "unused[1]"]


# -- buffers and arrays --------------------------------------------------------------------------------------------


def test_buffer() -> None:
    table = table_of(Buffer("data", 3))
    body, description = save(table, data=b"abc")
    assert body == b"abc"
    assert description["fields"] == [{"name": "data", "type": "buffer", "size": 3}]
    assert load(table, body).data == b"abc"
    with pytest.raises(MachineError, match="field 'data': has 2 elements, expected 3"):
        save(table, data=b"ab")
    with pytest.raises(MachineError, match="field 'data': expected bytes, got str"):
        save(table, data="abc")


@pytest.mark.parametrize(
    "make",
    [
        lambda: bytearray(8),
        lambda: memoryview(bytearray(8)),
        lambda: np.zeros(8, np.uint8),
        lambda: np.zeros((2, 2), np.uint16),
        lambda: np.zeros(1, ">f8"),
    ],
)
def test_buffer_is_filled_in_place(make: Callable[[], Any]) -> None:
    table, here = table_of(Buffer("data", 8)), make()
    assert load(table, b"ABCDEFGH", data=here).data is here
    assert np.asarray(here).tobytes() == b"ABCDEFGH"
    assert save(table, data=here)[0] == b"ABCDEFGH"


def test_variable_buffer() -> None:
    table = table_of(Scalar("n", Kind.I32), Buffer("data", "n", limit=4))
    assert save(table, n=2, data=b"xy")[0] == b"\0\0\0\2xy"
    assert load(table, b"\0\0\0\2xy") == SimpleNamespace(n=2, data=b"xy")
    assert load(table, b"\0\0\0\0", data=b"old").data == b""
    assert load(table, b"\0\0\0\1z", data=bytearray(2)).data == b"z"
    with pytest.raises(MachineError, match="field 'data': has 3 elements, expected 2 as 'n' says"):
        save(table, n=2, data=b"xyz")
    with pytest.raises(MachineError, match="field 'data': n is 5, expected 0 to 4"):
        save(table, n=5, data=b"vwxyz")
    for count, data in ((5, b"\0\0\0\5"), (-1, b"\xff\xff\xff\xff")):
        with pytest.raises(RemoteStreamError, match=f"expected a length from 0 to 4 for field 'data', got n = {count}"):
            load(table, data + b"vwxyz")


def test_lengths_from_the_stream_need_a_limit() -> None:
    with pytest.raises(ValueError, match="field 'data' gets its length from the stream: give it a limit"):
        Buffer("data", "n")
    with pytest.raises(ValueError, match="a fixed length is not negative and has no limit"):
        Array("data", 3, Kind.U8, limit=4)


VALUES = [1, 2, 0xFFFFFFFE]
BODY = b"\0\0\0\1\0\0\0\2\xff\xff\xff\xfe"
U32S = table_of(Array("x", 3, Kind.U32))


@pytest.mark.parametrize(
    "value",
    [
        VALUES,
        tuple(VALUES),
        array.array("Q", VALUES),
        np.array(VALUES, np.uint32),
        np.array(VALUES, ">u4"),
        np.array(VALUES, np.int64),
        np.array([VALUES, VALUES], np.uint64).T[:, 0],
        np.array([[one] for one in VALUES]),
    ],
)
def test_array_of_any_sort_is_sent(value: Any) -> None:
    body, description = save(U32S, x=value)
    assert body == BODY
    assert description["fields"] == [{"name": "x", "array_len": 3, "type": "uint32", "size": 4}]


@pytest.mark.parametrize("here", [[0, 0, 0], (0,), array.array("Q", [0])])
def test_array_keeps_its_sort_when_loaded(here: Any) -> None:
    loaded = load(U32S, BODY, x=here).x
    assert type(loaded) is type(here)
    assert list(loaded) == VALUES


@pytest.mark.parametrize("dtype", [np.uint32, ">u4", np.uint64, np.float64])
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_numpy_array_is_filled_in_place(dtype: Any, shape: tuple[int, ...]) -> None:
    here = np.zeros(shape, dtype)
    assert load(U32S, BODY, x=here).x is here
    assert here.ravel().tolist() == VALUES


def test_strided_array_is_filled_in_place() -> None:
    whole = np.zeros((3, 2), np.uint32)
    load(U32S, BODY, x=whole[:, 0])
    assert whole.tolist() == [[one, 0] for one in VALUES]


@pytest.mark.parametrize("here", [None, "text", np.zeros(2, np.uint32), np.zeros(3, np.uint8), np.zeros(3, np.int32)])
def test_what_cannot_hold_the_array_is_replaced(here: Any) -> None:
    loaded = load(U32S, BODY, x=here).x
    assert loaded is not here
    assert (loaded.tolist(), loaded.dtype) == (VALUES, np.uint32)


def test_array_of_u8_may_be_bytes() -> None:
    table = table_of(Array("x", 2, Kind.U8))
    assert save(table, x=b"\1\2")[0] == b"\1\2"
    assert load(table, b"\1\2", x=bytearray(9)).x == bytearray(b"\1\2")
    assert load(table, b"\1\2", x=b"").x == b"\1\2"


def test_array_of_bools_and_doubles() -> None:
    table = table_of(Array("flags", 2, Kind.BOOL), Array("x", 2, Kind.F64))
    state = {"flags": np.array([True, False]), "x": np.array([0.5, np.inf], np.float32)}
    body, _ = save(table, **state)
    assert body == b"\1\0" + bytes.fromhex("3fe0000000000000 7ff0000000000000")
    assert save(table, flags=[1, False], x=[np.float64(0.5), float("inf")])[0] == body
    loaded = load(table, body, flags=np.zeros(2, bool), x=[])
    assert loaded.flags.tolist() == [True, False]
    assert loaded.x == [0.5, float("inf")]
    with pytest.raises(RemoteStreamError, match="expected 0 or 1 in field 'flags', got 3") as caught:
        load(table, b"\1\3" + bytes(16))
    assert caught.value.offset == 1


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1, 2], "field 'x': has 2 elements, expected 3"),
        ([1, -1, 2], "field 'x'[1]: -1 does not fit, expected an integer from 0 to 4294967295"),
        ([1, 2, "3"], "field 'x'[2]: '3' is not an integer"),
        (np.array([1, 2, -3]), "field 'x'[2]: -3 does not fit"),
        (np.array([1, 2**40, 3]), "field 'x'[1]: 1099511627776 does not fit"),
        (np.array([1.0, 2.0, 3.0]), "field 'x': an array of float64 cannot be sent as u32, convert it first"),
        (np.zeros(4, np.uint32), "has 4 elements, expected 3"),
        ("abc", "field 'x': expected an array or a sequence, got str"),
        (7, "expected an array or a sequence, got int"),
    ],
)
def test_array_that_does_not_fit_is_named(value: object, says: str) -> None:
    with pytest.raises(MachineError, match=re.escape(f"device 'dev', {says}" if says.startswith("field") else says)):
        save(U32S, x=value)


def test_large_array_goes_out_from_where_it_is() -> None:
    """If no byte has to move, the sink gets the array's own memory and not a copy."""
    parts: list[object] = []

    class Sink:
        def send(self, *sent: object) -> None:
            parts.extend(sent)

    data = np.arange(1 << 17, dtype=np.uint8)
    table_of(Array("x", data.size, Kind.U8)).save(StreamWriter(Sink()), SimpleNamespace(x=data))
    view = parts[-1]
    assert isinstance(view, memoryview)
    assert np.shares_memory(np.asarray(view), data)


def test_no_and_one_element() -> None:
    table = table_of(Scalar("n", Kind.U8), Array("x", "n", Kind.U16, limit=9))
    assert save(table, n=0, x=[])[1]["fields"] == [{"name": "n", "type": "uint8", "size": 1}]
    assert save(table, n=1, x=[7])[1]["fields"][1] == {"name": "x", "type": "uint16", "size": 2}
    assert load(table, b"\0", x=np.zeros(0, np.uint16)).x.size == 0


def test_array_that_may_be_absent_is_described_element_by_element() -> None:
    table = table_of(Array("x", 2, Kind.U8, exists=lambda *_: True))
    assert save(table, x=[1, 2])[1]["fields"] == [
        {"name": "x", "index": i, "type": "uint8", "size": 1} for i in range(2)
    ]


# -- structs -------------------------------------------------------------------------------------------------------

POINT = VMState(
    "point", version_id=2, minimum_version_id=1, fields=(Scalar("x", Kind.U8), Scalar("y", Kind.U8, since=2))
)


def point(x: int = 0, y: int = 0) -> SimpleNamespace:
    return SimpleNamespace(x=x, y=y)


def test_struct_is_always_in_its_own_present_version() -> None:
    table = table_of(Struct("at", POINT))
    body, description = save(table, at=point(1, 2))
    assert body == b"\1\2"
    inner = {"vmsd_name": "point", "version": 2, "fields": [{"name": n, "type": "uint8", "size": 1} for n in "xy"]}
    assert description["fields"] == [{"name": "at", "type": "struct", "struct": inner, "size": 2}]
    here = point()
    assert load(table, body, at=here).at is here
    assert here == point(1, 2)


def test_struct_has_to_be_there_or_can_be_made() -> None:
    with pytest.raises(MachineError, match="'at' is not there to be loaded, and its table has no `make`"):
        load(table_of(Struct("at", POINT)), b"\1\2")
    assert load(table_of(Struct("at", POINT, make=point)), b"\1\2").at == point(1, 2)


def test_struct_array() -> None:
    table = table_of(StructArray("at", 2, POINT))
    body, description = save(table, at=[point(1, 2), point(3, 4)])
    assert body == b"\1\2\3\4"
    assert description["fields"][0]["array_len"] == 2
    here = (point(), point())
    assert load(table, body, at=here).at is here
    assert here == (point(1, 2), point(3, 4))
    with pytest.raises(MachineError, match="field 'at': has 1 elements, expected 2"):
        save(table, at=[point()])


def test_struct_array_of_variable_length() -> None:
    table = table_of(Scalar("n", Kind.U8), StructArray("at", "n", POINT, limit=3, make=point))
    assert load(table, b"\2\1\2\3\4").at == [point(1, 2), point(3, 4)]
    with pytest.raises(RemoteStreamError, match="a length from 0 to 3 for field 'at', got n = 4"):
        load(table, b"\4")
    fixed = table_of(Scalar("n", Kind.U8), StructArray("at", "n", POINT, limit=3))
    with pytest.raises(RemoteStreamError, match="expected 1 elements of field 'at', as there are here, got 2"):
        load(fixed, b"\2\1\2\3\4", at=[point()])


def test_structs_that_differ_are_described_one_by_one() -> None:
    """Each gets an index. (QEMU 7.2 would describe all of them as the first.)"""
    text = VMState("text", fields=(Scalar("n", Kind.U8), Buffer("data", "n", limit=9)))
    table = table_of(StructArray("texts", 2, text))
    _, description = save(table, texts=[SimpleNamespace(n=1, data=b"a"), SimpleNamespace(n=2, data=b"bc")])
    assert [(one["index"], one["size"]) for one in description["fields"]] == [(0, 2), (1, 3)]


def test_messages_name_the_way_to_the_field() -> None:
    table = table_of(StructArray("at", 2, POINT))
    with pytest.raises(MachineError, match=re.escape("device 'dev', at[1], field 'y': 300 does not fit")):
        save(table, at=[point(), point(0, 300)])
    with pytest.raises(RemoteStreamError) as caught:
        table.load(
            StreamReader(MemorySource(b"\1\2\3"), where="section 'dev'"), SimpleNamespace(at=[point(), point()]), 1
        )
    assert caught.value.where == "section 'dev', at[1]"
    assert "1 bytes of field 'y'" in str(caught.value)


def test_validate() -> None:
    table = table_of(Scalar("n", Kind.U8), Validate("an even n", lambda state: state.n % 2 == 0), Scalar("m", Kind.U8))
    assert save(table, n=2, m=3) == (
        b"\2\3",
        {"vmsd_name": "dev", "version": 1, "fields": [{"name": n, "type": "uint8", "size": 1} for n in "nm"]},
    )
    assert load(table, b"\2\3").m == 3
    with pytest.raises(RemoteStreamError, match="expected an even n, got a state that is different") as caught:
        load(table, b"\1\3")
    assert caught.value.offset == 1
    with pytest.raises(MachineError, match="device 'dev': expected an even n"):
        save(table, n=1, m=3)


def test_unused_is_sent_as_zeros_and_accepts_anything() -> None:
    table = table_of(Unused(3))
    assert save(table) == (
        b"\0\0\0",
        {"vmsd_name": "dev", "version": 1, "fields": [{"name": "unused", "type": "unused_buffer", "size": 3}]},
    )
    assert load(table, b"abc") == SimpleNamespace()


# -- subsections ---------------------------------------------------------------------------------------------------

INNER = VMState("dev/a/inner", fields=(Scalar("inner", Kind.U8),), needed=lambda state: state.inner > 0)
NESTED = table_of(
    Scalar("x", Kind.U8),
    subsections=(
        VMState(
            "dev/a",
            version_id=2,
            fields=(Scalar("a", Kind.U8),),
            subsections=(INNER,),
            needed=lambda state: state.a > 0,
        ),
        VMState("dev/ab", fields=(Scalar("b", Kind.U8),), needed=lambda state: state.b > 0),
    ),
)
A, AB, IN = b"\5\5dev/a\0\0\0\2\x0a", b"\5\6dev/ab\0\0\0\1\x0b", b"\5\x0bdev/a/inner\0\0\0\1\x0c"


@pytest.mark.parametrize(
    ("state", "body"),
    [
        ({"x": 1, "a": 0, "b": 0, "inner": 0}, b"\1"),
        ({"x": 1, "a": 10, "b": 0, "inner": 0}, b"\1" + A),
        ({"x": 1, "a": 0, "b": 11, "inner": 0}, b"\1" + AB),
        ({"x": 1, "a": 10, "b": 11, "inner": 12}, b"\1" + A + IN + AB),
    ],
)
def test_subsections_that_are_needed(state: dict[str, int], body: bytes) -> None:
    saved, description = save(NESTED, **state)
    assert saved == body
    assert ("subsections" in description) == (len(body) > 1)
    assert vars(load(NESTED, body, a=0, b=0, inner=0)) == state


def test_subsections_may_come_in_any_order() -> None:
    assert vars(load(NESTED, b"\1" + AB + A, inner=0)) == {"x": 1, "a": 10, "b": 11, "inner": 0}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            b"\1\5\5dev/c\0\0\0\1",
            "expected the end of 'dev' or one of its subsections 'dev/a', 'dev/ab', got subsection 'dev/c'",
        ),
        (b"\1\5\3foo\0\0\0\1", "or one of its subsections 'dev/a', 'dev/ab', got subsection 'foo'"),
        (b"\1" + A + b"\5\5dev/z\0\0\0\1", "got subsection 'dev/z'"),
        (b"\1" + A + A, "expected the end of 'dev' or one of its subsections 'dev/ab', got subsection 'dev/a'"),
        (b"\1\5\5dev/a\0\0\0\3\1", "subsection 'dev/a': expected version 2 of 'dev/a', got version 3"),
        (b"\1\5\5dev/a\0\0\0\1\1", "subsection 'dev/a': expected version 2 of 'dev/a', got version 1"),
        (b"\1\5\5dev", "expected the head of a subsection, got the end of the stream"),
    ],
)
def test_wrong_subsection_is_named(body: bytes, says: str) -> None:
    reader = StreamReader(MemorySource(body), where="section 'dev' (instance 0)")
    with pytest.raises(RemoteStreamError, match=re.escape(says)) as caught:
        NESTED.load(reader, SimpleNamespace(), 1)
    assert caught.value.where.startswith("section 'dev' (instance 0)")


def test_stream_that_ends_where_a_subsection_may_follow_is_an_error() -> None:
    with pytest.raises(RemoteStreamError, match="expected what follows 'dev', got the end of the stream"):
        NESTED.load(StreamReader(MemorySource(b"\1")), SimpleNamespace(), 1)


def test_0x05_after_a_struct_is_no_subsection_unless_the_name_says_so() -> None:
    part = VMState("part", fields=(Scalar("x", Kind.U8),))
    table = table_of(Struct("part", part, make=SimpleNamespace), Buffer("rest", 8))
    assert load(table, b"\1\5\4par\0\0\0").rest == b"\5\4par\0\0\0"
    assert load(table, b"\1\5\6partly").rest == b"\5\6partly"
    with pytest.raises(RemoteStreamError, match="expected the end of 'part', got subsection 'part/y'"):
        load(table, b"\1\5\6part/y")


def test_subsection_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"a subsection of 'dev' is called 'dev/\.\.\.', not 'other'"):
        table_of(subsections=(VMState("other"),))
    with pytest.raises(ValueError, match="two subsections of one name"):
        table_of(subsections=(VMState("dev/a"), VMState("dev/a")))


@pytest.mark.parametrize("arguments", [{"name": ""}, {"name": "x" * 256}, {"name": "x", "minimum_version_id": 2}])
def test_table_that_cannot_work_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"name|version"):
        VMState(**arguments)


# -- callbacks -----------------------------------------------------------------------------------------------------


def test_callbacks_are_called_around_the_fields() -> None:
    calls: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda state, *more: calls.append(f"{what} {getattr(state, 'x', None)} {more}")

    sub = VMState(
        "dev/s", pre_load=note("sub pre_load"), post_load=note("sub post_load"), pre_save=note("sub pre_save")
    )
    table = table_of(
        Scalar("x", Kind.U8),
        subsections=(sub,),
        pre_load=note("pre_load"),
        post_load=note("post_load"),
        pre_save=note("pre_save"),
        post_save=note("post_save"),
    )
    body, _ = save(table, x=1)
    load(table, body)
    assert calls == [
        "pre_save 1 ()",
        "sub pre_save 1 ()",
        "post_save 1 ()",
        "pre_load None ()",
        "sub pre_load 1 ()",
        "sub post_load 1 (1,)",
        "post_load 1 (1,)",
    ]


def test_post_save_is_called_after_an_error_too() -> None:
    calls: list[object] = []
    with pytest.raises(MachineError):
        save(table_of(Scalar("x", Kind.U8), post_save=calls.append), x=-1)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (Refused("a width above 0", "0"), "section 'dev' (instance 0): expected a width above 0, got 0 (at offset 1"),
        (StreamError("the grid is flat"), "expected a state that 'dev' accepts, got the grid is flat (at offset 1"),
        (RemoteStreamError(7, "here", "this", "that"), "here: expected this, got that (at offset 7"),
    ],
)
def test_post_load_may_refuse(error: Exception, says: str) -> None:
    def refuse(_state: object, _version: int) -> None:
        raise error

    with pytest.raises(RemoteStreamError, match=re.escape(says)):
        load(table_of(Scalar("x", Kind.U8), post_load=refuse), b"\0")
