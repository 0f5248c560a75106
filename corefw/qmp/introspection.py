"""query-qmp-schema: every command and event of this engine with its types.

It is made from what checks the arguments, so it cannot differ from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from corefw.declarations import Kind, Parameter
from corefw.qmp.documents import EVENTS
from corefw.qmp.forms import (
    ANYTHING,
    BOOLEAN,
    INTEGER,
    NOTHING,
    STRING,
    ArrayOf,
    Enumeration,
    Form,
    Member,
    Optional,
    SchemaInfos,
    Structure,
)
from corefw.settings import Settings

if TYPE_CHECKING:
    from corefw.qmp.commands import Command


def describe(commands: Mapping[str, Command], settings: Settings) -> list[dict[str, object]]:
    """QAPI's list of SchemaInfo."""
    infos = SchemaInfos(_settings_forms(settings))
    entries: list[dict[str, object]] = []
    for name, command in commands.items():
        entry: dict[str, object] = {
            "name": name,
            "meta-type": "command",
            "arg-type": infos.name_of(_arguments(command), f"{name}-arg"),
            "ret-type": infos.name_of(command.signature.returns.form, f"{name}-ret"),
        }
        entries.append(entry | ({"allow-oob": True} if command.out_of_band else {}))
    for name, data in EVENTS.items():
        entries.append({"name": name, "meta-type": "event", "arg-type": infos.name_of(data, f"{name}-arg")})
    return entries + infos.entries()


def _arguments(command: Command) -> Form:
    signature = command.signature
    if signature.others is not None and isinstance(signature.others.form, Structure):
        return signature.others.form
    if not signature.parameters:
        return NOTHING
    return Structure("", tuple(Member(one.name, one.shape.form, one.optional) for one in signature.parameters))


# -- what depends on the installed plugins -----------------------------------------------------------------------------


def _settings_forms(settings: Settings) -> dict[str, Form]:
    parameters = [settings.declared_parameter(name) for name in settings.parameters()]
    values = tuple(Member(one.name, _value(one), optional=one.default is None) for one in parameters)
    changes = tuple(
        Member(name, _changed(one), optional=True) for one in parameters for name in (one.name, *one.aliases)
    )
    return {
        "MigrationCapability": Enumeration("MigrationCapability", tuple(settings.capabilities())),
        "MigrationParameters": Structure("MigrationParameters", values),
        "MigrateSetParameters": Structure("MigrateSetParameters", changes),
    }


_BY_KIND: Final[Mapping[Kind, Form]] = {
    Kind.BOOLEAN: BOOLEAN,
    Kind.STRING: STRING,
    Kind.LIST: ArrayOf(ANYTHING),
    Kind.OBJECTS: ArrayOf(ANYTHING),
}

_TRANSFORM: Final = Structure("BitmapMigrationBitmapAliasTransform", (Member("persistent", BOOLEAN, optional=True),))
_BITMAP_ALIAS: Final = Structure(
    "BitmapMigrationBitmapAlias",
    (Member("name", STRING), Member("alias", STRING), Member("transform", _TRANSFORM, optional=True)),
)
_NODE_ALIAS: Final = Structure(
    "BitmapMigrationNodeAlias",
    (Member("node-name", STRING), Member("alias", STRING), Member("bitmaps", ArrayOf(_BITMAP_ALIAS))),
)
_BY_NAME: Final[Mapping[str, Form]] = {"block-bitmap-mapping": ArrayOf(_NODE_ALIAS)}
"""Parameters of QEMU's that have a type of their own."""


def _value(parameter: Parameter) -> Form:
    if parameter.name in _BY_NAME:
        return _BY_NAME[parameter.name]
    if parameter.kind is Kind.CHOICE:
        return Enumeration(f"{parameter.name}-enum", parameter.choices)
    return _BY_KIND.get(parameter.kind, INTEGER)


def _changed(parameter: Parameter) -> Form:
    if parameter.kind is Kind.STRING or parameter.default is None:
        return Optional(_value(parameter))
    return _value(parameter)
