"""Checks a command's arguments against the signature of its function.

The annotations are the only schema there is, and query-qmp-schema shows it. Arguments are checked as a whole before the
function is called. The errors have QEMU's texts: missing, wrong type (with the path into nested values), unexpected.

    str  int  bool  float              string, integer, boolean, number (an integer too)
    dict  list  object                 object, array, anything
    list[T]  Sequence[T]  T | None     array of T; T or null
    str | a TypedDict                  string or object
    a StrEnum, Literal["a", "b"]       one of these strings
    a TypedDict                        object with these members
    Annotated[dict, Variants(...)]     object with a tag that selects its other members
    Annotated[T, form]                 checked as T, described by query-qmp-schema as `form`
    **names: T                         further members, of any name

`_` in a Python name is `-` in JSON. A parameter with a default is optional.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from corefw.errors import FOREIGN, PluginError, did_you_mean
from corefw.qmp.forms import (
    ANYTHING,
    BOOLEAN,
    INTEGER,
    NOTHING,
    NUMBER,
    STRING,
    Alternate,
    ArrayOf,
    Enumeration,
    Form,
    Member,
    Optional,
    Structure,
)
from corefw.qmp.protocol import QmpError


@dataclass(frozen=True, slots=True)
class Shape:
    """What a JSON value has to be.

    text    for people
    check   `check(value, path)` gives the value for Python, or raises QmpError with the path
    form    describes the type to clients
    """

    text: str
    check: Callable[[object, str], object]
    form: Form = ANYTHING


@dataclass(frozen=True, slots=True)
class Variants:
    """An annotation of a dict: the string member `tag` selects the type that describes the other members."""

    name: str
    tag: str
    types: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument: `keyword` in Python, `name` in JSON."""

    keyword: str
    shape: Shape
    optional: bool

    @property
    def name(self) -> str:
        return self.keyword.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Signature:
    """What a command takes and returns. `others` describes members of any other name; None if there are none."""

    parameters: tuple[Parameter, ...]
    others: Shape | None
    returns: Shape

    def bind(self, arguments: Mapping[str, object]) -> dict[str, object]:
        """The keyword arguments for the function. Raises QmpError for the first wrong argument."""
        bound: dict[str, object] = {}
        for parameter in self.parameters:
            if parameter.name in arguments:
                bound[parameter.keyword] = parameter.shape.check(arguments[parameter.name], parameter.name)
            elif not parameter.optional:
                raise QmpError(f"Parameter '{parameter.name}' is missing")
        known = {parameter.name for parameter in self.parameters}
        for name, value in arguments.items():
            if name not in known:
                if self.others is None or name in bound:
                    raise QmpError(f"Parameter '{name}' is unexpected{did_you_mean(name, known)}")
                bound[name] = self.others.check(value, name)
        return bound


def signature(function: Callable[..., object], *, skip: int = 0) -> Signature:
    """Read a function's signature, without its first `skip` parameters. Raises PluginError if it is not a schema."""
    what = getattr(function, "__qualname__", repr(function))
    try:
        found = list(inspect.signature(function, eval_str=True).parameters.values())[skip:]
        others = [one for one in found if one.kind is inspect.Parameter.VAR_KEYWORD]
        return Signature(
            tuple(
                Parameter(one.name, shape(one.annotation), one.default is not inspect.Parameter.empty)
                for one in found
                if one not in others and _is_keyword(one)
            ),
            shape(others[0].annotation) if others else None,
            _returns(function),
        )
    except FOREIGN as error:  # annotations that are strings are code
        raise PluginError(f"the signature of {what} is not a valid command schema: {error}") from None


def _returns(function: Callable[..., object]) -> Shape:
    """What it returns; anything if the annotation is not a JSON type."""
    try:
        annotation = get_type_hints(function, include_extras=True).get("return", object)
        return _NOTHING if annotation is types.NoneType else shape(annotation)
    except FOREIGN:
        return _ANYTHING


def _is_keyword(parameter: inspect.Parameter) -> bool:
    if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
        raise TypeError(f"'{parameter.name}' is positional, expected keywords only")
    return True


def shape(annotation: object) -> Shape:
    """The shape for an annotation. Raises TypeError if it is not a JSON type."""
    if annotation is inspect.Parameter.empty:
        raise TypeError("a parameter has no type")
    simple = _SIMPLE.get(annotation) if isinstance(annotation, type) else None
    if simple is not None:
        return simple
    if annotation is Any:
        return _ANYTHING
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return _one_of({str(member): member for member in annotation}, annotation.__name__)
    if is_typeddict(annotation):
        return _object(annotation)
    if get_origin(annotation) is Annotated:
        inner, mark, *_ = get_args(annotation)
        return _variants(mark) if isinstance(mark, Variants) else replace(shape(inner), form=mark)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _one_of({str(value): value for value in arguments})
    if origin in (list, Sequence):
        return _array(shape(arguments[0]))
    if origin in (Union, types.UnionType) and len(arguments) == 2 and types.NoneType in arguments:
        return _nullable(shape(next(one for one in arguments if one is not types.NoneType)))
    if origin in (Union, types.UnionType) and len(arguments) == 2 and str in arguments:
        return _string_or(next(one for one in arguments if one is not str))
    raise TypeError(f"{annotation!r} is not a JSON type")


