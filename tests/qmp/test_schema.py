"""Schemas that are made from annotations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from corefw.errors import PluginError
from corefw.qmp.protocol import QmpError
from corefw.qmp.schema import shape, signature
from corefw.states import MigrationStatus

PAIR = "{key: string, value?: [integer]}"
PAIRS = f"[{PAIR}]"


class Pair(TypedDict):
    key: str
    value: NotRequired[list[int]]


@pytest.mark.parametrize(
    ("annotation", "text", "good", "bad", "why"),
    [
        (str, "string", ["", "x"], [None, 1], "'p', expected: string"),
        (int, "integer", [0, -1, 2**64], [1.0, True, "1"], "'p', expected: integer"),
        (float, "number", [0.5, 1], [True, "1"], "'p', expected: number"),
        (bool, "boolean", [True], [1, None], "'p', expected: boolean"),
        (dict, "object", [{}], [[]], "'p', expected: object"),
        (list, "array", [[1, "x"]], [{}], "'p', expected: array"),
        (object, "any", [None, 1], [], ""),
        (Any, "any", [None, 1], [], ""),
        (Sequence[int], "[integer]", [[], [1]], [[1, "x"]], r"'p\[1\]', expected: integer"),
        (str | None, "string | null", ["", None], [1], "'p', expected: string"),
        (Literal["a", "b"], '"a" | "b"', ["a"], ["c"], "'p' does not accept value 'c'"),
        (list[Pair], PAIRS, [[{"key": "x"}]], [[{}]], r"'p\[0\]\.key' is missing"),
        (Pair, PAIR, [{"key": "", "value": [1]}], [{"key": "", "v": 1}], "'p.v' is unex"),
        (Pair, PAIR, [], [{"key": "", "value": [""]}], r"'p\.value\[0\]', expected"),
    ],
)
def test_shapes(annotation: object, text: str, good: list[object], bad: list[object], why: str) -> None:
    found = shape(annotation)
    assert found.text == text
    for value in good:
        assert found.check(value, "p") == value
    for value in bad:
        with pytest.raises(QmpError, match=why):
            found.check(value, "p")


def test_an_enum_arrives_as_its_member() -> None:
    assert shape(MigrationStatus).check("active", "state") is MigrationStatus.ACTIVE


def test_others() -> None:
    def function(*, some_name: int, **others: bool) -> None: ...

    found = signature(function)
    assert found.bind({"some-name": 1, "x-y": True}) == {"some_name": 1, "x-y": True}
    with pytest.raises(QmpError, match="'x', expected: boolean"):
        found.bind({"some-name": 1, "x": 3})
    with pytest.raises(QmpError, match="'some_name' is unexpected"):
        found.bind({"some-name": 1, "some_name": True})


def untyped(x) -> None: ...  # type: ignore[no-untyped-def]  # what is tested


def positional(x: int, /) -> None: ...


def many(*x: int) -> None: ...


def no_json(x: bytes) -> None: ...


def two(x: int | str) -> None: ...


def unknown(x: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821  # what is tested


def no_attribute(x: contextlib.missing) -> None: ...  # type: ignore[name-defined]  # what is tested


def no_code(x: "list[") -> None: ...  # type: ignore[valid-type]  # noqa: F722  # what is tested


def no_item(x: Sequence) -> None: ...  # type: ignore[type-arg]  # what is tested


@pytest.mark.parametrize("function", [untyped, positional, many, no_json, two, unknown, no_attribute, no_code, no_item])
def test_what_is_no_schema(function: Callable[..., object]) -> None:
    with pytest.raises(PluginError, match=f"signature of {function.__name__} is not a valid command schema"):
        signature(function)
