"""The messages of QMP: greeting, requests, replies and events, each read and written here.

Invariant: a message is one line of ASCII, and a request is checked as a whole before any of it is used. The texts of
the errors are QEMU's, because programs compare them. Source: QEMU 7.2, docs/interop/qmp-spec and its monitor's answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from corefw import __version__
from corefw.errors import MigfwError

QEMU_VERSION: Final = (7, 2, 0)
"""The version of QEMU that the commands, fields and texts are taken from."""

PACKAGE: Final = f"migfw {__version__}"
OUT_OF_BAND: Final = "oob"


class ErrorClass(StrEnum):
    """QMP's error classes, which clients may act on; the text is for people."""

    GENERIC = "GenericError"
    COMMAND_NOT_FOUND = "CommandNotFound"


class QmpError(MigfwError):
    """A command was refused. Commands raise it on the server; the client raises it for the reply.

    error_class   one of QMP's classes
    desc          the text as it is sent, QEMU's own if it has one; `str()` escapes what cannot be printed
    """

    def __init__(self, desc: str, error_class: str = ErrorClass.GENERIC) -> None:
        self.desc: Final = desc
        self.error_class: Final = error_class
        super().__init__(desc)


class _Missing:
    """The id of a request that has none: its reply has none either. Null is an id."""


NO_ID: Final = _Missing()


@dataclass(frozen=True, slots=True)
class Request:
    command: str
    arguments: Mapping[str, object]
    id: object = NO_ID
    out_of_band: bool = False


def version() -> dict[str, object]:
    major, minor, micro = QEMU_VERSION
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": PACKAGE}


def greeting() -> dict[str, object]:
    return {"QMP": {"version": version(), "capabilities": [OUT_OF_BAND]}}


# -- requests ----------------------------------------------------------------------------------------------------------


def request_id(value: object) -> object:
    """The id for the reply, even if the request is wrong."""
    return value.get("id", NO_ID) if isinstance(value, dict) else NO_ID


def wants_out_of_band(value: object) -> bool:
    return isinstance(value, dict) and "exec-oob" in value and "execute" not in value


def read_request(value: object, *, out_of_band: bool) -> Request:
    """Check a request. `out_of_band`: whether that capability was negotiated. Raises QmpError."""
    if not isinstance(value, dict):
        raise QmpError("QMP input must be a JSON object")
    verbs = ("execute", "exec-oob") if out_of_band else ("execute",)
    command: str | None = None
    for name, member in value.items():
        if name in verbs:
            if not isinstance(member, str):
                raise QmpError(f"QMP input member '{name}' must be a string")
            if command is not None:
                raise QmpError("QMP input member 'execute' clashes with 'exec-oob'")
            command = member
        elif name == "arguments":
            if not isinstance(member, dict):
                raise QmpError("QMP input member 'arguments' must be an object")
        elif name != "id":
            raise QmpError(f"QMP input member '{name}' is unexpected")
    if command is None:
        raise QmpError("QMP input lacks member 'execute'")
    return Request(command, value.get("arguments", {}), request_id(value), "exec-oob" in value)


def write_request(request: Request) -> bytes:
    message: dict[str, object] = {"exec-oob" if request.out_of_band else "execute": request.command}
    if request.arguments:
        message["arguments"] = dict(request.arguments)
    if request.id is not NO_ID:
        message["id"] = request.id
    return encode(message)


# -- replies and events ------------------------------------------------------------------------------------------------


def success(value: object, id_: object) -> dict[str, object]:
    return _with_id({"return": {} if value is None else value}, id_)


def failure(error: MigfwError, id_: object) -> dict[str, object]:
    error_class, desc = str(ErrorClass.GENERIC), str(error)
    if isinstance(error, QmpError):
        error_class, desc = error.error_class, error.desc
    return _with_id({"error": {"class": error_class, "desc": desc}}, id_)


def event(name: str, data: Mapping[str, object], timestamp: float) -> dict[str, object]:
    """An event; `timestamp` is in seconds since 1970."""
    microseconds = round(timestamp * 1_000_000)
    message: dict[str, object] = {
        "event": name,
        "timestamp": {"seconds": microseconds // 1_000_000, "microseconds": microseconds % 1_000_000},
    }
    if data:
        message["data"] = dict(data)
    return message


def encode(message: Mapping[str, object]) -> bytes:
    """The message as one line. Raises TypeError or ValueError for what JSON cannot express (NaN, a set, a cycle)."""
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\r\n"


def _with_id(message: dict[str, object], id_: object) -> dict[str, object]:
    if id_ is not NO_ID:
        message["id"] = id_
    return message
