"""The types of QMP's values, and how query-qmp-schema describes them (QAPI's SchemaInfo).

Every type has a name of its own; QEMU numbers them instead, and says that clients must not care.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True)
class Builtin:
    name: str
    json_type: str


STRING: Final = Builtin("str", "string")
INTEGER: Final = Builtin("int", "int")
NUMBER: Final = Builtin("number", "number")
BOOLEAN: Final = Builtin("bool", "boolean")
NULL: Final = Builtin("null", "null")
ANYTHING: Final = Builtin("any", "value")


@dataclass(frozen=True, slots=True)
class Enumeration:
    """One of these strings. If the name is "", one is made from where the type is used."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ArrayOf:
    item: Form


@dataclass(frozen=True, slots=True)
class Optional:
    """A value of this type, or null."""

    form: Form


@dataclass(frozen=True, slots=True)
class Alternate:
    """A value of one of these types, which differ in their JSON type."""

    name: str
    forms: tuple[Form, ...]


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    form: Form
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Structure:
    """An object. The value of the member `tag` selects one of `variants`, which adds its members."""

    name: str
    members: tuple[Member, ...] = ()
    tag: str | None = None
    variants: Mapping[str, Form] = field(default_factory=dict)


Form = Builtin | Enumeration | ArrayOf | Optional | Alternate | Structure

NOTHING: Final = Structure("Empty")


class SchemaInfos:
    """Collects the types that commands and events use, each of them once.

    `known` has the types that the commands know by name only, because they depend on the installed plugins.
    """

    def __init__(self, known: Mapping[str, Form]) -> None:
        self._known = known
        self._found: dict[str, dict[str, object]] = {}

    def entries(self) -> list[dict[str, object]]:
        return list(self._found.values())

    def name_of(self, form: Form, where: str) -> str:
        """The name by which the schema refers to a type; a type without a name gets `where`."""
        if isinstance(form, Enumeration | Structure):
            form = self._known.get(form.name, form)
        match form:
            case Builtin(name, json_type):
                return self._add(name, {"meta-type": "builtin", "json-type": json_type})
            case ArrayOf(item):
                of = self.name_of(item, f"{where}-item")
                return self._add(f"[{of}]", {"meta-type": "array", "element-type": of})
            case Optional(inner):
                of = self.name_of(inner, where)
                members = [{"type": of}, {"type": self.name_of(NULL, where)}]
                return self._add(f"{of}OrNull", {"meta-type": "alternate", "members": members})
            case Alternate(name, forms):
                members = [{"type": self.name_of(one, where)} for one in forms]
                return self._add(name, {"meta-type": "alternate", "members": members})
            case Enumeration(name, values):
                names = [{"name": value} for value in values]
                return self._add(
                    name or f"{where}-enum", {"meta-type": "enum", "members": names, "values": list(values)}
                )
            case Structure():
                return self._structure(form, form.name or where)

    def _structure(self, form: Structure, name: str) -> str:
        if name in self._found:
            return name
        info: dict[str, object] = {"name": name, "meta-type": "object"}
        self._found[name] = info
        info["members"] = [
            {
                "name": one.name,
                "type": self.name_of(one.form, f"{name}-{one.name}"),
                **({"default": None} if one.optional else {}),
            }
            for one in form.members
        ]
        if form.tag is not None:
            info["tag"] = form.tag
            info["variants"] = [
                {"case": case, "type": self.name_of(variant, f"{name}-{case}")}
                for case, variant in form.variants.items()
            ]
        return name

    def _add(self, name: str, info: dict[str, object]) -> str:
        self._found.setdefault(name, {"name": name, **info})
        return name
