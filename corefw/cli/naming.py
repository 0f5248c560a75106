"""What an engine is called, and where its QMP server listens."""

from __future__ import annotations

import re
from pathlib import Path

from corefw.errors import UsageError
from corefw.qmp.address import QmpAddress, UnixAddress, find_engines, named_address, parse_address
from corefw.socketfile import make_room
from corefw.sockets import reason

_LONGEST = 40
"""Characters of a name that was made up; a name given by --name may be longer."""


def claim(name: str | None, qmp: str | None, program: str) -> tuple[str, QmpAddress]:
    """The name and address of a new engine. What was given must be free; a name made from `program` gets a number
    where it is taken. Raises UsageError."""
    taken = {engine.name for engine in find_engines()} if qmp is None else set()
    if name is not None and name in taken:
        raise UsageError(f"an engine named '{name}' runs already: choose another --name, or end it with 'migfw quit'")
    chosen = name if name is not None else _free(suggest(program), taken)
    address = named_address(chosen) if qmp is None else parse_address(qmp)
    if isinstance(address, UnixAddress):
        try:
            make_room(Path(address.path))
        except OSError as error:
            raise UsageError(f"cannot listen at '{address}': {reason(error)}") from None
    return chosen, address


def suggest(program: str) -> str:
    """ "sims/heat.py:Heat" -> "heat", "package.module:Class" -> "class", "stress" -> "stress"."""
    path, _, attribute = program.partition(":")
    word = Path(path).stem if path.endswith(".py") else (attribute or path)
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:_LONGEST] or "guest"


def _free(name: str, taken: set[str]) -> str:
    number = 1
    while (numbered := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return numbered
