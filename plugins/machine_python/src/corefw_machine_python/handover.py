"""The values of a program's fields and sections, as its process passes them to the engine and takes them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from corefw.errors import MigfwError
from corefw.quantities import format_size
from corefw_machine_python import blame
from corefw_machine_python.declarations import Stored
from corefw_machine_python.protocol import Message
from corefw_machine_python.values import OwnSection, Unsavable

MAX_VALUES: Final = 192 << 20
"""Maximum characters of all values together; a message has at most 256 MiB."""


class Unmovable(MigfwError):
    """The program has state that would not move."""


class Handover:
    """What moves of one program besides its arrays, in the order of its declarations."""

    def __init__(self, program: object, fields: Sequence[Stored]) -> None:
        self._program = program
        self._fields = fields
        self._kept: list[Any] = []  # as they were last handed over

    def described(self) -> list[Message]:
        """Names, types and versions."""
        return [_describe(one) for one in self._fields]

    def values(self) -> list[Any]:
        """Everything to hand over. Raises Unmovable if something cannot move."""
        self._kept = [self._saved(one) if isinstance(one, OwnSection) else self._stored(one) for one in self._fields]
        if sum(len(value) for value in self._kept if isinstance(value, str)) > MAX_VALUES:
            raise Unmovable(f"its values and sections take more than {format_size(MAX_VALUES)} together")
        return list(self._kept)

    def shown(self) -> list[Any]:
        """The same without the sections (null), which may take long to save. Raises Unmovable."""
        return [None if isinstance(one, OwnSection) else self._stored(one) for one in self._fields]

    def restore(self, values: Sequence[Any]) -> None:
        """Set the values, but keep the object of one that did not change: the program may hold a reference to it.
        Raises Unmovable for a section that cannot be loaded."""
        kept = self._kept or [None] * len(self._fields)
        for one, value, before in zip(self._fields, values, kept, strict=True):
            if value != before or isinstance(value, float):  # 0.0 == -0.0
                self._restore(one, value)

    def _stored(self, one: Stored) -> object:
        try:
            return one.stored(self._program)
        except (TypeError, ValueError) as error:
            raise Unmovable(str(error)) from None

    def _saved(self, one: OwnSection) -> str:
        try:
            return one.stored(self._program)
        except Unsavable as error:
            raise Unmovable(str(error)) from None
        except Exception as error:
            raise Unmovable(f"section '{one.name}' cannot be saved: {reason(error)}") from error

    def _restore(self, one: Stored, value: Any) -> None:
        try:
            one.restore(self._program, value)
        except Exception as error:
            if not isinstance(one, OwnSection):
                raise
            raise Unmovable(f"section '{one.name}' cannot be loaded: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The error in a line, with the place in the program that raised it."""
    return str(error) if isinstance(error, Unmovable) else blame.describe(error)


def _describe(one: Stored) -> Message:
    described: Message = {"name": one.name, "type": one.type_name, "since": one.since}
    return described | ({"versions": one.versions} if isinstance(one, OwnSection) else {})