# -- the shapes ------------------------------------------------------------------------------------------------------


def _instance_of(text: str, form: Form, *kinds: type) -> Shape:
    def check(value: object, path: str) -> object:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise _wrong_type(path, text)
        return value

    return Shape(text, check, form)


def _wrong_type(path: str, expected: str) -> QmpError:
    return QmpError(f"Invalid parameter type for '{path}', expected: {expected}")


_STRING: Final = _instance_of("string", STRING, str)
_LIST: Final = _instance_of("array", ArrayOf(ANYTHING), list)
_DICT: Final = _instance_of("object", ANYTHING, dict)
_ANYTHING: Final = Shape("any", lambda value, _: value)
_NOTHING: Final = Shape("nothing", lambda value, _: value, NOTHING)
_SIMPLE: Final[Mapping[type, Shape]] = {
    str: _STRING,
    int: _instance_of("integer", INTEGER, int),
    bool: _instance_of("boolean", BOOLEAN, bool),
    float: _instance_of("number", NUMBER, float, int),
    list: _LIST,
    dict: _DICT,
    object: _ANYTHING,
}


def _one_of(values: Mapping[str, object], name: str = "") -> Shape:
    def check(value: object, path: str) -> object:
        text = _STRING.check(value, path)
        if text not in values:
            hint = did_you_mean(str(text), values)
            raise QmpError(f"Parameter '{path}' does not accept value '{text}'{hint}")
        return values[str(text)]

    return Shape(" | ".join(f'"{value}"' for value in values), check, Enumeration(name, tuple(values)))


def _nullable(inner: Shape) -> Shape:
    return Shape(
        f"{inner.text} | null",
        lambda value, path: None if value is None else inner.check(value, path),
        Optional(inner.form),
    )


def _string_or(kind: Any) -> Shape:
    if not is_typeddict(kind):
        raise TypeError(f"a string or {kind!r} is not a JSON type")
    inner = _object(kind)

    def check(value: object, path: str) -> object:
        if isinstance(value, str):
            return value
        if not isinstance(value, dict):
            raise _wrong_type(path, f"{kind.__name__}OrStr")
        return inner.check(value, path)

    return Shape(f"string | {inner.text}", check, Alternate(f"{kind.__name__}OrStr", (STRING, inner.form)))


def _array(item: Shape) -> Shape:
    def check(value: object, path: str) -> object:
        _LIST.check(value, path)
        assert isinstance(value, list)
        return [item.check(one, f"{path}[{index}]") for index, one in enumerate(value)]

    return Shape(f"[{item.text}]", check, ArrayOf(item.form))


def _object(kind: Any) -> Shape:
    required, members = {}, {}
    for name, annotation in get_type_hints(kind, include_extras=True).items():
        # Where annotations are strings, __required_keys__ does not see NotRequired.
        marked = get_origin(annotation) if get_origin(annotation) in (Required, NotRequired) else None
        required[name] = name in kind.__required_keys__ if marked is None else marked is Required
        members[name] = shape(annotation if marked is None else get_args(annotation)[0])

    form = Structure(
        kind.__name__, tuple(Member(name, inner.form, not required[name]) for name, inner in members.items())
    )

    def check(value: object, path: str) -> object:
        _DICT.check(value, path)
        assert isinstance(value, dict)
        for name in members:
            if name not in value and required[name]:
                raise QmpError(f"Parameter '{path}.{name}' is missing")
        for name in value:
            if name not in members:
                raise QmpError(f"Parameter '{path}.{name}' is unexpected{did_you_mean(name, members)}")
        return {name: members[name].check(one, f"{path}.{name}") for name, one in value.items()}

    texts = (f"{name}{'' if required[name] else '?'}: {inner.text}" for name, inner in members.items())
    return Shape("{" + ", ".join(texts) + "}", check, form)


def _variants(mark: Variants) -> Shape:
    variants = {case: shape(kind) for case, kind in mark.types.items()}
    tags = _one_of({case: case for case in variants})

    def check(value: object, path: str) -> object:
        _DICT.check(value, path)
        assert isinstance(value, dict)
        if mark.tag not in value:
            raise QmpError(f"Parameter '{path}.{mark.tag}' is missing")
        case = str(tags.check(value[mark.tag], f"{path}.{mark.tag}"))
        rest = variants[case].check({name: one for name, one in value.items() if name != mark.tag}, path)
        assert isinstance(rest, dict)
        return {mark.tag: case, **rest}

    tag = Member(mark.tag, Enumeration(f"{mark.name}Type", tuple(variants)))
    form = Structure(mark.name, (tag,), mark.tag, {case: one.form for case, one in variants.items()})
    return Shape(f"{{{mark.tag}: {tags.text}, and what belongs to it}}", check, form)
