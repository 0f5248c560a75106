"""The description of a stream is parsed into a few types, or refused with the place of the error."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corefw.errors import StreamError
from corefw.wire.description import Description, parse_description


def described(*fields: dict[str, Any], **more: Any) -> Description:
    device = {"name": "cpu", "instance_id": 1, "vmsd_name": "cpu", "version": 12, "fields": list(fields), **more}
    return parse_description(json.dumps({"page_size": 4096, "devices": [device]}).encode())


def field(name: str = "a", kind: str = "uint32", size: int = 4, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "size": size, **more}


def test_a_device_is_what_its_fields_add_up_to() -> None:
    description = described(
        field(), field("b", array_len=5), field("c", "uint8", 1, index=0), field("c", "uint8", 1, index=1)
    )
    (device,) = description.devices
    assert (device.name, device.instance_id, device.state.version) == ("cpu", 1, 12)
    assert device.state.size == 4 + 5 * 4 + 1 + 1
    assert [one.index for one in device.state.fields] == [None, None, 0, 1]
    assert description.page_size == 4096


def test_subsections_have_heads() -> None:
    inner = {"vmsd_name": "cpu/x", "version": 1, "fields": [field(size=8)]}
    description = described(field(), subsections=[inner, {**inner, "subsections": [inner]}])
    head = 1 + 1 + len("cpu/x") + 4
    assert description.devices[0].state.size == 4 + (head + 8) + (head + 8) + (head + 8)


def test_structs_are_within_a_field_or_are_the_field() -> None:
    struct = {"vmsd_name": "reg", "version": 1, "fields": [field(size=2), field("b", size=6)]}
    description = described(field("r", "struct", 8, struct=struct), field("t", "tmp", 8, **struct))
    for one in description.devices[0].state.fields:
        assert one.struct is not None
        assert one.struct.size == one.size == 8


def test_what_is_no_vmstate_has_one_buffer() -> None:
    device = {"name": "old", "instance_id": 0, "size": 9, "fields": [field("data", "buffer", 9)]}
    description = parse_description(json.dumps({"devices": [device]}).encode())
    assert description.page_size == 0
    assert description.devices[0].state.size == 9


def test_the_last_of_two_members_of_one_name_counts() -> None:
    """QEMU describes each element of a list in the object of the list itself."""
    element = b'"vmsd_name": "e", "version": 1, "fields": []'
    text = (
        b'{"devices": [{"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1,'
        b' "fields": [{"name": "l", "type": "qtailq", ' + element + b", " + element + b', "size": 7}]}]}'
    )
    assert parse_description(text).devices[0].state.size == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "expected an object, got list"),
        (b"{}", "expected a list 'devices', got None"),
        (b'{"devices": [1]}', r"devices\[0\]: expected an object, got 1"),
        (b'{"devices": [{}]}', "expected a text 'name'"),
        (b'{"devices": [{"name": "cpu"}]}', "cpu: expected a number 'instance_id'"),
        (b'{"devices": [{"name": "cpu", "instance_id": -1}]}', "got -1"),
        (b'{"devices": [{"name": "cpu", "instance_id": true}]}', "got True"),
        (b'{"devices": [{"name": "cpu", "instance_id": 1.0}]}', "got 1.0"),
        (b'{"devices": [{"name": "cpu", "instance_id": 0}]}', "cpu: expected a list 'fields'"),
        (
            b'{"devices": [{"name": "cpu", "instance_id": 0, "fields": [{"name": "x"}]}]}',
            "cpu.x: expected a text 'type'",
        ),
        (b'{"page_size": "big", "devices": []}', "expected a number 'page_size' of 64 bits, got 'big'"),
        (b'{"page_size": 99999999999999999999, "devices": []}', r"got 1e\+20"),
    ],
)
def test_what_is_wrong_is_named(text: bytes, expected: str) -> None:
    with pytest.raises(StreamError, match=expected):
        parse_description(text)


def test_depth_has_a_limit() -> None:
    state: dict[str, Any] = {"vmsd_name": "x", "version": 1, "fields": []}
    for _ in range(70):
        state = {"vmsd_name": "x", "version": 1, "fields": [field("s", "struct", 0, struct=state)]}
    with pytest.raises(StreamError, match="nested deeper than 64"):
        described(field("s", "struct", 0, struct=state))


def test_a_huge_array_costs_nothing() -> None:
    description = described(field(size=2**63, array_len=2**63))
    assert description.devices[0].state.size == 2**126


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(["devices", "name", "fields", "size", "struct", "subsections", "instance_id", "type"]),
                x,
            )
        ),
        max_leaves=30,
    )
)
@settings(max_examples=200)
def test_any_json_is_parsed_or_refused(document: object) -> None:
    with contextlib.suppress(StreamError):
        parse_description(json.dumps(document).encode())
